"""The base class of all experts: frozen models with settings that turn images into maps."""

import builtins
import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ...expert_spec import ExpertSpec, check_expert_name
from ..expert_labels import ids_of_8_bits, label_parts, read_experts, read_vectors
from .look import ExpertLook
from .saved_files import copy_into, find_saved, require_hub_id, require_inside


if TYPE_CHECKING:
    from typing import Self

MAX_REGIONS = 254  # ids 0 to 253: words or instances of one image


class ExpertError(RuntimeError):
    """
    An expert failed. `expert` is its name, and `image_index` the number of the image in the call, or `None`.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import ExpertError, NormalsFromDepth

    >>> try:
    ...     NormalsFromDepth()([image])
    ... except ExpertError as error:
    ...     print(error.expert, error.image_index)
    normal None
    ```
    """

    def __init__(self, message: str, expert: str | None = None, image_index: int | None = None):
        super().__init__(message)
        self.expert = expert
        self.image_index = image_index


class FrozenModel:
    """
    A frozen model with settings: the common base of [`Expert`] and [`WordFeatures`].

    A subclass has a `type`, its name in JSON, keeps every argument of its constructor as an attribute of the same
    name, and loads its weights in `load_model`. The model is loaded on first use, in evaluation mode and without
    gradients. Copies and pickles carry the settings, never the loaded model.

    Attributes:
        type (`str`): the name that restores the class from a description.
        model_id (`str`, *optional*): Hub id or package of the weights; `None` if there are none.
        license (`str`): licence of the weights.
        size_in_bytes (`int`): size of the weights.
        source (`str`): where code and weights come from.
    """

    type: ClassVar[str]
    registry: ClassVar[dict[str, Any]]  # class by its `type`; each family of models has its own
    # settings that may be the path of a file or folder, and settings that are themselves frozen models
    file_settings: ClassVar[tuple[str, ...]] = ()
    part_settings: ClassVar[dict[str, builtins.type["FrozenModel"]]] = {}
    # whether the model runs in half precision on CUDA, and in single precision elsewhere, unless a dtype is set
    half_on_cuda: ClassVar[bool] = False

    model_id: str | None = None
    license: str = "not stated"
    size_in_bytes: int = 0
    source: str = ""

    model: Any = None
    is_loaded: bool = False
    loading_seconds: float = 0.0
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None

    # of a model that was restored from a checkpoint: its folder, and its values of `file_settings`
    _checkpoint: Path | None = None
    _saved_files: Mapping[str, str] = {}
    _saved_hub_ids: Mapping[str, str] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "type" not in vars(cls):
            return
        known = cls.registry.get(cls.type)
        # a notebook cell or a module may run twice and define its class again
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the type '{cls.type}' of {cls.__qualname__} is already that of {known.__qualname__}")
        cls.registry[cls.type] = cls

    @property
    def running_dtype(self) -> torch.dtype | None:
        """The precision of the model's weights, as set by `to`. `None` leaves them unchanged."""
        if self.dtype is None and self.half_on_cuda:
            return torch.float16 if self.device.type == "cuda" else torch.float32
        return self.dtype

    def load_model(self) -> Any:
        """Loads and returns the model, or `None` if there is none. A `torch.nn.Module` is then frozen and moved."""
        return None

    def place_model(self) -> None:
        """Moves the loaded model to `device` and `running_dtype`."""
        self.model.to(device=self.device, dtype=self.running_dtype)

    def load(self) -> None:
        """Loads the model, unless it is loaded already."""
        if self.is_loaded:
            return
        self.check_hub_ids()
        start = time.perf_counter()
        self.model = self.load_model()
        if isinstance(self.model, torch.nn.Module):
            self.model.eval().requires_grad_(False)
            self.place_model()
        self.is_loaded = True
        self.loading_seconds += time.perf_counter() - start

    def check_hub_ids(self) -> None:
        """Raises a `ValueError` if a Hub id from a checkpoint is also the path of a local file or folder."""
        for name, value in self._saved_hub_ids.items():
            if getattr(self, name) == value:  # unless it has been set since
                require_hub_id(value, self._name_of(name))

    def unload(self) -> None:
        """Frees the model. The next use loads it again."""
        self.model = None
        self.is_loaded = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def to(self, device: str | torch.device | int | None = None, dtype: torch.dtype | str | None = None) -> "Self":
        """Moves the model, now or when it is loaded. Returns itself."""
        if device is not None:
            self.device = torch.device(device)
        if dtype is not None:
            self.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if isinstance(self.model, torch.nn.Module):
            self.place_model()
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

    @classmethod
    def _name_of(cls, setting: str) -> str:
        return f"{setting} of the saved '{getattr(cls, 'type', cls.__name__)}'"

    @classmethod
    def check_saved(cls, settings: Mapping[str, Any]) -> None:
        """
        Raises a `ValueError` for settings that only a user's own code may have. A checkpoint may come from a stranger,
        so its description may not have them. The paths in `file_settings` are checked elsewhere.
        """

    def to_dict(self, folder: str | Path | None = None) -> dict[str, Any]:
        """
        The description that `from_dict` restores: `{"type": …, **settings}`, plain JSON.

        Args:
            folder (`str` or `Path`, *optional*):
                Copy the files that settings point to into this folder (weights as safetensors), and write their paths
                relative to it. Only files that your own code has set, or that belong to the checkpoint of the model,
                are copied.
        """
        return self._describe(folder, {})

    def _describe(self, folder: str | Path | None, copies: dict[str, Path]) -> dict[str, Any]:
        """`copies` maps the names of the files that are already in the folder to their sources."""
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
                value = value._describe(folder, copies)
            elif name in self.file_settings and value is not None:
                value = str(value)
                if folder is not None and value != self._saved_hub_ids.get(name):
                    path = Path(value).expanduser()
                    if self._checkpoint is not None and value == self._saved_files.get(name):
                        require_inside(path, self._checkpoint, self._name_of(name))
                    value = _copy(path, Path(folder), copies) if path.exists() else value
            settings[name] = value
        return {"type": self.type, **settings}

    @classmethod
    def from_dict(
        cls, description: Mapping[str, Any], folder: str | Path | None = None, checkpoint: str | Path | None = None
    ) -> Any:
        """
        Restores a model from the description that `to_dict` returns.

        Args:
            description (`dict`): `{"type": …, **settings}`.
            folder (`str` or `Path`, *optional*):
                The folder of the files that the description names. The description then counts as part of a
                checkpoint, which may come from a stranger: it may only name files inside the checkpoint and ids of
                models on the Hub. Without a folder, the description is your own and may name any path.
            checkpoint (`str` or `Path`, *optional*, defaults to `folder`): the folder of the whole checkpoint.

        Raises:
            ValueError: if the type or a setting is unknown, or if the description names a file that it may not name.
        """
        if not isinstance(description, Mapping):
            raise ValueError(f"a description is {{'type': …, …}}, not a {type(description).__name__}: {description!r}")
        settings = dict(description)
        kind = settings.pop("type", None)
        if not isinstance(kind, str) or kind not in cls.registry:
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
                settings[name] = family.from_dict(settings[name], folder, checkpoint)
        if folder is None:
            return subclass(**settings)

        subclass.check_saved(settings)
        root = Path(folder if checkpoint is None else checkpoint)
        files, hub_ids = {}, {}
        for name in subclass.file_settings:
            if settings.get(name) is not None:
                path = find_saved(settings[name], Path(folder), root, subclass._name_of(name))
                if path is None:
                    hub_ids[name] = settings[name]
                else:
                    settings[name] = files[name] = str(path)
        model = subclass(**settings)
        model._checkpoint, model._saved_files, model._saved_hub_ids = root, files, hub_ids
        return model


