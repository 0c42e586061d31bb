"""The expert for surface normals of the published checkpoints: NLL-AngMF, trained on ScanNet."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .base import Expert, hub_file, load_network, read_weights
from .normal import NORMALS, to_rgb
from .pretrained import autocast, place, resize_bilinear


LEAST_KAPPA = 0.01


class BaeNormals(Expert):
    """
    Surface normals by NLL-AngMF trained on ScanNet, the expert of the published checkpoints, with its settings.

    The image is resized to 480×480 (bilinear) and normalised with ImageNet's mean and standard deviation. The normals
    are stored as (n + 1) / 2 in 8 bits, the three components as red, green and blue, and resized bilinearly to the
    image's size. On CUDA it runs in half precision unless a `dtype` is set. The method is by Bae et al., [Estimating
    and Exploiting the Aleatoric Uncertainty in Surface Normal Estimation](https://arxiv.org/abs/2109.09881). The
    package timm has its encoder.

    Label: uint8 (height, width, 3). Weights: 72.4 million parameters, 290 MB. The authors' code has the MIT licence;
    the repository that the file comes from has CC-BY-NC-SA-4.0.

    Args:
        checkpoint (`str`, *optional*):
            A local `scannet.pt`, which is read without unpickling objects, or a copy of it as safetensors. By default
            the file is taken from the Hub or its cache.
        pretrained (`bool`, *optional*, defaults to `True`):
            `False` gives random weights, for tests.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import BaeNormals

    >>> expert = BaeNormals()  # loaded when it first runs
    >>> expert.description, expert.license, expert.size_in_bytes
    ({'name': 'normal', 'kind': 'dense', 'channels': 3}, 'mit (code of the authors)', 290379224)
    ```
    """

    type = "bae_normals"
    name, kind, channels, look = "normal", "dense", 3, NORMALS
    model_id = "shikunl/prismer"
    license = "mit (code of the authors)"
    size_in_bytes = 290_379_224
    source = "the network of github.com/baegwangbin/surface_normal_uncertainty on timm, trained on ScanNet"
    file_settings = ("checkpoint",)
    half_on_cuda = True

    filename = "expert_weights/scannet.pt"
    input_size = (480, 480)

    def __init__(self, checkpoint: str | None = None, pretrained: bool = True):
        self.checkpoint = None if checkpoint is None else str(checkpoint)
        self.pretrained = pretrained

    def load_model(self) -> nn.Module:
        if self.checkpoint is None and not self.pretrained:
            return NormalNetwork()
        remedy = "Give a local file, BaeNormals(checkpoint=…), or use NormalsFromDepth, which needs no weights"
        path = self.checkpoint or hub_file(self.model_id, self.filename, remedy)
        return load_network(NormalNetwork, own_names(read_weights(path)), path, "NLL-AngMF")

    def place_model(self) -> None:
        place(self.model, self.device, self.running_dtype)

    def run(self, images: list[Image.Image]) -> list[np.ndarray]:
        pixels = np.stack([np.asarray(image.resize(self.input_size, Image.Resampling.BILINEAR)) for image in images])
        pixel_values = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        mean, std = (
            torch.tensor(values, device=self.device)[:, None, None]
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        )
        pixel_values = (pixel_values - mean) / std
        with autocast(self.device, self.running_dtype):
            normals = self.model(pixel_values.to(next(self.model.parameters()).dtype))[:, :3].float()
        if not normals.isfinite().all():
            raise FloatingPointError(f"normals are not numbers in {self.running_dtype}; use to(dtype='float32')")
        return [to_rgb(resize_bilinear(own, image.size)) for own, image in zip(normals, images)]


class NormalNetwork(nn.Module):
    """
    NLL-AngMF with batch normalisation: an EfficientNet-B5 and a decoder that predicts at 1/8 of the image's size and
    refines the prediction at 1/4, 1/2 and 1.
    """

    def __init__(self) -> None:
        super().__init__()
        import timm

        # TensorFlow's padding ("SAME") and its epsilon of 1e-3
        self.encoder = timm.create_model("tf_efficientnet_b5", pretrained=False)
        self.encoder.bn2 = self.encoder.global_pool = self.encoder.classifier = nn.Identity()
        self.conv2 = nn.Conv2d(2048, 2048, kernel_size=1)
        self.up1 = UpBlock(2048 + 176, 1024)
        self.up2 = UpBlock(1024 + 64, 512)
        self.up3 = UpBlock(512 + 40, 256)
        self.up4 = UpBlock(256 + 24, 128)
        self.out_conv_res8 = nn.Conv2d(512, 4, kernel_size=3, padding=1)
        self.out_conv_res4 = Refinement(512)
        self.out_conv_res2 = Refinement(256)
        self.out_conv_res1 = Refinement(128)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`): normalised images.

        Returns:
            `torch.FloatTensor` of shape `(batch, 4, height, width)`: the normal, of length 1, and kappa, how certain
            it is.
        """
        hidden_states = self.encoder.bn1(self.encoder.conv_stem(pixel_values))
        features = []
        for block in self.encoder.blocks:
            hidden_states = block(hidden_states)
            features.append(hidden_states)
        hidden_states = self.conv2(self.encoder.conv_head(hidden_states))  # 1/32
        hidden_states = self.up1(hidden_states, features[4])  # 1/16
        eighth = self.up2(hidden_states, features[2])
        quarter = self.up3(eighth, features[1])
        half = self.up4(quarter, features[0])

        prediction = as_normals(self.out_conv_res8(eighth))
        prediction = self.out_conv_res4(eighth, prediction, quarter.shape[2:])
        prediction = self.out_conv_res2(quarter, prediction, half.shape[2:])
        return self.out_conv_res1(half, prediction, pixel_values.shape[2:])


class UpBlock(nn.Sequential):
    """Two convolutions on a map that was enlarged to the size of the encoder's map, and on that map."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.LeakyReLU(),
        )

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([enlarge(hidden_states, skip.shape[2:]), skip], dim=1))


