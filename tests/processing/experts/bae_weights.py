"""The seeded weights with which the network of the normals expert was recorded, and the recording of its outputs."""

import sys
import types
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file


RECORDING = Path(__file__).parents[2] / "fixtures" / "bae_normals.safetensors"


def seeded(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Random weights under the published names. The outputs differ from pixel to pixel."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros(shape, dtype=torch.long)
        elif name.endswith("running_var"):
            weights[name] = torch.rand(shape, generator=generator) + 0.5
        elif len(shape) > 1:
            # the encoder's residual connections would let larger values grow, and rounding with them
            gain = 1 if name.startswith("encoder") or name.endswith((".6.weight", "res8.weight")) else 2
            weights[name] = torch.randn(shape, generator=generator) * (gain / shape[1:].numel()) ** 0.5
        else:
            weights[name] = torch.randn(shape, generator=generator) * 0.1 + (1 if name.endswith("weight") else 0)
    return weights


def pixel_values() -> torch.Tensor:
    """Two images of 64×96 pixels."""
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 4 - 2


def record() -> None:
    """
    Records the NormalBae network of controlnet-aux 0.0.10:

        pip install --no-deps controlnet-aux==0.0.10
        python -m tests.processing.experts.bae_weights
    """
    spec = find_spec("controlnet_aux")
    assert spec is not None and spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    for name in ("controlnet_aux", "controlnet_aux.normalbae"):  # without their __init__, which needs opencv and more
        module = types.ModuleType(name)
        module.__path__ = [str(root.parent / name.replace(".", "/"))]
        sys.modules[name] = module
    from controlnet_aux.normalbae.nets.NNET import NNET

    settings = types.SimpleNamespace(
        mode="client", architecture="BN", pretrained="scannet", sampling_ratio=0.4, importance_ratio=0.7
    )
    network = NNET(settings).eval()
    weights = seeded({name: tensor.shape for name, tensor in network.state_dict().items()})
    network.load_state_dict(weights)
    with torch.no_grad():
        outputs = network(pixel_values())[0][-1]
    print(outputs.mean((0, 2, 3)), outputs.std((0, 2, 3)))
    save_file({"outputs": outputs.contiguous()}, RECORDING)


if __name__ == "__main__":
    record()
