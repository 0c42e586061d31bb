"""The features with which label experts' classes are painted: from the published tables, or from class names."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from .tensor_files import load_tensors


BACKGROUND_KEY = "background"
TABLE_SUFFIXES = (".pt", ".pth", ".safetensors")


def read_feature_tables(
    feature_tables: Mapping[str, torch.Tensor | str | Path] | str | Path, experts: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """
    The tables of class features of label experts, from wherever they are.

    A file of a table is a safetensors file with one tensor, or a file of `torch.save` with one of:

    - a tensor (classes, channels);
    - a list of vectors (channels,), in the order of the classes;
    - a dict from class number to vector, or from class name to vector in the order of the classes. A vector may be
      wrapped as `{"features": vector}`, as in the stored labels of the text detector.

    Args:
        feature_tables (`dict`, `str` or `Path`):
            - a dict {expert: table, …, "background": vector}, with tensors or files as values;
            - a safetensors file with such names;
            - a folder. A file whose name (without suffix) is an expert's or `background` is taken for that; of the
              others, one vector is the background, and a table is that of the expert with as many classes in the
              configuration.
        experts (`list[dict]`): the configuration's descriptions of the experts.

    Returns:
        `dict[str, torch.Tensor]`: for each label expert that has a table (classes, channels) in float32, and
        `background` (channels,).

    Raises:
        ValueError: if a table belongs to no label expert or has another width, or if there is no background.
        FileNotFoundError: if there is no such file.

    Example:

    ```python
    >>> import torch
    >>> from modeling_prismer import PrismerConfig
    >>> from modeling_prismer.conversion import read_feature_tables

    >>> experts = PrismerConfig.from_variant("prismer_base").experts
    >>> given = {"segmentation": torch.randn(133, 64), "background": torch.zeros(64)}
    >>> {name: tuple(table.shape) for name, table in read_feature_tables(given, experts).items()}
    {'segmentation': (133, 64), 'background': (64,)}
    ```
    """
    channels = {expert["name"]: expert["channels"] for expert in experts if expert["kind"] == "label"}
    if not isinstance(feature_tables, Mapping):
        feature_tables = _tables_at(Path(feature_tables).expanduser(), experts)
    tables = {}
    for name, table in feature_tables.items():
        if name != BACKGROUND_KEY and name not in channels:
            raise ValueError(
                f"feature_tables has '{name}'; accepted are the label experts of the config "
                f"({', '.join(channels) or 'none'}) and '{BACKGROUND_KEY}'"
            )
        where = f"the table of '{name}'"
        if isinstance(table, str | Path):
            where = f"{table} (for '{name}')"
            table = _load_table(_existing(Path(table).expanduser()))
        table = _to_matrix(table, where)
        if name == BACKGROUND_KEY and len(table) != 1:
            raise ValueError(f"{where} has {len(table)} rows; the background is one vector")
        for expert in channels if name == BACKGROUND_KEY else [name]:
            if table.shape[1] != channels[expert]:
                raise ValueError(
                    f"{where} has {table.shape[1]} channels; the config's expert '{expert}' has {channels[expert]}"
                )
        tables[name] = table[0] if name == BACKGROUND_KEY else table
    if channels and BACKGROUND_KEY not in tables:
        raise ValueError(
            f"feature_tables has no '{BACKGROUND_KEY}', the feature of every pixel where {', '.join(channels)} saw "
            f"nothing; it has {', '.join(tables) or 'nothing'}"
        )
    return tables


def class_features_from_names(
    names: Mapping[str, Sequence[str]],
    text_features: Callable[[list[str]], np.ndarray],
    background: str = "background",
) -> dict[str, torch.Tensor]:
    """
    Tables of class features from the names of the classes, for `feature_tables` of [`convert_original_checkpoint`] or
    `set_class_features` of the model.

    A published checkpoint was trained with one particular principal component analysis of CLIP's text embeddings: it
    needs that one here, and for the words of its text detector. Any other goes with a model of your own.

    Args:
        names (`dict[str, list[str]]`): for each label expert the names of its classes, in order.
        text_features (`Callable`):
            From texts to features (texts, channels): a [`ClipTextFeatures`], with the text encoder and the analysis,
            or any other of the `WordFeatures`.
        background (`str`, *optional*, defaults to `"background"`): the text that stands for no class.

    Returns:
        `dict[str, torch.Tensor]`: (classes, channels) for each expert, and (channels,) for `background`.

    Example:

    ```python
    >>> from modeling_prismer.conversion import class_features_from_names
    >>> from modeling_prismer.processing.experts import HashedNgrams  # for a published checkpoint ClipTextFeatures

    >>> tables = class_features_from_names({"segmentation": ["cat", "dog", "grass"]}, HashedNgrams())
    >>> {name: tuple(table.shape) for name, table in tables.items()}
    {'segmentation': (3, 64), 'background': (64,)}
    ```
    """
    tables = {}
    for name, classes in names.items():
        if isinstance(classes, str):
            raise ValueError(f"names has a string for '{name}'; a list of class names is needed")
        tables[name] = torch.as_tensor(np.asarray(text_features(list(classes))), dtype=torch.float32)
    tables[BACKGROUND_KEY] = torch.as_tensor(np.asarray(text_features([background])), dtype=torch.float32)[0]
    return tables


def save_class_features(
    names: Mapping[str, Sequence[str]],
    text_features: Callable[[list[str]], np.ndarray],
    path: str | Path,
    background: str = "background",
) -> dict[str, torch.Tensor]:
    """
    Builds the tables of [`class_features_from_names`] and writes them to a safetensors file that `feature_tables` of
    [`convert_original_checkpoint`] and [`read_feature_tables`] take. The names lie in its metadata, as JSON.

    Args:
        names, text_features, background: see [`class_features_from_names`]; `suite.class_names` are the names of a
            suite's experts.
        path (`str` or `Path`): the file to write; its folder is made if it does not exist.

    Returns:
        `dict[str, torch.Tensor]`: the tables.

    Example:

    ```python
    >>> from modeling_prismer.conversion import save_class_features
    >>> from modeling_prismer.processing.experts import HashedNgrams

    >>> tables = save_class_features({"segmentation": ["cat", "dog"]}, HashedNgrams(), "tables.safetensors")
    >>> sorted(tables)
    ['background', 'segmentation']
    ```
    """
    tables = class_features_from_names(names, text_features, background)
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {name: json.dumps(list(classes)) for name, classes in names.items()}
    save_file({name: table.contiguous() for name, table in tables.items()}, path, metadata=metadata)
    return tables


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"there is no table of class features {path}")
    return path


def _load_table(path: Path) -> Any:
    table = load_tensors(path)
    if path.suffix == ".safetensors" and len(table) != 1:
        raise ValueError(f"{path} has {len(table)} tensors; a safetensors file of one table has one")
    return table


def _tables_at(path: Path, experts: list[dict[str, Any]]) -> dict[str, Any]:
    """{expert or "background": table} of a safetensors file, or of the files in a folder."""
    if not path.is_dir():
        tables = load_tensors(_existing(path))
        if not isinstance(tables, dict) or BACKGROUND_KEY not in tables:
            raise ValueError(f"{path} is no file of {{expert: table, …, '{BACKGROUND_KEY}': vector}}")
        return tables

    names = [expert["name"] for expert in experts if expert["kind"] == "label"] + [BACKGROUND_KEY]
    files = [file for file in sorted(path.iterdir()) if file.suffix in TABLE_SUFFIXES and file.is_file()]
    found: dict[str, Path] = {}
    tables = {}

    def take(name: str, file: Path, table: Any) -> None:
        if name in found:
            raise ValueError(
                f"{found[name].name} and {file.name} in {path} could both be the table of '{name}'; name the right "
                f"one {name}{file.suffix}, or give feature_tables as a dict {{expert: file}}"
            )
        found[name], tables[name] = file, table

    for file in files:
        if file.stem in names:
            take(file.stem, file, _load_table(file))
    by_name = set(found)
    counts = [expert.get("num_classes") for expert in experts]
    by_count = {count: expert["name"] for count, expert in zip(counts, experts) if count and counts.count(count) == 1}
    for file in files:
        if file.stem in names:
            continue
        try:
            table = _to_matrix(_load_table(file), str(file))
        except ValueError:  # something else that lies in the folder
            continue
        name = BACKGROUND_KEY if len(table) == 1 else by_count.get(len(table))
        if name is not None and name not in by_name:
            take(name, file, table)
    if not tables:
        raise ValueError(
            f"no table of class features in {path}: it has {', '.join(file.name for file in files) or 'none'}; "
            f"one is needed for each of {', '.join(names)}, with that name or the right number of classes"
        )
    return tables


def _to_matrix(table: Any, where: str) -> torch.Tensor:
    """Any of the forms of a table as (classes, channels) float32."""
    if isinstance(table, np.ndarray):
        table = torch.from_numpy(table)
    if isinstance(table, Mapping):
        if all(_is_number(key) for key in table):
            table = {int(key): value for key, value in table.items()}
            if sorted(table) != list(range(len(table))):
                raise ValueError(f"{where} is a dict of class numbers, but not of all from 0 to {len(table) - 1}")
            table = [table[number] for number in range(len(table))]
        else:
            table = list(table.values())
        if len(table) == 1 and isinstance(table[0], torch.Tensor):
            table = table[0]
    if isinstance(table, list | tuple):
        vectors = [vector["features"] if isinstance(vector, Mapping) else vector for vector in table]
        try:
            table = torch.stack([torch.as_tensor(vector, dtype=torch.float32).flatten() for vector in vectors])
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is no list of vectors of one length: {error}") from None
    if not isinstance(table, torch.Tensor):
        raise ValueError(f"{where} is a {type(table).__name__}; a tensor, a list or a dict of vectors is needed")
    table = table.detach().float()
    if table.ndim == 3 and table.shape[1] == 1:
        table = table[:, 0]
    if table.ndim == 1:
        table = table[None]
    if table.ndim != 2:
        raise ValueError(f"{where} has the shape {tuple(table.shape)}; (classes, channels) is needed")
    return table


def _is_number(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.isdigit())
