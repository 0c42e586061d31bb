"""
Reads PASCAL-Context and NYUD-v2 in the layouts in which multi-task models use them.

    data = open_multi_task_data("NYUDv2", "nyud", split="val")
    sample = data[0]
    sample.image, sample.maps["depth"]

| | PASCAL-Context (`pascal_context`) | NYUD-v2 (`nyud`) |
| --- | --- | --- |
| split | `ImageSets/Context/{train,val}.txt` | `gt_sets/{train,val}.txt` |
| image | `JPEGImages/*.jpg` | `images/*.png` |
| semantic | `semseg/VOC12/*.png` or `semseg/pascal-context/*.png`: classes 0 to 20, 255 not measured | `segmentation/*.png`: classes 1 to 40, 0 not measured |
| parts | `human_parts/*.mat`, the annotation of PASCAL-Part | |
| saliency | `sal_distill/*.png`, above half is salient | |
| normals | `normals_distill/*.png`; known in the classes of `json/nyu_classes.json` that `json/context_classes.json` has | `normals/*.png` |
| edges | the borders in `LabelMap` of `pascal-context/trainval/*.mat` | `edge/*.png` |
| depth | | `depth/*.npy`, in metres |
"""  # noqa: E501

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .measures import IGNORED, MaxF, MeanAngle, MeanIoU, Measure, Rmse


# The parts of a person, as in multi-task models: 1 head, 2 torso, 3 upper and 4 lower arm, 5 upper and 6 lower leg.
_PARTS = {
    1: ("hair", "head", "lear", "lebrow", "leye", "mouth", "nose", "rear", "rebrow", "reye"),
    2: ("neck", "torso"),
    3: ("luarm", "ruarm"),
    4: ("lhand", "llarm", "rhand", "rlarm"),
    5: ("luleg", "ruleg"),
    6: ("lfoot", "llleg", "rfoot", "rlleg"),
}
PART_OF = {name: part for part, names in _PARTS.items() for name in names}
PERSON = 15  # its number among the classes of PASCAL VOC


@dataclass(frozen=True)
class DenseTask:
    """
    A task: its name, the channels of its map (classes or values), and its measure, `None` for edges (odsF).

    Maps are uint8 `(height, width)` with classes, 255 where nothing is known; float32 `(height, width, 3)` with unit
    normals, zero where nothing is known; float32 `(height, width)` with metres, 0 where nothing is known.
    """

    name: str
    channels: int
    is_classes: bool
    new_measure: Callable[[], Measure] | None


_NORMALS = DenseTask("normals", 3, False, MeanAngle)
_EDGES = DenseTask("edges", 2, True, None)
PASCAL_CONTEXT_TASKS = (
    DenseTask("semantic", 21, True, lambda: MeanIoU(21)),
    DenseTask("parts", 7, True, lambda: MeanIoU(7)),
    DenseTask("saliency", 2, True, MaxF),
    _NORMALS,
    _EDGES,
)
NYUD_TASKS = (
    DenseTask("semantic", 40, True, lambda: MeanIoU(40)),
    DenseTask("depth", 1, False, lambda: Rmse(least=0.0)),
    _NORMALS,
    _EDGES,
)


@dataclass
class MultiTaskSample:
    """An image with its name and its map for each task."""

    name: str
    image: Image.Image
    maps: dict[str, np.ndarray]


class MultiTaskData(Sequence[MultiTaskSample]):
    """
    The images of one split, with their maps; they are read when they are asked for.

    Args:
        folder (`str` or `Path`): the data.
        split (`str`): `"train"` or `"val"`.
        tasks (`Sequence[str]`, *optional*): names of the tasks to read, by default all.

    Raises:
        FileNotFoundError: naming a file that is missing.
        ValueError: if there is no such task, or a map has another size than its image.
    """

    all_tasks: tuple[DenseTask, ...] = ()

    def __init__(self, folder: str | Path, split: str = "train", tasks: Sequence[str] | None = None):
        self.folder = Path(folder)
        known = [task.name for task in self.all_tasks]
        wanted = known if tasks is None else list(tasks)
        if unknown := [name for name in wanted if name not in known]:
            raise ValueError(f"there is no task {unknown[0]!r}; there are {', '.join(known)}")
        self.tasks = tuple(task for task in self.all_tasks if task.name in wanted)
        self.names = self._find(self.split_file(split)).read_text().split()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self.names[index]
        image = Image.open(self._find(self.image_file(name))).convert("RGB")
        maps = {}
        for task in self.tasks:
            maps[task.name] = getattr(self, f"read_{task.name}")(name)
            if maps[task.name].shape[:2] != (image.height, image.width):
                raise ValueError(
                    f"{name}: the map of '{task.name}' has {maps[task.name].shape[1]}×{maps[task.name].shape[0]} "
                    f"pixels; its image has {image.width}×{image.height}"
                )
        return MultiTaskSample(name, image, maps)

    def split_file(self, split: str) -> str:
        raise NotImplementedError

    def image_file(self, name: str) -> str:
        raise NotImplementedError

    def _find(self, *files: str) -> Path:
        """The first of the files that exists."""
        for file in files:
            if (self.folder / file).is_file():
                return self.folder / file
        raise FileNotFoundError(f"{self.folder} has no {' or '.join(files)}")

    def _png(self, *files: str) -> np.ndarray:
        return np.array(Image.open(self._find(*files)))

    def _normals(self, file: str, known: np.ndarray | None = None) -> np.ndarray:
        """Unit normals of an image with (n + 1) / 2, zero where they are not known."""
        normals = 2 * self._png(file).astype(np.float32) / 255 - 1
        length = np.linalg.norm(normals, axis=-1, keepdims=True)
        is_known = length > 0.1
        if known is not None:
            is_known &= known[..., None]
        return np.where(is_known, normals / np.maximum(length, 1e-6), 0).astype(np.float32)


