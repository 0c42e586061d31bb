"""How far a picture is from those that a checkpoint was trained on."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils.hub import cached_file

from .modeling_prismer import PrismerModel


class Familiarity:
    """
    A Gaussian over the images that a checkpoint knows, by which unlike ones are told: Mahalanobis' distance of an
    image's mean patch token, out of the vision encoder ([`image_features`]), as in Lee et al., 2018 (arXiv
    1807.03888), with one class.

    It stays beside the checkpoint, in `familiarity.safetensors`; a checkpoint without it gives no warning.

    Attributes:
        mean (`torch.Tensor` of shape `(width,)`): of the known images' features.
        whitening (`torch.Tensor` of shape `(width, width)`): features times this have unit covariance.
        limit (`float`): an image farther away than this is unlike those of the training.

    Example:

    ```python
    >>> import torch
    >>> from modeling_prismer.familiarity import Familiarity

    >>> known, alike, unlike = torch.randn(1000, 16), torch.randn(100, 16), 5 + torch.randn(1, 16)
    >>> familiarity = Familiarity.fit(known, alike)
    >>> (familiarity.distance(unlike) > familiarity.limit).tolist()
    [True]
    ```
    """

    FILE = "familiarity.safetensors"

    def __init__(self, mean: torch.Tensor, whitening: torch.Tensor, limit: float):
        self.mean, self.whitening, self.limit = mean, whitening, limit

    @classmethod
    def fit(cls, features: torch.Tensor, others: torch.Tensor, share: float = 0.99) -> "Familiarity":
        """
        Args:
            features (`torch.Tensor` of shape `(n, width)`): of images of the training, several times `width` of them.
            others (`torch.Tensor` of shape `(m, width)`): of images that are like them, but new.
            share (`float`, *optional*, defaults to 0.99): of `others`, this share is within the limit.

        Raises:
            ValueError: if there are too few images to tell their covariance.
        """
        number, width = features.shape
        if number <= width:
            raise ValueError(f"{number} images are too few for the covariance of {width} features; give more")
        features = features.double()
        variances, axes = torch.linalg.eigh(torch.cov(features.T))
        variances = variances.clamp(min=1e-4 * variances.mean())  # directions that hardly vary must not decide alone
        known = cls(features.mean(0).float(), (axes * variances.rsqrt()).float().contiguous(), float("inf"))
        known.limit = torch.quantile(known.distance(others), share).item()
        return known

    def distance(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(n, width)` to distances `(n,)`, in standard deviations; `sqrt(width)` is usual."""
        return ((features.float().cpu() - self.mean) @ self.whitening).norm(dim=1)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        path = Path(folder, self.FILE)
        temporary = path.with_suffix(".tmp")
        tensors = {"mean": self.mean, "whitening": self.whitening}
        save_file(tensors, temporary, metadata={"limit": str(self.limit)})
        temporary.replace(path)

    @classmethod
    def from_pretrained(cls, checkpoint: str | os.PathLike) -> "Familiarity | None":
        """
        From a checkpoint, a folder or on the Hub; `None` if it does not say what it knows.

        Raises:
            ValueError: if the file is damaged.
        """
        path = cached_file(
            checkpoint,
            cls.FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is None:
            return None
        try:
            with safe_open(path, "pt") as file:
                return cls(file.get_tensor("mean"), file.get_tensor("whitening"), float(file.metadata()["limit"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged, or not what `Familiarity.save_pretrained` wrote: without this file there is no "
                f"warning ({error})"
            ) from error


def image_features(model: PrismerModel, encoder_outputs: Any) -> torch.Tensor:
    """
    The mean patch token `(images, width)` of what `get_image_features` gave, without the experts' latents.

    Example:

    ```python
    >>> from modeling_prismer.familiarity import image_features

    >>> encoded = model.get_image_features(**processor.process_images(image))
    >>> image_features(model, encoded).shape
    torch.Size([1, 128])
    ```
    """
    grid_size = model.config.vision_config.image_size // model.config.vision_config.patch_size
    return encoder_outputs[0][:, : grid_size**2].float().mean(1)
