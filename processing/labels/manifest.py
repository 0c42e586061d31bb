"""How the labels of a store were made, and the refusal to mix them with labels that were made otherwise."""

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

# what a manifest holds beside its version
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
# settings that change the speed of an expert, not its labels
_SETTINGS_OF_SPEED = ("batch_size", "num_threads")


def make_manifest(
    suite: ExpertSuite | None, descriptions: list[dict[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """
    Describes how labels are made.

    Args:
        suite ([`ExpertSuite`], *optional*): the experts; `None` if the labels come from elsewhere.
        descriptions (`list[dict]`): the experts' entries as in `PrismerConfig.experts`.
        settings (`dict`): everything else that the labels depend on, plain JSON.

    Returns:
        `dict`: `format_version`, `experts` (each with its settings; a file of weights by its SHA-256 instead of its
        path), `descriptions`, `settings`, `versions` of the libraries, and `hash`, the SHA-256 of all that.

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
    manifest = json.loads(json.dumps(manifest))  # as it will be read: lists for tuples
    return {**manifest, "hash": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()}


def _installed() -> Iterator[tuple[str, str]]:
    for library in _LIBRARIES:
        try:
            yield library, version(library).split("+")[0]
        except PackageNotFoundError:
            continue


def _running(suite: ExpertSuite | None) -> Iterator[tuple[str, Expert]]:
    """The experts of a suite, and those that were left out of it but still run because others need them."""
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
    """The SHA-256 of a file, or of the names and contents of the files in a folder."""
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
    The manifest of a store.

    Raises:
        FileNotFoundError: if the folder is not a label store.
        ValueError: if the manifest is damaged, or was written by another version of this package; it names the file.

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
    if number != FORMAT_VERSION:  # other formats have fields of their own
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
    """Held by the process that writes the files that all processes share."""
    return FileLock(folder / f".{MANIFEST_FILE}.lock")


def claim_folder(folder: str | Path, manifest: Mapping[str, Any], allow_other_versions: bool = False) -> None:
    """
    Makes a folder the store of a manifest, or checks that it already is. Several processes may do so at once.

    Args:
        folder (`str` or `Path`): made if it does not exist.
        manifest (`dict`): from [`make_manifest`].
        allow_other_versions (`bool`, *optional*, defaults to `False`):
            Only warn if the labels in the folder were made with other versions of the libraries.

    Raises:
        NotADirectoryError: if the folder is a file.
        ValueError: if the folder's labels were made otherwise; it names each difference. Also if the folder has
            labels but no manifest.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; the label store needs a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST_FILE
    if not path.exists():
        with manifest_lock(folder):  # one process writes it, the others wait for that
            if not path.exists():
                if shard := next(folder.glob("labels-*.parquet"), None):
                    raise ValueError(
                        f"{folder} holds labels ({shard.name}) but no {MANIFEST_FILE}, so nobody knows how they were "
                        "made. Restore it from a copy, or use another folder"
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
        hint = "" if others else ". To mix them nevertheless: allow_other_versions=True, --allow-other-versions"
        raise ValueError(
            f"{folder} holds labels that were made otherwise, and one store does not mix them: "
            f"{'; '.join(others + versions)}. Use another folder, or the same settings{hint}"
        )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, what differs) for each value that is not the same."""
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
