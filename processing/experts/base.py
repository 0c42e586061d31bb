"""What all experts share: made from settings, loaded on first use, frozen, run in batches, from images to maps."""

import inspect
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image


BACKGROUND = 255  # in every map of ids
MAX_REGIONS = 254  # ids 0 to 253: words or instances of one image


class ExpertError(RuntimeError):
    """An expert failed. `expert` is its name; `image_index` the image's number in the call, `None` if not known."""

    def __init__(self, message: str, expert: str | None = None, image_index: int | None = None):
        super().__init__(message)
        self.expert = expert
        self.image_index = image_index


class FrozenModel:
    """
    A frozen model with settings: the common base of [`Expert`] and [`WordFeatures`].

    A subclass names itself in JSON by `type`, keeps every argument of its constructor as an attribute of the same
    name, and says in `load_model` how its weights are loaded. Nothing is loaded before the first use; what is loaded
    is in evaluation mode and needs no gradient. Copies and pickles carry the settings, never the loaded model.

    Attributes:
        type (`str`): the name that restores the class from a description.
        model_id (`str`, *optional*): Hub id or package of the weights; `None` if there are none.
        license (`str`): licence of the weights.
        size_in_bytes (`int`): size of the weights.
        source (`str`): where code and weights come from.
    """

    type: ClassVar[str]
    registry: ClassVar[dict[str, type["FrozenModel"]]]
    # settings that may be the path of a file or folder, and settings that are themselves frozen models
    file_settings: ClassVar[tuple[str, ...]] = ()
    part_settings: ClassVar[dict[str, type["FrozenModel"]]] = {}

    model_id: str | None = None
    license: str = "not stated"
    size_in_bytes: int = 0
    source: str = ""

    model: Any = None
    is_loaded: bool = False
    loading_seconds: float = 0.0
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "type" not in vars(cls):
            return
        known = cls.registry.get(cls.type)
        # the same class again is a notebook's cell or a module that was run twice
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the type '{cls.type}' of {cls.__qualname__} is already that of {known.__qualname__}")
        cls.registry[cls.type] = cls

    def load_model(self) -> Any:
        """Loads and returns the model, `None` if there is none. A `torch.nn.Module` is then frozen and moved."""
        return None

    def load(self) -> None:
        """Loads the model if it is not there yet."""
        if self.is_loaded:
            return
        start = time.perf_counter()
        self.model = self.load_model()
        if isinstance(self.model, torch.nn.Module):
            self.model.eval().requires_grad_(False)
            self.model.to(device=self.device, dtype=self.dtype)
        self.is_loaded = True
        self.loading_seconds += time.perf_counter() - start

    def unload(self) -> None:
        """Frees the model. The next use loads it again."""
        self.model = None
        self.is_loaded = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def to(self, device: str | torch.device | int | None = None, dtype: torch.dtype | str | None = None):
        """Moves the model, now or when it is loaded. Returns itself."""
        if device is not None:
            self.device = torch.device(device)
        if dtype is not None:
            self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if isinstance(self.model, torch.nn.Module):
            self.model.to(device=self.device, dtype=self.dtype)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("model", "is_loaded")}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name, None)!r}" for name in self._setting_names())
        return f"{type(self).__name__}({settings})"

    # ---- description ----

    @classmethod
    def _setting_names(cls) -> list[str]:
        if cls.__init__ is object.__init__:
            return []
        parameters = inspect.signature(cls).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]

    def to_dict(self, folder: str | Path | None = None) -> dict[str, Any]:
        """
        The description that `from_dict` restores: `{"type": …, **settings}`, plain JSON.

        Args:
            folder (`str` or `Path`, *optional*):
                Copy the files that settings point to into this folder (weights as safetensors), and give their paths
                relative to it.
        """
        if not hasattr(self, "type"):
            raise ValueError(f"{type(self).__name__} cannot be described: give the class a `type`, its name in JSON")
        settings = {}
        for name in self._setting_names():
            if not hasattr(self, name):
                raise ValueError(
                    f"{type(self).__name__} cannot be described: its setting '{name}' is not kept as an attribute"
                )
            value = getattr(self, name)
            if isinstance(value, FrozenModel):
                value = value.to_dict(folder)
            elif name in self.file_settings and value is not None:
                path = Path(value).expanduser()
                value = _copy(path, Path(folder)) if folder is not None and path.exists() else str(value)
            settings[name] = value
        return {"type": self.type, **settings}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any], folder: str | Path | None = None):
        """
        Restores what `to_dict` describes.

        Args:
            description (`dict`): `{"type": …, **settings}`.
            folder (`str` or `Path`, *optional*): where files lie whose paths are relative.
        """
        settings = dict(description)
        kind = settings.pop("type", None)
        if kind not in cls.registry:
            raise ValueError(
                f"type is {kind!r}; known are {', '.join(sorted(cls.registry))}. "
                "A class of your own is known once the module that defines it has been imported"
            )
        subclass = cls.registry[kind]
        accepted = subclass._setting_names()
        unknown = sorted(set(settings) - set(accepted))
        if unknown:
            raise ValueError(f"'{kind}' has no setting {', '.join(unknown)}; it has {', '.join(accepted) or 'none'}")
        for name, family in subclass.part_settings.items():
            if isinstance(settings.get(name), Mapping):
                settings[name] = family.from_dict(settings[name], folder)
        for name in subclass.file_settings:
            if folder is not None and settings.get(name) and (Path(folder) / settings[name]).exists():
                settings[name] = str(Path(folder) / settings[name])
        return subclass(**settings)