class Expert(FrozenModel):
    """
    A frozen expert. It returns one label for each image.

    An expert of your own is a class with a `name`, a `kind`, the number of its `channels` and a method `run`. Give it
    a `type`, so that it is saved and restored with its suite. If it has weights, its method `load_model` returns the
    model, which is then frozen, moved to `self.device` and available as `self.model`; the class states `model_id`,
    `license` and `size_in_bytes`.

    Attributes:
        name (`str`): the name of the expert in the config: `"edge"`, `"ocr"`, …
        kind (`str`): `"dense"` for maps of values, `"label"` for maps of ids, `"features"` for grids of vectors.
        channels (`int`): channels of a dense map, or of the features that a label map is painted with.
        num_classes (`int`, *optional*): number of classes of a label map whose ids are classes or instances.
        instances (`bool`): whether the ids of a label map are instances, each with a class.
        look ([`ExpertLook`], *optional*): title, colours and legend of drawings; by default the title is the name.
        batch_size (`int`): the most images in one call of `run`.
        needs (`tuple[str, ...]`):
            Names of experts whose labels `run` takes as keyword arguments. With `needs = ("depth",)` it is called as
            `run(images, depth)`, where `depth` has one label, or `None`, for each image. A suite runs those first.
        uses (`tuple[str, ...]`): as `needs`, but the argument is left out if the suite has no such expert.
        seconds, num_images (`float`, `int`): the running time so far, without loading, and the number of images.
        peak_memory (`int`, *optional*): the largest memory use so far in bytes; see [`ExpertSuite.report`].

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.experts import Expert, ExpertSuite

    >>> class ThermalCamera(Expert):
    ...     name, kind, channels = "thermal", "dense", 1
    ...
    ...     def run(self, images):  # one 8-bit map for each image, at the image's own size
    ...         return [np.asarray(image.convert("L")) for image in images]

    >>> suite = ExpertSuite([*ExpertSuite.from_name("offline").values(), ThermalCamera()])
    >>> suite([image])[0]["thermal"].shape
    (64, 64)
    >>> stem = model.add_expert(**ThermalCamera().description)  # to be trained
    ```
    """

    registry: ClassVar[dict[str, Any]] = {}
    by_name: ClassVar[dict[str, builtins.type["Expert"]]] = {}  # the class that defines the `look` of a name

    name: str
    kind: str
    if TYPE_CHECKING:  # a class may have these as attributes or as properties

        @property
        def channels(self) -> int: ...

        @property
        def num_classes(self) -> int | None: ...

    else:
        channels: int
        num_classes: int | None = None
    instances: bool = False
    look: ExpertLook | None = None
    batch_size: int = 8
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()

    seconds: float = 0.0
    num_images: int = 0
    peak_memory: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "look" in vars(cls):
            Expert.by_name[cls.name] = cls

    @property
    def spec(self) -> ExpertSpec:
        """The expert's [`ExpertSpec`], without names of classes."""
        return ExpertSpec(self.name, self.kind, self.channels, self.num_classes, instances=self.instances)

    @property
    def description(self) -> dict[str, Any]:
        """The entry for `experts` of `PrismerConfig` and `PrismerImageProcessor`: `spec` as a dict."""
        return self.spec.to_dict()

    def load(self) -> None:
        """
        Loads the model, unless it is loaded already.

        Raises:
            OSError: naming the expert and its model, if a file is missing or cannot be fetched.
        """
        try:
            super().load()
        except OSError as error:
            model_id = "" if self.model_id is None else f" {self.model_id}"
            raise OSError(f"the expert '{self.name}' cannot load its model{model_id}: {error}") from error

    def run(self, images: list[Image.Image], *_: Any, **others: Any) -> list[Any]:
        """
        Runs one batch. The model is loaded and inference mode is on. An expert without `needs` and `uses` takes
        only `images`.

        Args:
            images (`list[PIL.Image.Image]`): RGB, of any sizes, at most `batch_size`.
            others (`list`): for each name in `needs` and `uses` a list with one label, or `None`, for each image.

        Returns:
            A list with one label for each image, at the image's own size (width W, height H), or `None` for an image
            without a label:

            - dense: uint8 array (H, W) or (H, W, channels);
            - features: `{"values": (h, w, channels) uint8, "low": (groups,), "high": (groups,)}`, of any grid;
            - label, ids are classes: array (H, W) of integers, or `{"ids": (H, W)}`;
            - label, ids are instances: `{"ids": (H, W), "classes": [class of instance 0, …]}`;
            - label, ids are words: `{"ids": (H, W), "words": [str, …], "features": float32 (words, channels)}`.

            255 and negative ids are background.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `run`")

    def __call__(self, images: Sequence[Image.Image], **others: Sequence[Any]) -> list[Any]:
        """
        Loads the expert if needed and runs it over all images, batch by batch.

        Args:
            images (`Sequence[PIL.Image.Image]`): any number, of any sizes and modes; they are converted to RGB.
            others (`Sequence`): by name, the labels of the experts that this one `needs` or `uses`.

        Returns:
            `list`: one label for each image, as [`Expert.run`] returns them.

        Raises:
            ExpertError: naming the expert and the number of the image on which it failed.
        """
        if isinstance(images, Image.Image) or not all(isinstance(image, Image.Image) for image in images):
            raise TypeError(f"the expert '{self.name}' takes a list of PIL images")
        self._check_others(others, len(images))
        with _MemoryMeter(self):
            self.load()
            labels = []
            start = time.perf_counter()
            for first in range(0, len(images), self.batch_size):
                batch = slice(first, first + self.batch_size)
                own = {name: [*values[batch]] for name, values in others.items()}
                labels += self._run_batch([*images[batch]], first, own)
            self.seconds += time.perf_counter() - start
        self.num_images += len(images)
        return labels

    def _check_others(self, others: Mapping[str, Sequence[Any]], num_images: int) -> None:
        lacking = [name for name in self.needs if name not in others]
        if lacking:
            names = ", ".join(lacking)
            raise ExpertError(
                f"the expert '{self.name}' needs the labels of {names}: run it in a suite with such an expert, or "
                f"give them, {self.name}(images, {lacking[0]}=[…])",
                self.name,
            )
        for name, values in others.items():
            if name not in (*self.needs, *self.uses):
                accepted = ", ".join((*self.needs, *self.uses)) or "none"
                raise TypeError(f"the expert '{self.name}' takes no labels of '{name}'; it takes those of {accepted}")
            if len(values) != num_images:
                raise ValueError(f"{len(values)} labels of '{name}' for {num_images} images")

    def _run_batch(self, images: list[Image.Image], first: int, others: Mapping[str, list[Any]]) -> list[Any]:
        try:
            return self._run_and_check(images, others)
        except Exception as error:
            if len(images) == 1:
                where = f"image {first} ({images[0].width}×{images[0].height}, {images[0].mode})"
                raise ExpertError(
                    f"expert '{self.name}' failed on {where}: {_brief(error)}", self.name, first
                ) from error
            for index, image in enumerate(images):  # raises at the image that fails
                self._run_batch([image], first + index, {name: [own[index]] for name, own in others.items()})
            where = f"images {first} to {first + len(images) - 1} together, though on none of them alone"
            raise ExpertError(f"expert '{self.name}' failed on {where}: {_brief(error)}", self.name) from error

    @torch.inference_mode()
    def _run_and_check(self, images: list[Image.Image], others: Mapping[str, list[Any]]) -> list[Any]:
        images = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
        if any(0 in image.size for image in images):
            raise ValueError("the image has no pixels")
        labels = self.run(images, **others)
        if len(labels) != len(images):
            raise ValueError(f"run returned {len(labels)} labels for {len(images)} images")
        return [self._check(label, image) for label, image in zip(labels, images)]

    def _check(self, label: Any, image: Image.Image) -> Any:
        """The label as arrays, or an error that says what does not fit the expert's description."""
        if label is None:
            return None
        if self.kind == "features":
            (fields,) = read_experts([self.description])
            read_vectors(label, fields)
            return dict(label)
        is_dense, size = self.kind == "dense", (image.height, image.width)
        parts = label_parts(label, is_dense)
        part = "values" if is_dense else "ids"
        if part not in parts:
            raise ValueError(f"a label without '{part}'; it has {', '.join(parts)}")
        array = parts[part].cpu().numpy() if isinstance(parts[part], torch.Tensor) else np.asarray(parts[part])
        accepted: list[tuple[int, ...]] = [(*size, self.channels)] if is_dense else [size]
        if is_dense and self.channels == 1:
            accepted.insert(0, size)
        if not is_dense:
            array = ids_of_8_bits(array, "a label")
        if array.dtype != np.uint8 or array.shape not in accepted:
            shapes = " or ".join(map(str, accepted))
            raise ValueError(
                f"{part} of type {array.dtype} and shape {array.shape}; needed is uint8 of shape {shapes}"
            )
        return {**parts, part: array} if isinstance(label, Mapping) else array

    def _describe(self, folder: str | Path | None, copies: dict[str, Path]) -> dict[str, Any]:
        description = super()._describe(folder, copies)
        return {"type": self.type, "name": self.name, "batch_size": self.batch_size, **description}

    @classmethod
    def from_dict(
        cls, description: Mapping[str, Any], folder: str | Path | None = None, checkpoint: str | Path | None = None
    ) -> "Expert":
        """See [`FrozenModel.from_dict`]."""
        if not isinstance(description, Mapping):
            return super().from_dict(description)
        settings = dict(description)
        subclass = cls.registry.get(str(settings.get("type")))
        accepted = [] if subclass is None else subclass._setting_names()
        own = {key: settings.pop(key) for key in ("name", "batch_size") if key in settings and key not in accepted}
        if "name" in own:
            check_expert_name(own["name"])
        batch_size = own.get("batch_size", 1)
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size of the saved expert is {batch_size!r}; a whole number from 1 on is needed")
        expert = super().from_dict(settings, folder, checkpoint)
        for name, value in own.items():
            setattr(expert, name, value)
        return expert


