"""`ExpertSpec` describes one expert: its name, the map that it gives to the network, and the names of its tensors."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

BACKGROUND = 255  # the id of every pixel where a label expert found nothing
MAX_IDS = 1 << 15  # a map of ids is of uint8 or int16

# The network takes the tensors `<name of an expert>_<suffix>`.
TENSOR_SUFFIXES = ("values", "ids", "classes", "features", "rows")
# `<name>_ids`, `<name>_values` or `<name>_features` is an input of models in transformers.
_RESERVED_NAMES = (
    *("input", "decoder_input", "position", "decoder_position", "token_type", "mm_token_type", "task", "prompt"),
    *("pixel", "image", "past_key"),
)
_LIBRARY_VALUES = ("pixel", "input", "past", "future", "target", "audio", "video")  # `pixel_values` and the like


@dataclass(frozen=True)
class ExpertSpec:
    """
    The description of one expert. The configuration, the processor and label stores save it as plain JSON,
    [`ExpertSpec.to_dict`].

    Args:
        name (`str`): an identifier such as `"depth"`. The expert's tensors are called `<name>_<suffix>`.
        kind (`str`):
            `"dense"` for a map of values, `"label"` for a map of ids that are painted with features, `"features"` for
            a grid of vectors, such as the last layer of a vision encoder.
        channels (`int`): channels of the map of values, of the features, or of the vectors.
        num_classes (`int`, *optional*):
            Size of the table of class features that is saved with the model. Without it the features come with each
            sample, as for the words of OCR. Label experts only.
        class_names (`Sequence[str]`, *optional*): one name for each class. Label experts only.
        instances (`bool`, *optional*, defaults to `False`):
            Whether the ids count instances, whose classes come with the sample, as for a detector. Label experts only.

    Raises:
        ValueError: naming the expert, the field that is wrong, and the accepted values.

    Example:

    ```python
    >>> from modeling_prismer import ExpertSpec

    >>> spec = ExpertSpec("segmentation", "label", channels=64, num_classes=133)
    >>> spec.tensor_names
    ('segmentation_ids',)
    >>> spec.to_dict()
    {'name': 'segmentation', 'kind': 'label', 'channels': 64, 'num_classes': 133}
    ```
    """

    name: str
    kind: str
    channels: int
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    instances: bool = False

    def __post_init__(self) -> None:
        check_expert_name(self.name)
        start = f"expert '{self.name}' has"
        if self.kind not in ("dense", "label", "features"):
            raise ValueError(f"{start} the kind {self.kind!r}; accepted are 'dense', 'label' and 'features'")
        if not _is_count(self.channels):
            raise ValueError(f"{start} channels={self.channels!r}; a positive integer is needed")
        if self.num_classes is not None and not _is_count(self.num_classes):
            raise ValueError(f"{start} num_classes={self.num_classes!r}; a positive integer or None is needed")
        if self.instances not in (None, True, False):
            raise ValueError(f"{start} instances={self.instances!r}; True or False is needed")
        if self.kind != "label" and (self.instances or (self.num_classes, self.class_names) != (None, None)):
            raise ValueError(
                f"expert '{self.name}' is of the kind '{self.kind}': 'num_classes', 'class_names' and 'instances' "
                "belong to the kind 'label'"
            )
        object.__setattr__(self, "instances", bool(self.instances))
        object.__setattr__(self, "class_names", _check_class_names(self.name, self.class_names))
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{start} {len(self.class_names)} class_names; num_classes={self.num_classes} needs as many"
            )

    # ---- plain JSON ----

    @classmethod
    def from_dict(cls, description: "Mapping[str, Any] | ExpertSpec") -> "ExpertSpec":
        """
        The spec that [`ExpertSpec.to_dict`] describes. A spec is returned as it is.

        Raises:
            ValueError: if it is not a description of an expert.
        """
        if isinstance(description, ExpertSpec):
            return description
        if not isinstance(description, Mapping):
            raise ValueError(f"experts has the entry {description!r}; a dict such as {_EXAMPLE} is needed")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(field) for field in description if field not in known):
            raise ValueError(
                f"expert {description.get('name')!r} has unknown fields {unknown}; known: {sorted(known)}"
            )
        values: dict[str, Any] = {field: description.get(field) for field in known}
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON, without the fields that have their default."""
        description = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.class_names is not None:
            description["class_names"] = list(self.class_names)
        return {field: value for field, value in description.items() if value is not None and value is not False}

    # ---- kind and tensors ----

    @property
    def is_dense(self) -> bool:
        """Whether its map has values: a dense map, or a grid of vectors."""
        return self.kind in ("dense", "features")

    @property
    def is_features(self) -> bool:
        return self.kind == "features"

    @property
    def is_label(self) -> bool:
        return self.kind == "label"

    @property
    def label_parts(self) -> tuple[str, ...]:
        """
        The parts of a label beside its map: none, `("classes",)` of instances, `("words", "features")`, or `("low",
        "high")` of a grid of vectors.
        """
        if self.is_features:
            return ("low", "high")
        if self.is_label and self.num_classes is None:
            return ("words", "features")
        return ("classes",) if self.instances else ()

    @property
    def tensor_suffixes(self) -> tuple[str, ...]:
        """
        Suffixes of the tensors that the processor makes: `("values",)`, `("ids",)` if the ids are classes,
        `("ids", "classes")` or `("ids", "features")`.
        """
        if self.is_dense:
            return ("values",)
        return ("ids", *(part for part in self.label_parts if part != "words"))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors that the processor makes, such as `("detection_ids", "detection_classes")`."""
        return tuple(f"{self.name}_{suffix}" for suffix in self.tensor_suffixes)

    def owns(self, key: str) -> bool:
        """Whether the network takes the tensor `key` for one of this expert."""
        return is_expert_input(key, [self.name])

    # ---- comparison and change ----

    def difference(self, other: "ExpertSpec") -> str | None:
        """The first field that differs in `other`, `None` if there is none. Names of classes are not compared."""
        compared = ("name", "kind", "channels", "num_classes", "instances")
        return next((field for field in compared if getattr(self, field) != getattr(other, field)), None)

    def with_classes(self, num_rows: int, class_names: Sequence[str] | None = None) -> "ExpertSpec":
        """
        The spec that fits a new table of class features. A table that cannot be meant for the expert's classes is
        refused, unless `class_names` says which classes these are.

        Args:
            num_rows (`int`): rows of the table, one for each class. With 0 the features come with each sample.
            class_names (`Sequence[str]`, *optional*): names of the classes. By default the classes stay the same.

        Raises:
            ValueError: naming the expert, its classes and what is needed.
        """
        name, num_classes = self.name, self.num_classes or 0
        remedy = "Give one row for each class; if these are other classes, give their class_names too"
        class_names = _check_class_names(name, class_names)
        if class_names is not None and len(class_names) != num_rows:
            raise ValueError(f"{len(class_names)} class_names for the {num_rows} rows of features for '{name}'")
        if num_rows and class_names is None:
            if num_rows < num_classes:
                raise ValueError(
                    f"{num_rows} rows of features for '{name}', whose ids go up to {num_classes - 1} "
                    f"(num_classes={num_classes}): an id without a row is background. {remedy}"
                )
            if self.class_names and num_rows != num_classes:
                raise ValueError(
                    f"{num_rows} rows of features for the {num_classes} class_names of '{name}'. {remedy}"
                )
            if 0 < num_classes < num_rows:
                logger.warning(
                    f"{num_rows} rows of features for '{name}', which has num_classes={num_classes}: num_classes is "
                    f"{num_rows} from now on."
                )
            class_names = self.class_names
        return replace(self, num_classes=num_rows or None, class_names=class_names or None)


def read_specs(experts: "Iterable[Mapping[str, Any] | ExpertSpec]") -> list[ExpertSpec]:
    """
    The specs of a list of descriptions, such as `config.experts`.

    Raises:
        ValueError: if it is not a list, if an entry is not a description, or if two have the same name.
    """
    if not isinstance(experts, list | tuple):
        raise ValueError(
            f"experts is a {type(experts).__name__}; a list of descriptions is needed, one dict for each expert"
        )
    specs = [ExpertSpec.from_dict(description) for description in experts]
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"expert '{name}' is described twice")
    return specs


class ExpertsConfigMixin:
    """Gives a configuration with `experts`, a list of descriptions, their specs, names and class names."""

    if TYPE_CHECKING:
        experts: Any

    @property
    def expert_specs(self) -> list[ExpertSpec]:
        """The entries of `experts` as [`ExpertSpec`]. To change one, set `experts`, a list of dicts."""
        return read_specs(self.experts)

    @property
    def expert_names(self) -> list[str]:
        return [expert["name"] for expert in self.experts]

    @property
    def class_names(self) -> dict[str, list[str]]:
        """The names of each expert's classes, for the experts whose class names are known."""
        return {spec.name: list(spec.class_names) for spec in self.expert_specs if spec.class_names}


