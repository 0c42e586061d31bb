"""`ImitationSpec` describes how a network imitates its experts: which ones, and the routed adaptors that do it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from .expert_spec import ExpertSpec


@dataclass(frozen=True)
class ImitationSpec:
    """
    The description of imitated experts. A network with it predicts the tokens of these experts from the image alone,
    and reads its prediction wherever an expert is missing. Configurations save it as plain JSON.

    Args:
        experts (`Sequence[str]`): names of the imitated experts, all among the configured ones.
        layers (`Sequence[int]`):
            The levels of the routed adaptors, in ascending order. In Prismer these are layers of the vision encoder:
            the image runs through the layers up to the last of them once more, with adaptors after these layers. In
            PrismerLM all adaptors follow each other behind the frozen encoders, so that only their number counts.
        num_adaptors (`int`, *optional*, defaults to 8):
            Routed adaptors at each level, in addition to the shared one. 0 for the shared one alone.
        top_k (`int`, *optional*, defaults to 2): routed adaptors that the router chooses for each token.
        adaptor_size (`int`, *optional*): width inside an adaptor, by default a quarter of the tokens' width.
        grid_size (`int`, *optional*): side of the grid of imitated tokens, by default that of the image's patches.
        map_scale (`int`, *optional*, defaults to 4): pixels of a predicted map for each token, on both axes.

    Raises:
        ValueError: naming the field, its value and what is accepted.

    Example:

    ```python
    >>> from modeling_prismer.imitation_spec import ImitationSpec

    >>> ImitationSpec(["depth", "edge"], layers=[2, 5]).to_dict()
    {'experts': ['depth', 'edge'], 'layers': [2, 5], 'num_adaptors': 8, 'top_k': 2, 'map_scale': 4}
    ```
    """

    experts: Sequence[str]
    layers: Sequence[int]
    num_adaptors: int = 8
    top_k: int = 2
    adaptor_size: int | None = None
    grid_size: int | None = None
    map_scale: int = 4

    def __post_init__(self) -> None:
        names, layers = tuple(self.experts), tuple(self.layers)
        if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"imitation has experts={list(names)}; the names of one or more experts are needed")
        if not layers or not all(_is_count(layer, 0) for layer in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"imitation has layers={list(layers)}; ascending numbers of 0 or more are needed")
        if not _is_count(self.num_adaptors, 0):
            raise ValueError(f"imitation has num_adaptors={self.num_adaptors!r}; 0 or more are needed")
        if self.num_adaptors and not (_is_count(self.top_k, 1) and self.top_k <= self.num_adaptors):
            raise ValueError(f"imitation has top_k={self.top_k!r}; 1 to num_adaptors={self.num_adaptors} are accepted")
        for field in ("adaptor_size", "grid_size", "map_scale"):
            value = getattr(self, field)
            if not _is_count(value, 1) and (value is not None or field == "map_scale"):
                raise ValueError(f"imitation has {field}={value!r}; a positive integer is needed")
        object.__setattr__(self, "experts", names)
        object.__setattr__(self, "layers", layers)

    @classmethod
    def from_dict(cls, description: "Mapping[str, Any] | ImitationSpec") -> "ImitationSpec":
        """
        The spec that `to_dict` describes. A spec is returned as it is.

        Raises:
            ValueError: if it is not a description of imitated experts.
        """
        if isinstance(description, ImitationSpec):
            return description
        known = [field.name for field in fields(cls)]
        if not isinstance(description, Mapping) or not {"experts", "layers"} <= set(description):
            raise ValueError(f"imitation is {description!r}; a dict with 'experts' and 'layers' is needed")
        if unknown := sorted(str(field) for field in description if field not in known):
            raise ValueError(f"imitation has unknown fields {unknown}; known: {known}")
        return cls(**description)

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON, without fields that are `None`."""
        description = asdict(self) | {"experts": list(self.experts), "layers": list(self.layers)}
        return {field: value for field, value in description.items() if value is not None}

    def check(self, experts: Sequence[ExpertSpec], num_layers: int | None = None) -> None:
        """
        Raises:
            ValueError: if an imitated expert is not among `experts`, or a layer not among `num_layers` layers.
        """
        names = [spec.name for spec in experts]
        if unknown := [name for name in self.experts if name not in names]:
            raise ValueError(
                f"imitation has the experts {', '.join(unknown)}; the config's experts are: "
                f"{', '.join(names) or 'none'}"
            )
        if num_layers is not None and self.layers[-1] >= num_layers:
            raise ValueError(
                f"imitation has the layer {self.layers[-1]}; the encoder's layers are 0 to {num_layers - 1}"
            )


class ImitationConfigMixin:
    """Gives a configuration with `imitation`, a description or `None`, its spec and the names of the experts in it."""

    if TYPE_CHECKING:
        imitation: Any

    @property
    def imitation_spec(self) -> ImitationSpec | None:
        return None if self.imitation is None else ImitationSpec.from_dict(self.imitation)

    @property
    def imitated_experts(self) -> list[str]:
        """Names of the experts that the network imitates where they are missing."""
        return list(self.imitation_spec.experts) if self.imitation_spec is not None else []

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()  # type: ignore[misc]
        if output.get("imitation", ...) is None:
            del output["imitation"]  # files of networks without imitation stay as they are
        return output


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
