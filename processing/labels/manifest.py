"""The manifest records how the labels of a store were made. A store refuses labels that were made differently."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers.utils import logging

from ...expert_spec import read_specs
from ..experts.base import Expert, FrozenModel
from ..experts.suite import ExpertSuite
from .durable_files import write_durably


logger = logging.get_logger(__name__)

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1

# the fields of a manifest besides its version
_FIELDS: dict[str, type] = {"experts": dict, "descriptions": dict, "settings": dict, "versions": dict, "hash": str}
# libraries that an expert's labels may depend on
_LIBRARIES = (
    "kornia",
    "modeling-prismer",
    "numpy",
    "onnxruntime",
    "pillow",
    "rapidocr",
    "scikit-learn",
    "timm",
    "torch",
    "torchvision",
    "transformers",
)
# settings that only change the speed of an expert
_SETTINGS_OF_SPEED = ("batch_size", "num_threads")


def make_manifest(
    suite: ExpertSuite | None, descriptions: list[dict[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Describes how labels are made.

    Args:
        suite ([`ExpertSuite`], *optional*): the experts; `None` if the labels come from elsewhere.
        descriptions (`list[dict]`): the experts' entries as in `PrismerConfig.experts`.
        settings (`dict`): everything else that the labels depend on, as plain JSON.

    Returns:
        `dict`: `format_version`, `experts` with their settings (files of weights have their SHA-256 instead of their
        path), `descriptions`, `settings`, `versions` of the libraries, and `hash`, the SHA-256 of all of these.

    Raises:
        ValueError: if an expert's entry is not one that `PrismerConfig.experts` accepts.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import make_manifest

    >>> thermal = {"name": "thermal", "kind": "dense", "channels": 1}
    >>> manifest = make_manifest(None, [thermal], {"camera": "T-1000", "range": [-20, 60]})
    >>> manifest["descriptions"]
    {'thermal': {'name': 'thermal', 'kind': 'dense', 'channels': 1}}
    ```
    """
    read_specs(descriptions)
    manifest = {
        "format_version": FORMAT_VERSION,
        "experts": {name: _describe(expert) for name, expert in _running(suite)},
        "descriptions": {description["name"]: dict(description) for description in descriptions},
        "settings": dict(settings),
        "versions": dict(_installed()) if suite else {},
    }
    manifest = json.loads(json.dumps(manifest))  # turns tuples into lists, as when it is read
    return {**manifest, "hash": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def _installed() -> Iterator[tuple[str, str]]:
    for library in _LIBRARIES:
        try:
            yield library, version(library).split("+")[0]
        except PackageNotFoundError:
            continue


def _running(suite: ExpertSuite | None) -> Iterator[tuple[str, Expert]]:
    """The experts of a suite, and experts that were left out but still run because others need them."""
    left_out = {} if suite is None else dict(suite._left_out)
    waiting = [] if suite is None else list(suite.items())
    while waiting:
        name, expert = waiting.pop(0)
        yield name, expert
        waiting += [(other, left_out.pop(other)) for other in (*expert.needs, *expert.uses) if other in left_out]


def _describe(model: FrozenModel) -> dict[str, Any]:
    description = {name: value for name, value in model.to_dict().items() if name not in _SETTINGS_OF_SPEED}
    for name in description:
        value = getattr(model, name, None)
        if isinstance(value, FrozenModel):
            description[name] = _describe(value)
        elif name in model.file_settings and value is not None and Path(value).expanduser().exists():
            description[name] = f"sha256:{_hash_files(Path(value).expanduser())}"
    if model.running_dtype is not None:
        description["dtype"] = str(model.running_dtype).removeprefix("torch.")
    return description


def _hash_files(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of all files in a folder."""
    if path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()} {_hash_files(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """
    Reads the manifest of a store.

    Raises:
        FileNotFoundError: if the folder is not a label store.
        ValueError: if the manifest is damaged, or was written by another version of this package. The message names
            the file.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import CannyEdges
    >>> from modeling_prismer.processing.labels import label_images, read_manifest

    >>> report = label_images("modeling_prismer/assets", [CannyEdges(sigma=2.0)], "my_labels", progress=False)
    >>> manifest = read_manifest("my_labels")
    >>> manifest["descriptions"], manifest["experts"]["edge"]["sigma"]
    ({'edge': {'name': 'edge', 'kind': 'dense', 'channels': 1}}, 2.0)
    ```
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a label store: it has no {MANIFEST_FILE}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        _check_manifest(manifest)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it from a copy, or use another folder") from error
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has the format {manifest['format_version']}; this version of modeling-prismer reads the format "
            f"{FORMAT_VERSION}"
        )
    return manifest


def _check_manifest(manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise ValueError(f"it holds a {type(manifest).__name__}; a JSON object is needed")
    number = manifest.get("format_version")
    if type(number) is not int:
        raise ValueError(f"its format_version is {_brief(number)}; a number is needed")
    if number != FORMAT_VERSION:  # other formats have other fields
        return
    for field, kind in _FIELDS.items():
        if not isinstance(manifest.get(field), kind):
            needed = "a JSON object" if kind is dict else "a text"
            raise ValueError(f"its {field} is {_brief(manifest.get(field))}; {needed} is needed")
    for name, description in manifest["descriptions"].items():
        if not isinstance(description, dict) or description.get("name") != name:
            raise ValueError(f"its description of '{name}' is {_brief(description)}")
    read_specs(list(manifest["descriptions"].values()))


def manifest_lock(folder: Path) -> FileLock:
    """The lock of the files that all processes share. Hold it to write one of them."""
    return FileLock(folder / f".{MANIFEST_FILE}.lock")


def claim_folder(folder: str | Path, manifest: Mapping[str, Any], allow_other_versions: bool = False) -> None:
    """
    Writes the manifest into a new store, or compares it with the manifest of an existing store. Several processes may
    do so at the same time.

    Args:
        folder (`str` or `Path`): made if it does not exist.
        manifest (`dict`): from [`make_manifest`].
        allow_other_versions (`bool`, *optional*, defaults to `False`):
            Only warn if the labels in the folder were made with other versions of the libraries.

    Raises:
        NotADirectoryError: if the folder is a file.
        ValueError: if the labels in the folder were made differently (the message names each difference), or if it has
            labels but no manifest.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; the label store needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST_FILE
    if not path.exists():
        with manifest_lock(folder):  # one process writes it, the others wait
            if not path.exists():
                if shard := next(folder.glob("labels-*.parquet"), None):
                    raise ValueError(
                        f"{folder} holds labels ({shard.name}) but no {MANIFEST_FILE}, so it is unknown how they "
                        "were made. Restore it from a copy, or use another folder"
                    )
                write_durably(path, json.dumps(manifest, indent=2) + "\n")
    there = read_manifest(folder)
    differences = list(_differences(there, manifest))
    versions = [line for name, line in differences if name.startswith("versions.")]
    others = [line for name, line in differences if not name.startswith("versions.")]
    if versions and allow_other_versions:
        logger.warning(f"The labels in {folder} were made with other versions: {'; '.join(versions)}")
        versions = []
    if others or versions:
        hint = "" if others else ". To mix them anyway: allow_other_versions=True"
        raise ValueError(
            f"{folder} holds labels that were made differently: {'; '.join(others + versions)}. Use another folder or "
            f"the same settings{hint}"
        )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yields (dotted name, description of the difference) for each different value."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*there, *(key for key in here if key not in there)]:
            if (name, key) != ("", "hash"):
                yield from _differences(there.get(key), here.get(key), f"{name}.{key}".lstrip("."))
    elif there != here:
        yield name, f"{name} is {_brief(there)} there, {_brief(here)} here"


def _brief(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, Mapping) and "type" in value:
        return f"'{value['type']}'"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
