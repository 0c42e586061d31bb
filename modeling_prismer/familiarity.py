"""Measures how far an image is from the training images of a checkpoint."""

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
    A Gaussian over the training images of a checkpoint, to detect unfamiliar images. The distance of an image is the
    Mahalanobis distance of its mean patch token after the vision encoder ([`image_features`]), as in Lee et al., 2018
    (arXiv 1807.03888), with a single class.

    It is saved next to the checkpoint, in `familiarity.safetensors`. `prismer` gives no warning for a checkpoint
    without this file.

    Attributes:
        mean (`torch.Tensor` of shape `(width,)`): mean of the features of the training images.
        whitening (`torch.Tensor` of shape `(width, width)`): matrix that gives the features unit covariance.
        limit (`float`): largest distance of familiar images.

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
        Fits the Gaussian and the limit.

        Args:
            features (`torch.Tensor` of shape `(n, width)`):
                Features of training images; `n` should be several times `width`.
            others (`torch.Tensor` of shape `(m, width)`): features of similar images that were not trained on.
            share (`float`, *optional*, defaults to 0.99): share of `others` within the limit.

        Raises:
            ValueError: if there are too few images to estimate the covariance.
        """
        number, width = features.shape
        if number <= width:
            raise ValueError(f"{number} images are too few for the covariance of {width} features; more are needed")
        features = features.double()
        variances, axes = torch.linalg.eigh(torch.cov(features.T))
        # directions with almost no variance must not dominate
        variances = variances.clamp(min=1e-4 * variances.mean())
        known = cls(features.mean(0).float(), (axes * variances.rsqrt()).float().contiguous(), float("inf"))
        known.limit = torch.quantile(known.distance(others), share).item()
        return known

    def distance(self, features: torch.Tensor) -> torch.Tensor:
        """The distances `(n,)` of features `(n, width)`, in standard deviations. About `sqrt(width)` is usual."""
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
        Loads the file of a checkpoint, a folder or a Hub id. Returns `None` if the checkpoint has no such file.

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
                f"{path} is damaged, or not a file of `Familiarity.save_pretrained`: {error}. If the file is "
                "missing, there is no warning about unfamiliar images"
            ) from error


def image_features(model: PrismerModel, encoder_outputs: Any) -> torch.Tensor:
    """
    The mean patch token of each image, `(images, width)`, from the output of `get_image_features`. The latents of the
    experts are not included.

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