class Refinement(nn.Sequential):
    """An MLP at every pixel, on the features and the prediction of half the size."""

    def __init__(self, in_channels: int, width: int = 128):
        super().__init__(
            nn.Conv2d(in_channels + 4, width, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(width, 4, kernel_size=1),
        )

    def forward(self, features: torch.Tensor, prediction: torch.Tensor, size: torch.Size) -> torch.Tensor:
        # the first layer is linear, so it gives the same before the enlargement, on a quarter of the pixels
        hidden_states = enlarge(self[0](torch.cat([features, prediction.to(features)], dim=1)), size)
        for layer in list(self)[1:]:
            hidden_states = layer(hidden_states)
        return as_normals(hidden_states)


def enlarge(maps: torch.Tensor, size: torch.Size) -> torch.Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=True)


def as_normals(prediction: torch.Tensor) -> torch.Tensor:
    """Scales the first three channels to a vector of length 1; the fourth becomes kappa, which is positive."""
    normals, kappa = prediction.float().split([3, 1], dim=1)
    normals = normals / (torch.linalg.vector_norm(normals, dim=1, keepdim=True) + 1e-10)
    return torch.cat([normals, F.elu(kappa) + 1 + LEAST_KAPPA], dim=1)


def own_names(weights: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of `scannet.pt` under the names of [`NormalNetwork`]. Weights with these names stay as they are."""
    own = {}
    for name, tensor in weights.items():
        name = name.removeprefix("module.").replace("encoder.original_model.", "encoder.", 1)
        if name.startswith(("encoder.bn2.", "encoder.classifier.")):  # not used
            continue
        name = name.removeprefix("decoder.").replace("._net.", ".")
        is_mlp = name.startswith("out_conv_res") and getattr(tensor, "ndim", 0) == 3
        own[name] = tensor[..., None] if is_mlp else tensor  # (out, in, 1): the published MLP runs on lists of pixels
    return own