class _MemoryMeter:
    """
    Sets an expert's `peak_memory` to its largest memory use while it was loaded and run. On CUDA that is the memory
    that torch allocated, including the expert's weights. On a CPU it is the growth of the process's peak of resident
    memory, which is 0 if something before needed more.
    """

    def __init__(self, expert: Expert):
        self.expert = expert
        self.cuda = expert.device.type == "cuda" and torch.cuda.is_available()

    def __enter__(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.expert.device)
            self.before = torch.cuda.memory_allocated(self.expert.device)
            if isinstance(self.expert.model, torch.nn.Module):
                self.before -= sum(p.nbytes for p in self.expert.model.parameters() if p.is_cuda)
        else:
            self.before = _peak_of_process()

    def __exit__(self, *exception: Any) -> None:
        peak = torch.cuda.max_memory_allocated(self.expert.device) if self.cuda else _peak_of_process()
        if peak is not None:
            self.expert.peak_memory = max(self.expert.peak_memory or 0, peak - self.before)


def _peak_of_process() -> int | None:
    """The process's peak of resident memory in bytes; `None` if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def expert_from_dict(
    description: Mapping[str, Any], folder: str | Path | None = None, checkpoint: str | Path | None = None
) -> Expert:
    """
    Restores an expert from `expert.to_dict()`; see [`FrozenModel.from_dict`].

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import CannyEdges, expert_from_dict

    >>> expert_from_dict(CannyEdges(sigma=2.0).to_dict()).sigma
    2.0
    ```
    """
    return Expert.from_dict(description, folder, checkpoint)


def look_of(name: str) -> ExpertLook:
    """
    The [`ExpertLook`] of the experts with a name. If no class of experts defines it, the title is the name.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import look_of

    >>> look_of("normal").title, look_of("my_camera").title
    ('Surface normals', 'My camera')
    ```
    """
    known = Expert.by_name.get(name)
    return ExpertLook(name.replace("_", " ").capitalize()) if known is None or known.look is None else known.look


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Reads a safetensors file, or a file that torch saved, without unpickling objects. The weights may be an entry
    `"state_dict"` or `"model"`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything but tensors with names.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    for entry in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(entry), Mapping):
            weights = weights[entry]
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path} holds a {type(weights).__name__}; weights, a dict from name to tensor, are needed")
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: '{name}' is a {type(value).__name__}; a tensor is needed")
    return dict(weights)


def load_network(
    make: Callable[[], torch.nn.Module], weights: Mapping[str, torch.Tensor], file: str, name: str
) -> Any:
    """
    A network with the weights of a file. It is made without allocating or initialising weights, which takes longer
    than reading the file.

    Args:
        make (`Callable`): makes the network.
        weights (`dict[str, torch.Tensor]`): all of its weights.
        file, name (`str`): the file, and what it should hold, for the error message.

    Raises:
        ValueError: if the weights are not those of the network.
    """
    with torch.device("meta"):
        model = make()
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not hold the weights of {name}: {error}") from error
    return model


def hub_file(model_id: str, filename: str, remedy: str) -> str:
    """
    The path of a file of weights in the Hub's cache, where it is downloaded to if needed.

    Args:
        model_id (`str`): the repository.
        filename (`str`): the file in it.
        remedy (`str`): what to do if the file is not there, for the error message.

    Raises:
        OSError: if the file is not in the cache and the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download, is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return hf_hub_download(model_id, filename)
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
        raise OSError(f"{filename} of {model_id} is not in the Hub's cache and {reason}. {remedy}") from error


def _copy(path: Path, folder: Path, copies: dict[str, Path]) -> str:
    """Copies a file or folder into `folder`, weights as safetensors; returns its path relative to `folder`."""
    convert = None
    if path.is_file() and path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        convert, name = _as_safetensors, f"{path.stem}.safetensors"
    else:
        name = path.resolve().name if path.name in ("", "..") else path.name
    while copies.get(name, path) != path:  # two models may have files of one name
        name = f"other_{name}"
    copies[name] = path
    copy_into(path, folder, name, convert)
    return name


def _as_safetensors(path: Path, target: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in read_weights(path).items()}, target)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def size_within(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """The (width, height) of the same aspect ratio with at most about `max_pixels` pixels. It never grows."""
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = (max_pixels / (width * height)) ** 0.5
    return max(1, round(width * scale)), max(1, round(height * scale))
