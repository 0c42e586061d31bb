"""Several experts behind one call."""

import json
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import Expert, expert_from_dict
from .edge import CannyEdges
from .text import RapidOcrText


SUITES: dict[str, Callable[[], list[Expert]]] = {
    "offline": lambda: [CannyEdges(), RapidOcrText()],
}

SUITE_FILE = "suite.json"


class ExpertSuite(MutableMapping):
    """
    Experts by name, in the order given. Calling it runs them all; an expert is loaded when it first runs.

    ```python
    >>> from modeling_prismer.processing.experts import ExpertSuite

    >>> suite = ExpertSuite.from_name("offline")
    >>> labels = suite([image])
    >>> labels[0]["edge"].shape, labels[0]["ocr"]["words"]
    ((480, 640), ['stop'])
    >>> suite["edge"] = DexiNedEdges(checkpoint="dexined.safetensors")   # swapped
    >>> labels = suite.without("ocr")([image])                           # left out
    ```

    Args:
        experts (`Iterable[Expert]`): experts of different names.
    """

    def __init__(self, experts: Iterable[Expert] = ()):
        self._experts: dict[str, Expert] = {}
        for expert in experts:
            if isinstance(expert, Expert) and expert.name in self:
                raise ValueError(f"two experts have the name '{expert.name}': {self[expert.name]} and {expert}")
            self[getattr(expert, "name", "")] = expert

    def __getitem__(self, name: str) -> Expert:
        return self._experts[name]

    def __setitem__(self, name: str, expert: Expert) -> None:
        if not isinstance(expert, Expert):
            raise TypeError(f"a suite holds experts, not {type(expert).__name__}; derive your class from Expert")
        if expert.name != name:
            raise ValueError(f"the expert has the name '{expert.name}', not '{name}'; set `expert.name` first")
        self._experts[name] = expert

    def __delitem__(self, name: str) -> None:
        del self._experts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._experts)

    def __len__(self) -> int:
        return len(self._experts)

    def __repr__(self) -> str:
        return f"ExpertSuite([{', '.join(map(repr, self.values()))}])"

    def __call__(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        """
        Runs every expert over all images.

        Args:
            images (`list[PIL.Image.Image]`): any number, of any sizes.

        Returns:
            `list[dict]`: for each image a dict from an expert's name to its label; see [`Expert.run`].

        Raises:
            ExpertError: naming the expert and the number of the image it failed on.
        """
        labels: list[dict[str, Any]] = [{} for _ in images]
        for name, expert in self.items():
            for own, label in zip(labels, expert(images)):
                own[name] = label
        return labels

    @property
    def descriptions(self) -> list[dict[str, Any]]:
        """The experts' entries for `experts` of `PrismerConfig` and `PrismerImageProcessor`."""
        return [expert.description for expert in self.values()]

    def without(self, *names: str) -> "ExpertSuite":
        """A suite of the same experts, loaded or not, but for those named."""
        self._require(names)
        return ExpertSuite(expert for name, expert in self.items() if name not in names)

    def only(self, *names: str) -> "ExpertSuite":
        """A suite of those of the same experts that are named."""
        self._require(names)
        return ExpertSuite(expert for name, expert in self.items() if name in names)

    def _require(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self:
                raise KeyError(f"there is no expert '{name}'; there are {', '.join(self) or 'none'}")

    def to(
        self, device: str | torch.device | int | None = None, dtype: torch.dtype | str | None = None
    ) -> "ExpertSuite":
        """Moves every expert, now or when it is loaded. Returns itself."""
        for expert in self.values():
            expert.to(device, dtype)
        return self

    def unload(self) -> None:
        """Frees every expert's model. The next use loads it again."""
        for expert in self.values():
            expert.unload()

    def report(self) -> dict[str, dict[str, float]]:
        """
        What each expert has cost so far: `{name: {"images": …, "seconds": …, "seconds_per_image": …,
        "loading_seconds": …}}`.
        """
        return {
            name: {
                "images": expert.num_images,
                "seconds": expert.seconds,
                "seconds_per_image": expert.seconds / max(1, expert.num_images),
                "loading_seconds": expert.loading_seconds,
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
                `"offline"`: [`CannyEdges`] and [`RapidOcrText`] with [`HashedNgrams`]; nothing is downloaded.
        """
        if name not in SUITES:
            raise ValueError(f"there is no suite of experts '{name}'; accepted are {', '.join(map(repr, SUITES))}")
        return cls(SUITES[name]())

    def to_dict(self) -> dict[str, Any]:
        """What [`ExpertSuite.from_dict`] restores: `{"experts": [expert.to_dict(), …]}`, plain JSON."""
        return {"experts": [expert.to_dict() for expert in self.values()]}

    @classmethod
    def from_dict(cls, description: dict[str, Any], folder: str | Path | None = None) -> "ExpertSuite":
        """
        Args:
            description (`dict`): from [`ExpertSuite.to_dict`].
            folder (`str` or `Path`, *optional*): a folder that [`ExpertSuite.save_pretrained`] wrote, for own weights.
        """
        return cls(
            expert_from_dict(entry, None if folder is None else _folder_of(folder, entry["name"]))
            for entry in description["experts"]
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Writes the suite to `experts/suite.json` in a folder, and the files that its settings point to (own weights,
        as safetensors) to `experts/<name>/`. Weights from the Hub or a package stay where they are.
        """
        folder = Path(save_directory) / "experts"
        folder.mkdir(parents=True, exist_ok=True)
        description = {
            "experts": [expert.to_dict(_folder_of(save_directory, expert.name)) for expert in self.values()]
        }
        (folder / SUITE_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "ExpertSuite":
        """
        Restores a suite; weights are loaded when an expert first runs.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): a folder that `save_pretrained` wrote, or a Hub id.
            kwargs: for the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns="experts/*", **kwargs))
        file = folder / "experts" / SUITE_FILE
        if not file.is_file():
            raise OSError(f"{pretrained_model_name_or_path} holds no experts: there is no experts/{SUITE_FILE}")
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")), folder)


def _folder_of(folder: str | Path, name: str) -> Path:
    return Path(folder) / "experts" / name
