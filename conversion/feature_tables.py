"""Tables of class features for label experts, from the published files or from the names of classes."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from modeling_prismer.expert_spec import ExpertSpec, read_specs

from .output_folder import file_written_whole
from .tensor_files import load_tensors


logger = logging.get_logger(__name__)

BACKGROUND_KEY = "background"
TABLE_SUFFIXES = (".pt", ".pth", ".safetensors")
PUBLISHED_TABLES = ("coco_features", "ade_features")  # of segmentation; the number of classes tells which one
MAX_BYTES = 1 << 28


class ClassTable(NamedTuple):
    """
    The features with which the classes of a label expert are painted.

    Args:
        features (`torch.FloatTensor` of shape `(classes, channels)`): one row for each class.
        class_names (`list[str]`, *optional*): the names of the classes, if the file has them.
        background (`torch.FloatTensor` of shape `(channels,)`, *optional*):
            The feature of the pixels without a class, if it was made with the table.

    Example:

    ```python
    >>> import torch
    >>> from modeling_prismer.conversion import ClassTable

    >>> table = ClassTable(torch.randn(3, 64), ["cat", "dog", "grass"])  # or ClassTable.from_names(["cat", …])
    >>> tuple(table.features.shape), table.class_names[2]
    ((3, 64), 'grass')
    ```
    """

    features: torch.Tensor
    class_names: list[str] | None = None
    background: torch.Tensor | None = None

    @classmethod
    def from_names(
        cls,
        names: Sequence[str],
        encoder: str | Path = "openai/clip-vit-large-patch14",
        pca: str | Path | None = None,
        channels: int = 64,
        prompt: str = "{}",
        background: str = "background",
        cache_dir: str | Path | None = None,
    ) -> "ClassTable":
        """
        Computes the table of any set of classes from their names. The table is kept in a cache, so that the encoder is
        loaded only once for the same names.

        Args:
            names (`Sequence[str]`): the names of the classes, in order. They may repeat.
            encoder (`str` or `Path`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
                Hub id or folder of a CLIP, MetaCLIP 2, SigLIP or SigLIP 2, with its tokenizer.
            pca (`str` or `Path`, *optional*):
                A principal component analysis: the published `clip_pca.pkl`, or a safetensors file of `mean` and
                `components`. A published checkpoint needs the published one and its encoder. By default it is fitted
                to the names, which is right for a new stem, but features of two such tables cannot be compared.
            channels (`int`, *optional*, defaults to 64): the channels of the expert.
            prompt (`str`, *optional*, defaults to `"{}"`): the text of a name, such as `"a photo of a {}"`.
            background (`str`, *optional*, defaults to `"background"`): the text for pixels without a class.
            cache_dir (`str` or `Path`, *optional*): the cache; by default a folder in that of the Hub.

        Returns:
            [`ClassTable`]: `(classes, channels)` float32, with the names and the background.

        Raises:
            ValueError: naming the argument that is wrong and what is accepted.
        """
        from .named_classes import table_of_names

        return table_of_names(names, str(encoder), pca, channels, prompt, background, cache_dir)


def read_class_tables(
    feature_tables: Mapping[str, Any] | str | Path, experts: list[dict[str, Any]]
) -> dict[str, ClassTable]:
    """
    Reads the tables of class features of label experts, with the names of the classes.

    The file of a table is a safetensors file with one tensor, or a file of `torch.save` with one of:

    - a published table, `{"labels": list of names, "features": tensor}`;
    - a tensor (classes, channels);
    - a list of vectors (channels,), in the order of the classes;
    - a dict from class number to vector, or from class name to vector in the order of the classes. A vector may be
      wrapped as `{"features": vector}`, as in the stored labels of the text detector.

    Args:
        feature_tables (`dict`, `str` or `Path`):
            - a dict {expert: table, …, "background": vector}, with any of these forms or files as values;
            - a safetensors file with such names, as [`save_class_features`] writes it;
            - a folder, such as the published `dataset`. A file `<expert>` or `<expert>_features` belongs to that
              expert, and `background` or `background_features` is the background. In other files, a single vector is
              the background, and a table belongs to the expert with as many classes in the configuration. A warning
              names the files that could not be read, and the unused files if an expert has no table.
        experts (`list[dict]`): the experts of the configuration.

    Returns:
        `dict[str, ClassTable]`: for each label expert that has a table (classes, channels) in float32, and
        `background` with one row.

    Raises:
        ValueError: if a table belongs to no label expert, does not fit its description, is damaged or is not finite,
            or if there is no background.
        FileNotFoundError: if there is no such file.

    Example:

    ```python
    >>> import torch
    >>> from modeling_prismer import PrismerConfig
    >>> from modeling_prismer.conversion import read_class_tables

    >>> experts = [{"name": "parts", "kind": "label", "channels": 64, "num_classes": 2}]
    >>> torch.save({"labels": ["head", "tail"], "features": torch.randn(2, 64)}, "parts_features.pt")
    >>> tables = read_class_tables({"parts": "parts_features.pt", "background": torch.zeros(64)}, experts)
    >>> tables["parts"].class_names
    ['head', 'tail']
    ```
    """
    described = {spec.name: spec for spec in read_specs(experts) if spec.is_label}
    if not isinstance(feature_tables, Mapping):
        feature_tables = _tables_at(Path(feature_tables).expanduser(), list(described.values()))
    tables = {}
    for name, given in feature_tables.items():
        if name != BACKGROUND_KEY and name not in described:
            raise ValueError(
                f"feature_tables has '{name}'; accepted are the label experts of the config "
                f"({', '.join(described) or 'none'}) and '{BACKGROUND_KEY}'"
            )
        where = f"the table of '{name}'"
        if isinstance(given, str | Path):
            where = f"{given} (for '{name}')"
            given = _load_table(_existing(Path(given).expanduser()))
        table = _to_table(given, where)
        rows, channels = table.features.shape
        if name == BACKGROUND_KEY and rows != 1:
            raise ValueError(f"{where} has {rows} rows; the background is one vector")
        for spec in described.values() if name == BACKGROUND_KEY else [described[name]]:
            if channels != spec.channels:
                raise ValueError(
                    f"{where} has {channels} channels; the config's expert '{spec.name}' has {spec.channels}"
                )
        if name != BACKGROUND_KEY:
            _require_same_classes(table, described[name], where)
        tables[name] = table
    if described and BACKGROUND_KEY not in tables:
        raise ValueError(
            f"feature_tables has no '{BACKGROUND_KEY}', the feature of every pixel where {', '.join(described)} found "
            f"nothing; it has {', '.join(tables) or 'nothing'}"
        )
    return tables


def read_feature_tables(
    feature_tables: Mapping[str, Any] | str | Path, experts: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """
    Returns only the features of [`read_class_tables`]. Arguments and errors are the same.

    Returns:
        `dict[str, torch.Tensor]`: for each label expert that has a table (classes, channels) in float32, and
        `background` (channels,).

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
    tables = read_class_tables(feature_tables, experts)
    return {name: table.features[0] if name == BACKGROUND_KEY else table.features for name, table in tables.items()}


def class_features_from_names(
    names: Mapping[str, Sequence[str]],
    text_features: Callable[[list[str]], np.ndarray],
    background: str = "background",
) -> dict[str, torch.Tensor]:
    """
    Computes tables of class features from the names of the classes, for `feature_tables` of
    [`convert_original_checkpoint`] or `set_class_features` of the model.

    A published checkpoint needs the principal component analysis of CLIP's text embeddings with which it was trained,
    also for the words of its text detector. A model of your own can have any other.

    Args:
        names (`dict[str, list[str]]`): for each label expert the names of its classes, in order.
        text_features (`Callable`):
            A function from texts to features (texts, channels): a [`ClipTextFeatures`], with the text encoder and the
            analysis, or any other `WordFeatures`.
        background (`str`, *optional*, defaults to `"background"`): the text for pixels without a class.

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
    Computes the tables of [`class_features_from_names`] and writes them to a safetensors file for `feature_tables` of
    [`convert_original_checkpoint`] and [`read_class_tables`]. Its metadata has the names, as JSON.

    Args:
        names, text_features, background: see [`class_features_from_names`]; `suite.class_names` has the names of a
            suite's experts.
        path (`str` or `Path`): the file to write; its folder is created if it does not exist.

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
    metadata = {name: json.dumps(list(classes)) for name, classes in names.items()}
    with file_written_whole(path) as file:
        save_file({name: table.contiguous() for name, table in tables.items()}, file, metadata=metadata)
    return tables


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"there is no table of class features {path}")
    return path


def _load_table(path: Path) -> Any:
    table = load_tensors(path)
    if path.suffix == ".safetensors":
        if len(table) != 1:
            raise ValueError(f"{path} has {len(table)} tensors; a safetensors file of one table has one")
        (table,) = _with_names(table, path).values()
    return table


def _with_names(tables: dict[str, torch.Tensor], path: Path) -> dict[str, Any]:
    """The tables of a safetensors file, in the published form if its metadata has the names of the classes."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    named: dict[str, Any] = {}
    for name, table in tables.items():
        named[name] = table
        if name in metadata:
            try:
                named[name] = {"labels": json.loads(metadata[name]), "features": table}
            except (ValueError, RecursionError):
                raise ValueError(f"{path}: the names of '{name}' in its metadata are not JSON") from None
    return named


def _tables_at(path: Path, specs: list[ExpertSpec]) -> dict[str, Any]:
    """Reads {expert or "background": table} from a safetensors file, or from the files in a folder."""
    if not path.is_dir():
        tables = load_tensors(_existing(path))
        if not isinstance(tables, dict) or BACKGROUND_KEY not in tables:
            raise ValueError(f"{path} is not a file of {{expert: table, …, '{BACKGROUND_KEY}': vector}}")
        return _with_names(tables, path) if path.suffix == ".safetensors" else tables

    names = [spec.name for spec in specs] + [BACKGROUND_KEY]
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

    for ending in ("", "_features"):
        by_name = set(found)
        for file in files:
            name = file.stem.removesuffix(ending)
            if file.stem == f"{name}{ending}" and name in names and name not in by_name:
                take(name, file, _to_table(_load_table(file), str(file)))

    classes = {spec.name: spec.num_classes for spec in specs}
    counts = Counter(classes.values())
    by_count = {count: name for name, count in classes.items() if count and counts[count] == 1}
    by_name, unused, unread = set(found), {}, {}
    for file in files:
        if file.stem.removesuffix("_features") in names:
            continue
        try:
            table = _to_table(_load_table(file), str(file))
        except ValueError as error:
            if file.stem in PUBLISHED_TABLES:
                raise
            unread[file] = str(error)  # another file in the folder
            continue
        rows = len(table.features)
        expert = BACKGROUND_KEY if rows == 1 else by_count.get(rows)
        if file.stem == "coco_features" and "segmentation" in names and not classes["segmentation"]:
            expert = "segmentation"  # a published model that was converted without tables
        if expert is not None and expert not in by_name:
            take(expert, file, table)
        else:
            unused[file] = f"{file} has {rows} classes"
    if not tables:
        raise ValueError(
            f"no table of class features in {path}: it has {', '.join(file.name for file in files) or 'none'}; "
            f"one is needed for each of {', '.join(names)}, with that name or the right number of classes"
        )
    without = [f"{name} ({count} classes)" for name, count in classes.items() if count and name not in found]
    message = f"no table of class features for {', '.join(without)}: {'; '.join([*unused.values(), *unread.values()])}"
    if classes.get("segmentation") and "segmentation" not in found and any(f.stem in PUBLISHED_TABLES for f in unused):
        raise ValueError(message)
    if without and (unused or unread):
        logger.warning(message)
    elif unread:
        logger.warning(f"these files are not tables of class features: {'; '.join(unread.values())}")
    return tables


def _require_same_classes(table: ClassTable, spec: ExpertSpec, where: str) -> None:
    """Refuses a table that lacks classes of an expert, or names them differently."""
    rows, num_classes, known = len(table.features), spec.num_classes or 0, spec.class_names
    if rows < num_classes:
        raise ValueError(f"{where} has {rows} rows; the config's expert '{spec.name}' has num_classes={num_classes}")
    if known and table.class_names and list(known) != table.class_names[: len(known)]:
        index = next(i for i, name in enumerate(known) if name != table.class_names[i])
        raise ValueError(
            f"{where} calls class {index} '{table.class_names[index]}'; the config's expert '{spec.name}' calls "
            f"it '{known[index]}'"
        )


def _require_few_numbers(num_bytes: int, where: str) -> None:
    """Limits the size of a table. A small file can describe tensors of any size."""
    if num_bytes > MAX_BYTES:
        raise ValueError(f"{where} would take {num_bytes:,} bytes; a table takes at most {MAX_BYTES:,}")


def _to_table(table: Any, where: str) -> ClassTable:
    """Reads any form of a table as (classes, channels) float32, with the names of the classes if it has them."""
    if isinstance(table, ClassTable):
        return table
    names = None
    if isinstance(table, np.ndarray):
        table = torch.from_numpy(table)
    if isinstance(table, Mapping):
        if table.keys() == {"labels", "features"} and isinstance(table["labels"], list | tuple):
            names, table = list(table["labels"]), table["features"]
        elif all(_is_number(key) for key in table):
            table = {int(key): value for key, value in table.items()}
            if sorted(table) != list(range(len(table))):
                raise ValueError(f"{where} is a dict of class numbers, but they are not 0 to {len(table) - 1}")
            table = [table[number] for number in range(len(table))]
        elif len(table) == 1 and getattr(next(iter(table.values())), "ndim", 0) == 2:
            (table,) = table.values()
        else:
            names, table = list(table), list(table.values())
    if isinstance(table, list | tuple):
        vectors = [vector.get("features") if isinstance(vector, Mapping) else vector for vector in table]
        _require_few_numbers(sum(getattr(vector, "nbytes", 0) for vector in vectors), where)
        try:
            table = torch.stack([torch.as_tensor(vector, dtype=torch.float32).flatten() for vector in vectors])
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is not a list of vectors of the same length: {error}") from None
    if not isinstance(table, torch.Tensor):
        raise ValueError(f"{where} is a {type(table).__name__}; a tensor, a list or a dict of vectors is needed")
    if table.ndim == 3 and table.shape[1] == 1:
        table = table[:, 0]
    if table.ndim == 1:
        table = table[None]
    if table.ndim != 2:
        raise ValueError(f"{where} has the shape {tuple(table.shape)}; (classes, channels) is needed")
    if table.layout != torch.strided or table.is_complex():
        raise ValueError(f"{where} is a tensor of {table.dtype}, {table.layout}; plain numbers are needed")
    _require_few_numbers(table.nbytes, where)
    table = table.detach().float()
    finite = torch.isfinite(table).all(dim=1)
    if not finite.all():
        raise ValueError(f"{where} has numbers that are not finite, first in row {int(finite.long().argmin())}")
    if names is not None and (len(names) != len(table) or not all(isinstance(name, str) for name in names)):
        raise ValueError(f"{where} has {len(table)} rows and {len(names)} names; a string for each row is needed")
    return ClassTable(table, names)


def _is_number(key: Any) -> bool:
    return isinstance(key, int) or (isinstance(key, str) and key.isdigit())
