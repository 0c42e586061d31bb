"""Tables of class features from the names of classes, kept in a cache."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .clip_pca import read_clip_pca
from .feature_tables import ClassTable
from .tensor_files import load_tensors


def table_of_names(
    names: Sequence[str],
    encoder: str,
    pca: str | Path | None,
    channels: int,
    prompt: str,
    background: str,
    cache_dir: str | Path | None,
) -> ClassTable:
    """See [`ClassTable.from_names`]."""
    if isinstance(names, str) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"names is {names!r}; a list of names, none of them empty, is needed")
    if "{}" not in prompt:
        raise ValueError(f"prompt is {prompt!r}; a text with {{}} in the place of the name is needed")
    analysis = None if pca is None else _read_analysis(pca, channels)
    texts = [prompt.format(name) for name in names] + [background]
    file = _cache_file(cache_dir, [1, texts, channels, _version_of(encoder), _digest(analysis)])
    features = _read_cached(file, (len(texts), channels))
    if features is None:
        features = _compute(texts, encoder, analysis, channels)
        _write(file, features)
    return ClassTable(features[:-1].clone(), list(names), features[-1].clone())


def _compute(texts: list[str], encoder: str, analysis: dict[str, torch.Tensor] | None, channels: int) -> torch.Tensor:
    from modeling_prismer.processing.experts.text_encoder import TextEncoder

    embeddings = TextEncoder(encoder)(texts)  # (texts, width)
    if analysis is None:
        analysis = _fit(embeddings, channels)
    elif analysis["mean"].shape[0] != embeddings.shape[1]:
        raise ValueError(
            f"pca is for embeddings of {analysis['mean'].shape[0]} numbers; those of {encoder} have "
            f"{embeddings.shape[1]}"
        )
    return (embeddings - analysis["mean"]) @ analysis["components"].T


def _fit(embeddings: torch.Tensor, channels: int) -> dict[str, torch.Tensor]:
    """A principal component analysis (channels, width). Few texts have few components; the others are zero."""
    from sklearn.decomposition import PCA

    found = PCA(min(channels, *embeddings.shape), svd_solver="full").fit(embeddings.double().numpy())
    components = torch.zeros(channels, embeddings.shape[1])
    components[: found.n_components_] = torch.from_numpy(found.components_).float()
    return {"mean": torch.from_numpy(found.mean_).float(), "components": components}


def _read_analysis(pca: str | Path, channels: int) -> dict[str, torch.Tensor]:
    path = Path(pca).expanduser()
    if path.suffix == ".pkl":
        analysis = read_clip_pca(path)
    elif not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    else:
        analysis = load_tensors(path)
    if missing := [name for name in ("mean", "components") if name not in analysis]:
        raise ValueError(f"{path} has no tensor '{missing[0]}'; it has {', '.join(analysis)}")
    mean, components = analysis["mean"].float(), analysis["components"].float()
    if mean.ndim != 1 or components.shape != (channels, len(mean)):
        raise ValueError(
            f"{path} has a mean of shape {tuple(mean.shape)} and components of shape {tuple(components.shape)}; "
            f"(width,) and ({channels}, width) are needed"
        )
    return {"mean": mean, "components": components}


# ---- the cache ----


def _cache_file(cache_dir: str | Path | None, key: list[Any]) -> Path:
    from huggingface_hub.constants import HF_HOME

    folder = Path(HF_HOME, "prismer", "class_tables") if cache_dir is None else Path(cache_dir).expanduser()
    return folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.safetensors"


def _version_of(encoder: str) -> list[Any]:
    """Identifies the version of an encoder: by the files of its folder, or by the commit of a model on the Hub."""
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        stats = [(file.relative_to(folder).as_posix(), file.stat()) for file in files]
        return [str(folder.resolve()), [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]]
    from transformers import AutoConfig

    return [encoder, getattr(AutoConfig.from_pretrained(encoder), "_commit_hash", None)]


def _digest(analysis: dict[str, torch.Tensor] | None) -> str | None:
    if analysis is None:
        return None
    parts = [analysis[name].contiguous().numpy().tobytes() for name in ("mean", "components")]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _read_cached(file: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    """The features in a file of the cache; `None` if it is not there or damaged."""
    try:
        features = load_file(file)["features"]
    except (OSError, SafetensorError, KeyError):
        return None
    return features if features.shape == shape and features.isfinite().all() else None


def _write(file: Path, features: torch.Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".incomplete-")
    os.close(handle)
    try:
        save_file({"features": features.contiguous()}, temporary)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