class Expert(FrozenModel):
    """
    A frozen expert: from images to one label each.

    An expert of your own is a class with a `name`, a `kind`, the number of its `channels` and a method `run`; with a
    `type` it is saved and restored with its suite, with `load_model` it has weights:

    ```python
    class Saliency(Expert):
        type = "saliency"
        name, kind, channels = "saliency", "dense", 1
        model_id, license, size_in_bytes = "me/saliency", "mit", 4_000_000

        def load_model(self):
            return AutoModel.from_pretrained(self.model_id)

        def run(self, images):
            pixels = torch.stack([to_tensor(image.resize((224, 224))) for image in images]).to(self.device)
            maps = self.model(pixels).mul(255).byte().cpu().numpy()  # (batch, 224, 224)
            return [np.array(Image.fromarray(map).resize(image.size)) for map, image in zip(maps, images)]
    ```

    Attributes:
        name (`str`): the entry of the config that the expert fills: `"edge"`, `"ocr"`, …
        kind (`str`): `"dense"` for maps of values, `"label"` for maps of ids.
        channels (`int`): channels of a dense map, or of the features that a label map is painted with.
        num_classes (`int`, *optional*): of a label map, if its ids are classes or have classes.
        instances (`bool`): whether the ids of a label map are instances, which have classes.
        batch_size (`int`): images that `run` gets at a time.
        seconds, num_images (`float`, `int`): what the expert has run so far, without loading.
    """

    registry: ClassVar[dict[str, type["Expert"]]] = {}

    name: str
    kind: str
    channels: int
    num_classes: int | None = None
    instances: bool = False
    batch_size: int = 8

    seconds: float = 0.0
    num_images: int = 0

    @property
    def description(self) -> dict[str, Any]:
        """The entry for `experts` of `PrismerConfig` and `PrismerImageProcessor`: name, kind, channels, …"""
        description = {"name": self.name, "kind": self.kind, "channels": self.channels}
        if self.num_classes is not None:
            description["num_classes"] = self.num_classes
        if self.instances:
            description["instances"] = True
        return description

    def run(self, images: list[Image.Image]) -> list[Any]:
        """
        Runs one batch; called with the model loaded and in inference mode.

        Args:
            images (`list[PIL.Image.Image]`): RGB, of any sizes, at most `batch_size`.

        Returns:
            A list with one label for each image, at the image's own size (width W, height H), or `None` where the
            expert has nothing to say:

            - dense: uint8 array (H, W) or (H, W, channels);
            - label, ids are classes: uint8 array (H, W), or `{"ids": (H, W)}`;
            - label, ids are instances: `{"ids": (H, W), "classes": [class of instance 0, …]}`;
            - label, ids are words: `{"ids": (H, W), "words": [str, …], "features": float32 (words, channels)}`.

            255 is background in ids.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `run`")

    def __call__(self, images: Sequence[Image.Image]) -> list[Any]:
        """
        Loads the expert if needed and runs it over all images, batch by batch.

        Args:
            images (`Sequence[PIL.Image.Image]`): any number, of any sizes and modes; they are converted to RGB.

        Returns:
            `list`: one label for each image, as [`Expert.run`] gives them.

        Raises:
            ExpertError: naming the expert and the number of the image it failed on.
        """
        if isinstance(images, Image.Image) or not all(isinstance(image, Image.Image) for image in images):
            raise TypeError(f"the expert '{self.name}' takes a list of PIL images")
        self.load()
        labels = []
        start = time.perf_counter()
        for first in range(0, len(images), self.batch_size):
            labels += self._run_batch([*images[first : first + self.batch_size]], first)
        self.seconds += time.perf_counter() - start
        self.num_images += len(images)
        return labels

    def _run_batch(self, images: list[Image.Image], first: int) -> list[Any]:
        try:
            return self._run_and_check(images)
        except Exception as error:
            if len(images) == 1:
                where = f"image {first} ({images[0].width}×{images[0].height}, {images[0].mode})"
                raise ExpertError(
                    f"expert '{self.name}' failed on {where}: {_brief(error)}", self.name, first
                ) from error
            for index, image in enumerate(images):  # raises at the image that is to blame
                self._run_batch([image], first + index)
            where = f"images {first} to {first + len(images) - 1} together, though on none of them alone"
            raise ExpertError(f"expert '{self.name}' failed on {where}: {_brief(error)}", self.name) from error

    @torch.inference_mode()
    def _run_and_check(self, images: list[Image.Image]) -> list[Any]:
        images = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
        if any(0 in image.size for image in images):
            raise ValueError("the image has no pixels")
        labels = self.run(images)
        if len(labels) != len(images):
            raise ValueError(f"run returned {len(labels)} labels for {len(images)} images")
        return [self._check(label, image) for label, image in zip(labels, images)]

    def _check(self, label: Any, image: Image.Image) -> Any:
        """The label as arrays, or an error that says what does not fit the expert's description."""
        if label is None:
            return None
        parts = label if isinstance(label, Mapping) else {"ids" if self.kind == "label" else "values": label}
        what = "ids" if self.kind == "label" else "values"
        if what not in parts:
            raise ValueError(f"a label without '{what}'; it has {', '.join(parts)}")
        array = parts[what].cpu().numpy() if isinstance(parts[what], torch.Tensor) else np.asarray(parts[what])
        size = (image.height, image.width)
        accepted = [size] if self.kind == "label" or self.channels == 1 else []
        accepted += [(*size, self.channels)] if self.kind == "dense" else []
        if array.dtype != np.uint8 or array.shape not in accepted:
            shapes = " or ".join(map(str, accepted))
            raise ValueError(
                f"{what} of type {array.dtype} and shape {array.shape}; needed is uint8 of shape {shapes}"
            )
        if not isinstance(label, Mapping):
            return array
        return {**label, what: array}

    def to_dict(self, folder: str | Path | None = None) -> dict[str, Any]:
        """What [`expert_from_dict`] restores: `{"type": …, "name": …, "batch_size": …, **settings}`."""
        description = super().to_dict(folder)
        return {"type": self.type, "name": self.name, "batch_size": self.batch_size, **description}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any], folder: str | Path | None = None) -> "Expert":
        """See [`FrozenModel.from_dict`]."""
        settings = dict(description)
        subclass = cls.registry.get(settings.get("type"))
        accepted = [] if subclass is None else subclass._setting_names()
        own = {key: settings.pop(key) for key in ("name", "batch_size") if key in settings and key not in accepted}
        expert = super().from_dict(settings, folder)
        for name, value in own.items():
            setattr(expert, name, value)
        return expert


def expert_from_dict(description: Mapping[str, Any], folder: str | Path | None = None) -> Expert:
    """Restores an expert from `expert.to_dict()`; see [`FrozenModel.from_dict`]."""
    return Expert.from_dict(description, folder)


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or of a file that torch saved (read without unpickling objects)."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)


def _copy(path: Path, folder: Path) -> str:
    """Copies a file or folder into `folder`, weights as safetensors; returns its path relative to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        target = folder / path.name
        if target.resolve() != path.resolve():
            shutil.copytree(path, target, dirs_exist_ok=True)
    elif path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        from safetensors.torch import save_file

        target = folder / f"{path.stem}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in read_weights(path).items()}, target)
    else:
        target = folder / path.name
        if target.resolve() != path.resolve():
            shutil.copy2(path, target)
    return target.name


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def size_within(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """The (width, height) of the same shape with at most about `max_pixels` pixels; never enlarged."""
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = (max_pixels / (width * height)) ** 0.5
    return max(1, round(width * scale)), max(1, round(height * scale))
