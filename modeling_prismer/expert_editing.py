"""Changes to the experts of a model that exists: a new expert, or other class features."""

from typing import TYPE_CHECKING, Any

import torch

from .expert_spec import ExpertSpec
from .expert_stems import PrismerExpertStem, PrismerResampler, require_kind


if TYPE_CHECKING:
    from typing import Self


class ExpertEditingMixin:
    """Gives a model with experts `add_expert` and `set_class_features`."""

    if TYPE_CHECKING:
        config: Any
        training: bool
        _init_weights: Any

    @property
    def expert_network(self) -> Any:
        """The module with `expert_stems` and `resampler`; see [`ExpertsMixin`]."""
        raise NotImplementedError

    def _stem(self, name: str) -> PrismerExpertStem:
        if name not in self.config.expert_names:
            raise ValueError(f"no expert '{name}'; the config has {', '.join(self.config.expert_names) or 'none'}")
        return self.expert_network.expert_stems[name]

    @torch.no_grad()
    def set_class_features(
        self,
        name: str,
        features: torch.Tensor,
        background: torch.Tensor | None = None,
        class_names: list[str] | None = None,
    ) -> "Self":
        """
        Sets the features that stand for the classes of a label expert. They are saved with the model.

        Args:
            name (`str`): the expert.
            features (`torch.FloatTensor` of shape `(num_classes, channels)`): one row for each class; no rows
                if the features come with each sample.
            background (`torch.FloatTensor` of shape `(channels,)`, *optional*): by default it stays as it is.
            class_names (`list[str]`, *optional*): the names of the classes, saved in the configuration. By default the
                classes stay the same.

        Raises:
            ValueError: if the features are not finite numbers in the expert's channels, or cannot be those of its
                classes: fewer rows than `num_classes`, or not as many as it has `class_names`.

        Example:

        ```python
        >>> import torch

        >>> stem = model.add_expert("segmentation", "label", channels=64, num_classes=3)
        >>> model = model.set_class_features("segmentation", torch.randn(3, 64), class_names=["sky", "tree", "road"])
        >>> model.config.class_names
        {'segmentation': ['sky', 'tree', 'road']}
        ```
        """
        stem = self._stem(name)
        features = torch.as_tensor(features)
        background = None if background is None else torch.as_tensor(background)
        if not hasattr(stem, "class_features") or features.ndim != 2 or features.shape[1] != stem.channels:
            raise ValueError(
                f"expert '{name}' ({'label' if hasattr(stem, 'class_features') else 'dense'}, {stem.channels} "
                f"channels) cannot take features of the shape {tuple(features.shape)}; a label expert takes "
                "(num_classes, channels)"
            )
        old = stem.class_features
        if background is not None and tuple(background.shape) not in ((stem.channels,), (1, stem.channels)):
            raise ValueError(
                f"expert '{name}' cannot take a background of the shape {tuple(background.shape)}; ({stem.channels},) "
                "is needed"
            )
        for what, tensor in {"features": features, "background": background}.items():
            if tensor is not None:
                require_kind(tensor, f"{what} of '{name}'", is_float=True)
                if not torch.isfinite(tensor.to(old.dtype)).all():
                    raise ValueError(f"{what} of '{name}' has numbers that are not finite in {old.dtype}")
        if name in self.config.imitated_experts and len(features) != len(old) - 1:
            raise ValueError(
                f"{len(features)} rows of features for '{name}', whose imitation predicts {len(old) - 1} classes; set "
                "the features before `add_imitation`"
            )
        index = self.config.expert_names.index(name)
        spec = self.config.expert_specs[index].with_classes(len(features), class_names)
        self.config.experts[index] = spec.to_dict()
        background = old[-1:] if background is None else background.to(old).view(1, stem.channels)
        stem.class_features = torch.cat([features.to(old), background])
        return self

    def add_expert(
        self,
        name: str,
        kind: str,
        channels: int,
        num_classes: int | None = None,
        instances: bool = False,
        class_names: list[str] | None = None,
    ) -> PrismerExpertStem:
        """
        Adds an expert to a model. The arguments are those of [`ExpertSpec`]. Returns the new stem. It is not trained
        yet: predictions do not improve until you train it, alone or with the rest.

        Example:

        ```python
        >>> stem = model.add_expert("depth", "dense", channels=1)
        >>> model.config.expert_names
        ['edge', 'ocr', 'depth']
        ```
        """
        spec = ExpertSpec(name, kind, channels, num_classes, class_names, instances)
        self.config.experts = [*self.config.experts, spec.to_dict()]
        network = self.expert_network
        stem = PrismerExpertStem(network.config, spec)
        new = [stem]
        if network.resampler is None:
            network.resampler = PrismerResampler(network.config)
            new.append(network.resampler)
        example = next(network.parameters())
        for module in new:
            module.apply(getattr(network, "_init_weights", self._init_weights))
            module.to(device=example.device, dtype=example.dtype).train(self.training)
        network.expert_stems[name] = stem
        return stem
