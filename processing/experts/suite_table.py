"""A table of the experts of a suite: models, licences, sizes and classes, without loading any weights."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .bae_normals import BaeNormals, NormalNetwork
from .base import Expert
from .edge import DexiNedEdges
from .open_vocabulary import OpenVocabularyDetector
from .pretrained import PretrainedExpert, place
from .suite import ExpertSuite


@dataclass(frozen=True)
class SuiteRow:
    """
    One expert of a suite.

    Attributes:
        expert (`str`): its name.
        model (`str`): its class, and the id of its weights.
        license (`str`): the licence of the weights.
        parameters (`int`, *optional*): their number; `None` if it is unknown, 0 if there are none.
        size (`int`): bytes of the weights in single precision.
        memory (`int`): bytes of the weights on a GPU, most of them in half precision; 0 if it runs on the CPU.
        classes (`str`): the number of classes, or what stands for them.
    """

    expert: str
    model: str
    license: str
    parameters: int | None
    size: int
    memory: int
    classes: str


def suite_rows(name: str) -> list[SuiteRow]:
    """
    The rows of a suite's table. The networks are made from their configurations on the meta device, which takes no
    memory, so the figures are counted and not those that the experts state.

    Args:
        name (`str`): `"published"`, `"fast"`, `"commercial"` or `"offline"`.

    Returns:
        `list[SuiteRow]`: for each expert its name `expert`, `model`, `license`, `parameters`, `size` and `memory` in
        bytes, and `classes`.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import suite_rows

    >>> [(row.expert, row.license, row.classes) for row in suite_rows("offline")]
    [('edge', 'none needed: no weights', '–'), ('ocr', 'apache-2.0', 'words')]
    ```
    """
    return list(_rows(name))


@cache
def _rows(name: str) -> tuple[SuiteRow, ...]:
    return tuple(_row(expert) for expert in ExpertSuite.from_name(name).values())


def suite_markdown(name: str) -> str:
    """
    The table of a suite in Markdown, with a row of sums. Sizes are in MB (10⁶ bytes).

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import suite_markdown

    >>> print(suite_markdown("offline").splitlines()[2])
    | `edge` | `CannyEdges` | none needed: no weights | – | – | – | – |
    ```
    """
    rows = suite_rows(name)
    lines = [
        "| expert | model | licence of the weights | parameters | weights | weights on a GPU | classes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        parameters = f"{row.parameters / 1e6:.1f} M" if row.parameters else "–"
        figures = f"{parameters} | {_megabytes(row.size)} | {_megabytes(row.memory)}"
        lines.append(f"| `{row.expert}` | {row.model} | {row.license} | {figures} | {row.classes} |")
    sums = [_megabytes(sum(getattr(row, field) for row in rows)) for field in ("size", "memory")]
    total = sum(row.parameters or 0 for row in rows)
    lines.append(f"| all | | | {f'{total / 1e6:.1f} M' if total else '–'} | {' | '.join(sums)} | |")
    return "\n".join(lines)


def _row(expert: Expert) -> SuiteRow:
    model = f"`{type(expert).__name__}`" + (f" {expert.model_id}" if expert.model_id else "")
    network = _network(expert)
    if network is None:
        classes = "words" if expert.kind == "label" else "–"
        has_none = expert.size_in_bytes == 0
        return SuiteRow(expert.name, model, expert.license, 0 if has_none else None, expert.size_in_bytes, 0, classes)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    size = _bytes(network)
    place(network, torch.device("meta"), torch.float16)
    return SuiteRow(expert.name, model, expert.license, parameters, size, _bytes(network), _classes(expert, network))


def _network(expert: Expert) -> Any:
    """The expert's network on the meta device; `None` if it has none in torch."""
    from kornia.models.dexined import DexiNed

    from .architectures import ARCHITECTURES

    with torch.device("meta"):
        if isinstance(expert, PretrainedExpert):
            return ARCHITECTURES[str(expert.model_id)]()[0]
        if isinstance(expert, BaeNormals):
            return NormalNetwork()
        return DexiNed(pretrained=False) if isinstance(expert, DexiNedEdges) else None


def _classes(expert: Expert, network: torch.nn.Module) -> str:
    if expert.kind == "dense":
        return "–"
    if isinstance(expert, OpenVocabularyDetector):
        return f"any names, {expert.num_classes} by default"
    config: Any = network.config
    return str(config.num_labels)


def _bytes(network: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size else "–"
