"""With what the labels of a store were made, and the refusal to go on with anything else."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..experts.base import Expert, FrozenModel
from ..experts.suite import ExpertSuite


logger = logging.get_logger(__name__)

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1

# libraries that what an expert sees may depend on
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
# settings of experts that change how fast they are, not what they see
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

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import make_manifest

    >>> thermal = {"name": "thermal", "kind": "dense", "channels": 1}
    >>> manifest = make_manifest(None, [thermal], {"camera": "T-1000", "range": [-20, 60]})
    >>> manifest["descriptions"]
    {'thermal': {'name': 'thermal', 'kind': 'dense', 'channels': 1}}
    ```
    """
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
    """The experts of a suite, and those that were left out of it but run because others need them."""
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
        FileNotFoundError: if the folder is no store.
        ValueError: if it was written by a newer version of this package.

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
        raise FileNotFoundError(f"{folder} is not a label store: there is no {MANIFEST_FILE} in it")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"the label store {folder} has the format {manifest.get('format_version')}; this version of "
            f"modeling-prismer reads {FORMAT_VERSION}"
        )
    return manifest


def claim_folder(folder: str | Path, manifest: Mapping[str, Any], allow_other_versions: bool = False) -> None:
    """
    Makes a folder the store of a manifest, or checks that it already is. Several processes may do so at once.

    Args:
        folder (`str` or `Path`): made if it does not exist.
        manifest (`dict`): from [`make_manifest`].
        allow_other_versions (`bool`, *optional*, defaults to `False`):
            Only warn if the labels that are there were made with other versions of the libraries.

    Raises:
        ValueError: if the folder's labels were made otherwise; it names each difference.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST_FILE
    if not path.exists():
        # complete before it has its name, and never over another one's
        temporary = folder / f".{MANIFEST_FILE}-{os.getpid()}-{os.urandom(4).hex()}"
        write_durably(temporary, json.dumps(manifest, indent=2) + "\n")
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
    there = read_manifest(folder)
    differences = list(_differences(there, manifest))
    versions = [line for name, line in differences if name.startswith("versions.")]
    others = [line for name, line in differences if not name.startswith("versions.")]
    if versions and allow_other_versions:
        logger.warning(f"The labels in {folder} were made with other versions: {'; '.join(versions)}")
        versions = []
    if others or versions:
        hint = "" if others else ". To go on all the same: allow_other_versions=True"
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


def write_durably(path: Path, text: str) -> None:
    """Writes a file so that it is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