def check_expert_name(name: Any) -> str:
    """Returns the name of an expert; raises a `ValueError` if no expert can have it."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the name of an expert is {name!r}; a name is an identifier such as 'depth'")
    if name in _RESERVED_NAMES:
        raise ValueError(
            f"an expert cannot be named {name!r}: its tensors would be taken for another input of the network"
        )
    if name in _module_dict_attributes():
        raise ValueError(f"an expert cannot be named {name!r}: torch's ModuleDict has an attribute of that name")
    return name


@cache
def _module_dict_attributes() -> frozenset[str]:
    from torch import nn

    return frozenset(dir(nn.ModuleDict()))


def _check_class_names(name: str, class_names: Any) -> tuple[str, ...] | None:
    if class_names is None:
        return None
    if not isinstance(class_names, list | tuple) or not all(isinstance(text, str) for text in class_names):
        raise ValueError(f"expert '{name}' has class_names={class_names!r}; a list of strings is needed")
    return tuple(class_names)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_expert_input(key: str, experts: Sequence[str]) -> bool:
    """Whether `key` names a tensor of one of the experts with these names: `<name>_<suffix>`."""
    name, _, suffix = key.rpartition("_")
    return name in experts and suffix in TENSOR_SUFFIXES


def seems_expert_input(key: str, experts: Sequence[str]) -> bool:
    """
    Whether `key` was meant for an expert that the configuration lacks: a published one, a misspelt one, or a name
    with a suffix that only experts use. Other inputs of models in transformers pass.
    """
    name, _, suffix = key.rpartition("_")
    if not name or suffix not in TENSOR_SUFFIXES or name in experts or name in _RESERVED_NAMES:
        return False
    if suffix == "values":
        return name.rpartition("_")[2] not in _LIBRARY_VALUES
    published = [spec.name for spec in PUBLISHED_EXPERTS]
    return (
        suffix in ("classes", "rows")
        or name in published
        or bool(difflib.get_close_matches(name, [*experts, *published], n=1, cutoff=0.8))
    )


# The experts of the paper (arXiv 2303.02506, section 3.2). The class counts are those of the published feature tables
# (COCO panoptic, and the label space of the detector).
PUBLISHED_EXPERTS = (
    ExpertSpec("depth", "dense", channels=1),
    ExpertSpec("normal", "dense", channels=3),
    ExpertSpec("segmentation", "label", channels=64, num_classes=133),
    ExpertSpec("edge", "dense", channels=1),
    ExpertSpec("detection", "label", channels=64, num_classes=722, instances=True),
    ExpertSpec("ocr", "label", channels=64),
)
_EXAMPLE = PUBLISHED_EXPERTS[0].to_dict()
