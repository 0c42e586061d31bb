"""`ExpertSuite` runs several experts in one call."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging

from ...expert_spec import check_expert_name
from .bae_normals import BaeNormals
from .base import Expert, ExpertError, expert_from_dict
from .depth import DepthEstimator
from .detection import ObjectDetector
from .edge import CannyEdges, DexiNedEdges
from .normal import NormalEstimator, NormalsFromDepth
from .open_vocabulary import OpenVocabularyDetector
from .saved_files import require_inside
from .segmentation import UniversalSegmentation
from .text import RapidOcrText


logger = logging.get_logger(__name__)

SUITES: dict[str, Callable[[], list[Expert]]] = {
    "published": lambda: [
        DepthEstimator("Intel/dpt-hybrid-midas"),
        BaeNormals(),
        UniversalSegmentation("facebook/mask2former-swin-large-coco-panoptic"),
        DexiNedEdges(),
        OpenVocabularyDetector(),
        RapidOcrText(),
    ],
    "fast": lambda: [
        DepthEstimator("depth-anything/Depth-Anything-V2-Small-hf"),
        NormalsFromDepth(),
        UniversalSegmentation("facebook/mask2former-swin-tiny-coco-panoptic"),
        CannyEdges(),
        ObjectDetector("PekingU/rtdetr_v2_r18vd"),
        RapidOcrText(),
    ],
    "commercial": lambda: [
        DepthEstimator("depth-anything/Depth-Anything-V2-Small-hf"),
        NormalEstimator("google/tipsv2-b14-dpt"),
        UniversalSegmentation("tue-mps/coco_panoptic_eomt_large_640"),
        DexiNedEdges(),
        ObjectDetector("ustc-community/dfine-xlarge-coco"),
        RapidOcrText(),
    ],
    "offline": lambda: [CannyEdges(), RapidOcrText()],
}

SUITE_FILE = "suite.json"
ON_ERROR = ("raise", "missing")
MEMORY = ("all", "sequential")


class ExpertSuite(MutableMapping):
    """
    A dict of experts by name, in the given order. A call runs them all. An expert is loaded when it first runs.

    Args:
        experts (`Iterable[Expert]`): experts with different names.
        on_error (`str`, *optional*, defaults to `"raise"`):
            The reaction to an expert that fails, on an image or while it is loaded. `"raise"` raises an error.
            `"missing"` sets its label for the image to `None`, with one warning for each expert.
        memory (`str`, *optional*, defaults to `"all"`):
            `"all"` keeps every expert loaded after its first run. `"sequential"` loads one expert, runs it over all
            images of the call and frees it before the next; call it with many images at a time.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import CannyEdges, ExpertSuite

    >>> suite = ExpertSuite.from_name("offline")
    >>> labels = suite([image])[0]
    >>> labels["edge"].shape, labels["ocr"]["words"]
    ((64, 64), ['▲'])
    >>> suite["edge"] = CannyEdges(sigma=2.0)  # swapped
    >>> list(suite.without("ocr")([image])[0])  # left out
    ['edge']
    ```
    """

    def __init__(self, experts: Iterable[Expert] = (), on_error: str = "raise", memory: str = "all"):
        self._experts: dict[str, Expert] = {}
        self._left_out: dict[str, Expert] = {}  # these still run if another expert needs their labels
        self._warned: set[str] = set()
        self.on_error = on_error
        self.memory = memory
        for expert in experts:
            if isinstance(expert, Expert) and expert.name in self:
                raise ValueError(f"two experts have the name '{expert.name}': {self[expert.name]} and {expert}")
            self[getattr(expert, "name", "")] = expert

    @property
    def on_error(self) -> str:
        """`"raise"` or `"missing"`; can be set."""
        return self._on_error

    @on_error.setter
    def on_error(self, value: str) -> None:
        self._on_error = _checked("on_error", value, ON_ERROR)

    @property
    def memory(self) -> str:
        """`"all"` or `"sequential"`; can be set."""
        return self._memory

    @memory.setter
    def memory(self, value: str) -> None:
        self._memory = _checked("memory", value, MEMORY)

    def __getitem__(self, name: str) -> Expert:
        return self._experts[name]

    def __setitem__(self, name: str, expert: Expert) -> None:
        if not isinstance(expert, Expert):
            raise TypeError(f"a suite holds experts, not {type(expert).__name__}; derive your class from Expert")
        if expert.name != name:
            raise ValueError(f"the expert has the name '{expert.name}', not '{name}'; set `expert.name` first")
        check_expert_name(name)
        self._experts[name] = expert

    def __delitem__(self, name: str) -> None:
        del self._experts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    def __repr__(self) -> str:
        return f"ExpertSuite([{', '.join(map(repr, self.values()))}])"

    def __call__(
        self, images: list[Image.Image], labels: Sequence[Mapping[str, Any] | None] | None = None
    ) -> list[dict[str, Any]]:
        """
        Runs every expert over all images. Experts whose labels others need run first.

        Args:
            images (`list[PIL.Image.Image]`): any number, of any sizes.
            labels (`list[dict]`, *optional*):
                Known labels of other experts, one dict for each image. If an expert needs them, and they are known for
                all images, they are not computed again.

        Returns:
            `list[dict]`: for each image a dict from an expert's name to its label; see [`Expert.run`]. With
            `on_error="missing"`, the label is `None` if the expert failed.

        Raises:
            ExpertError: naming the expert and the number of the image on which it failed.
        """
        found: dict[str, list[Any]] = {}
        known = [own or {} for own in labels] if labels is not None else [{}] * len(images)
        if len(known) != len(images):
            raise ValueError(f"{len(known)} labels for {len(images)} images")
        for name in self:
            self._run(name, images, known, found, ())
        return [{name: found[name][index] for name in self} for index in range(len(images))]

    def _run(
        self,
        name: str,
        images: list[Image.Image],
        known: list[Mapping[str, Any]],
        found: dict[str, list[Any]],
        waiting: tuple[str, ...],
    ) -> None:
        """Adds the labels of an expert to `found`, after those of the experts that it needs."""
        if name in found:
            return
        if name in waiting:
            raise ValueError(f"experts need each other's labels in a circle: {' → '.join((*waiting, name))}")
        expert = self._experts[name] if name in self._experts else self._left_out[name]
        others = {}
        for other in (*expert.needs, *expert.uses):
            if other not in found and other not in self and images and all(other in own for own in known):
                found[other] = [own[other] for own in known]
            elif other in self or other in self._left_out:
                self._run(other, images, known, found, (*waiting, name))
            if other in found:
                others[other] = found[other]
        try:
            found[name] = expert(images, **others)
        except Exception:
            if self.on_error == "raise":
                raise
            found[name] = self._run_one_by_one(expert, images, others)
        finally:
            if self.memory == "sequential":
                expert.unload()

    def _run_one_by_one(self, expert: Expert, images: list[Image.Image], others: dict[str, list[Any]]) -> list[Any]:
        labels: list[Any] = [None] * len(images)
        try:
            expert.load()
        except Exception as error:  # it would fail for every image
            self._warn(expert, f"cannot be loaded: its labels are missing ({error.__cause__ or error})")
            return labels
        for index, image in enumerate(images):
            try:
                (labels[index],) = expert([image], **{name: [own[index]] for name, own in others.items()})
            except Exception as error:
                reason = error.__cause__ if isinstance(error, ExpertError) and error.__cause__ else error
                self._warn(expert, f"failed on image {index}, where its label is missing: {reason}")
        return labels

    def _warn(self, expert: Expert, message: str) -> None:
        if expert.name not in self._warned:
            self._warned.add(expert.name)
            logger.warning(f"The expert '{expert.name}' {message}. Later failures of it are not reported.")

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """The experts' entries for `experts` of `PrismerConfig` and `PrismerImageProcessor`."""
        return [expert.description for expert in self.values()]

    @property
    def class_names(self) -> dict[str, list[str]]:
        """By expert, the names of its classes, for panels and for tables of class features."""
        names = {name: getattr(expert, "class_names", None) for name, expert in self.items()}
        return {name: own for name, own in names.items() if own is not None}

    def use_class_names(self, class_names: Mapping[str, Sequence[str]]) -> None:
        """
        Gives the names of a network's classes to the experts that find any names, unless they were made with names.

        Args:
            class_names (`dict`): by expert, the names of its classes in order, such as `config.class_names`.
        """
        for name, names in class_names.items():
            if name in self and getattr(self[name], "has_default_names", False):
                self[name].class_names = list(names)  # type: ignore[attr-defined]

    def without(self, *names: str) -> "ExpertSuite":
        """
        A suite of the same experts without those named. If another expert needs the labels of an expert that is left
        out, it still runs, but its label is not returned. `del suite[name]` removes an expert completely.
        """
        self._require(names)
        return self._part([name for name in self if name not in names])

    def only(self, *names: str) -> "ExpertSuite":
        """A suite of only the named experts. The others are left out as in [`ExpertSuite.without`]."""
        self._require(names)
        return self._part([name for name in self if name in names])

    def _part(self, names: list[str]) -> "ExpertSuite":
        part = ExpertSuite((self[name] for name in names), self.on_error, self.memory)
        part._left_out = {
            name: expert for name, expert in (self._left_out | self._experts).items() if name not in names
        }
        part._warned = self._warned
        return part

    def _require(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self:
                raise KeyError(f"there is no expert '{name}'; there are {', '.join(self) or 'none'}")

    def to(
        self, device: str | torch.device | int | None = None, dtype: torch.dtype | str | None = None
    ) -> "ExpertSuite":
        """Moves every expert, now or when it is loaded. Returns itself."""
        for expert in (*self.values(), *self._left_out.values()):
            expert.to(device, dtype)
        return self

    def unload(self) -> None:
        """Frees every expert's model. The next use loads it again."""
        for expert in (*self.values(), *self._left_out.values()):
            expert.unload()

    def report(self) -> dict[str, dict[str, float | None]]:
        """
        The cost of each expert so far: `{name: {"images": …, "seconds": …, "seconds_per_image": …,
        "loading_seconds": …, "peak_memory_bytes": …}}`.

        On CUDA, the peak of memory is the most that torch had allocated while the expert was loaded and ran, with its
        own weights and without those of other experts. On a CPU it is the growth of the process's peak of resident
        memory. It is 0 if something before needed more, so only experts that set a new peak have a figure. It is
        `None` before the first run, and if the system does not report it.
        """
        return {
            name: {
                "images": expert.num_images,
                "seconds": expert.seconds,
                "seconds_per_image": expert.seconds / max(1, expert.num_images),
                "loading_seconds": expert.loading_seconds,
                "peak_memory_bytes": expert.peak_memory,
            }
            for name, expert in self.items()
        }

    # ---- saving and loading ----

    @classmethod
    def from_name(cls, name: str) -> "ExpertSuite":
        """
        A suite that comes with this package.

        Args:
            name (`str`):
                - `"published"`: the six experts closest to those of the published checkpoints: [`DepthEstimator`]
                  (DPT-Hybrid), [`BaeNormals`], [`UniversalSegmentation`] (Mask2Former Swin-L, COCO panoptic),
                  [`DexiNedEdges`], [`OpenVocabularyDetector`] (MM-Grounding-DINO) and [`RapidOcrText`]. The first four
                  are the same models; the detector finds the names of the published detector's classes.
                - `"fast"`: six small ones: Depth-Anything-V2-Small, [`NormalsFromDepth`], Mask2Former Swin-T,
                  [`CannyEdges`], RT-DETRv2-R18 and [`RapidOcrText`].
                - `"commercial"`: six whose licences allow commercial use: Depth-Anything-V2-Small, TIPSv2, EoMT-L,
                  [`DexiNedEdges`], D-FINE-X (COCO) and [`RapidOcrText`].
                - `"offline"`: [`CannyEdges`] and [`RapidOcrText`]; nothing is downloaded.

                All of them use [`HashedNgrams`] for words. A converted checkpoint needs [`ClipTextFeatures`] with the
                published analysis: `suite["ocr"] = RapidOcrText(ClipTextFeatures(pca=…))`.
        """
        if name not in SUITES:
            raise ValueError(f"there is no suite of experts '{name}'; accepted are {', '.join(map(repr, SUITES))}")
        return cls(SUITES[name]())

    def to_dict(self) -> dict[str, Any]:
        """The description for [`ExpertSuite.from_dict`], plain JSON: `{"experts": [expert.to_dict(), …], …}`."""
        return {"experts": [expert.to_dict() for expert in self.values()], **self._settings()}

    def _settings(self) -> dict[str, str]:
        """The settings of the suite that differ from the defaults."""
        settings = {} if self.on_error == "raise" else {"on_error": self.on_error}
        return settings if self.memory == "all" else {**settings, "memory": self.memory}

    @classmethod
    def from_dict(cls, description: dict[str, Any], folder: str | Path | None = None) -> "ExpertSuite":
        """
        Args:
            description (`dict`): from [`ExpertSuite.to_dict`].
            folder (`str` or `Path`, *optional*):
                A folder from [`ExpertSuite.save_pretrained`], with its weights. It may come from a stranger, so the
                description may then only name files inside it and ids of models on the Hub.

        Raises:
            ValueError: if it is not the description of a suite, or if it names a file that it may not name.
        """
        entries = description.get("experts") if isinstance(description, Mapping) else None
        if not isinstance(entries, list | tuple):
            raise ValueError("a suite's description is {'experts': [{'type': …, …}, …]}; it has no list of 'experts'")
        experts = []
        for entry in entries:
            of_expert = None
            if folder is not None:
                name = entry.get("name") if isinstance(entry, Mapping) else None
                of_expert = _folder_of(folder, check_expert_name(name))
            experts.append(expert_from_dict(entry, of_expert, folder))
        return cls(experts, description.get("on_error", "raise"), description.get("memory", "all"))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Writes the suite to `experts/suite.json` in a folder, and the files that its settings point to (weights as
        safetensors) to `experts/<name>/`. Weights from the Hub or a package are not copied.
        """
        for name, expert in self.items():
            if expert.name != name:
                raise ValueError(f"the expert '{name}' calls itself {expert.name!r}; they must agree to be saved")
        folder = Path(save_directory) / "experts"
        folder.mkdir(parents=True, exist_ok=True)
        experts = [expert.to_dict(_folder_of(save_directory, name)) for name, expert in self.items()]
        description = {"experts": experts, **self._settings()}
        incomplete = folder / f".{SUITE_FILE}.incomplete"
        incomplete.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        incomplete.replace(folder / SUITE_FILE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "ExpertSuite":
        """
        Restores a suite. Weights are loaded when an expert first runs.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): a folder from `save_pretrained`, or a Hub id.
            kwargs: for the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns="experts/*", **kwargs))
        file = folder / "experts" / SUITE_FILE
        if not file.is_file():
            raise OSError(f"{pretrained_model_name_or_path} holds no experts: there is no experts/{SUITE_FILE}")
        require_inside(file, folder, "the suite's description")
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        return cls.from_dict(description, folder)


def _checked(name: str, value: str, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise ValueError(f"{name} is {value!r}; accepted are {', '.join(map(repr, accepted))}")
    return value


def _folder_of(folder: str | Path, name: str) -> Path:
    return Path(folder) / "experts" / name