class PascalContext(MultiTaskData):
    """PASCAL-Context; see the table above."""

    all_tasks = PASCAL_CONTEXT_TASKS

    def split_file(self, split: str) -> str:
        return f"ImageSets/Context/{split}.txt"

    def image_file(self, name: str) -> str:
        return f"JPEGImages/{name}.jpg"

    def read_semantic(self, name: str) -> np.ndarray:
        return self._png(f"semseg/VOC12/{name}.png", f"semseg/pascal-context/{name}.png").astype(np.uint8)

    def read_parts(self, name: str) -> np.ndarray:
        annotation = self._mat(f"human_parts/{name}.mat")["anno"]
        found = None
        for thing in _as_list(annotation["objects"]):
            if found is None:
                found = np.zeros(np.shape(thing["mask"]), np.uint8)
            if int(thing["class_ind"]) == PERSON:
                for part in _as_list(thing["parts"]):
                    if part["part_name"] not in PART_OF:
                        raise ValueError(f"{name}: a person has the unknown part {part['part_name']!r}")
                    found[np.asarray(part["mask"], bool)] = PART_OF[part["part_name"]]
        if found is None:
            raise ValueError(f"{name}: the annotation of parts has no object")
        return found

    def read_saliency(self, name: str) -> np.ndarray:
        return (self._png(f"sal_distill/{name}.png") > 127).astype(np.uint8)

    def read_normals(self, name: str) -> np.ndarray:
        return self._normals(f"normals_distill/{name}.png", np.isin(self._labels(name), self._classes_with_normals))

    def read_edges(self, name: str) -> np.ndarray:
        """1 where a pixel and its right or lower neighbour differ, so that borders are one pixel wide."""
        labels = self._labels(name)
        edges = np.zeros(labels.shape, np.uint8)
        edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
        edges[:-1] |= labels[:-1] != labels[1:]
        return edges

    def _labels(self, name: str) -> np.ndarray:
        return np.asarray(self._mat(f"pascal-context/trainval/{name}.mat")["LabelMap"])

    def _mat(self, file: str) -> dict[str, Any]:
        from scipy.io import loadmat

        return loadmat(self._find(file), simplify_cells=True)

    @cached_property
    def _classes_with_normals(self) -> list[int]:
        """Numbers of the classes that NYUD has too. Its `tvmonitor` has another name there."""
        number_of = json.loads(self._find("json/context_classes.json").read_text())
        indoor = json.loads(self._find("json/nyu_classes.json").read_text())
        names = {name for name in indoor if name in number_of and name != "unknown"} | {"tvmonitor"}
        return sorted(int(number_of[name]) for name in names)


class Nyud(MultiTaskData):
    """NYUD-v2; see the table above."""

    all_tasks = NYUD_TASKS

    def split_file(self, split: str) -> str:
        return f"gt_sets/{split}.txt"

    def image_file(self, name: str) -> str:
        return f"images/{name}.png"

    def read_semantic(self, name: str) -> np.ndarray:
        classes = self._png(f"segmentation/{name}.png").astype(np.int64) - 1
        return np.where(classes < 0, IGNORED, classes).astype(np.uint8)

    def read_depth(self, name: str) -> np.ndarray:
        depth = np.load(self._find(f"depth/{name}.npy"), allow_pickle=False)
        return np.nan_to_num(depth.astype(np.float32), posinf=0, neginf=0)  # unknown

    def read_normals(self, name: str) -> np.ndarray:
        return self._normals(f"normals/{name}.png")

    def read_edges(self, name: str) -> np.ndarray:
        return (self._png(f"edge/{name}.png") > 127).astype(np.uint8)


LAYOUTS: dict[str, type[MultiTaskData]] = {"pascal_context": PascalContext, "nyud": Nyud}


def open_multi_task_data(
    folder: str | Path, layout: str, split: str = "train", tasks: Sequence[str] | None = None
) -> MultiTaskData:
    """
    Opens a folder in one of the layouts. The arguments are those of [`MultiTaskData`].

    Raises:
        ValueError: if there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[layout](folder, split, tasks)


def _as_list(value: Any) -> list[Any]:
    """MATLAB's arrays of one struct come as a dict, empty ones as an empty array."""
    return [value] if isinstance(value, dict) else list(value)
