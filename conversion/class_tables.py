"""Checks whether a table of class features belongs to the labels of an expert, and whether its rows are in order."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from modeling_prismer.expert_spec import BACKGROUND


MOST = 0.9  # share of rows that must be closest to the features of their own names


def difference_of_names(table: Sequence[str], labels: Sequence[str]) -> str | None:
    """
    The difference between the class names of a table and those of an expert's labels. Case and punctuation do not
    count, nor names that are spelt differently, as long as they are not the name of another row.

    Args:
        table (`Sequence[str]`): the names of the table's rows.
        labels (`Sequence[str]`): the names of the expert's classes.

    Returns:
        `str`: what is different; `None` if they belong together.
    """
    rows, classes = [_plain(name) for name in table], [_plain(name) for name in labels]
    if len(rows) != len(classes):
        return f"the table has {len(rows)} classes, the expert has {len(classes)}"
    wrong = [i for i, (row, name) in enumerate(zip(rows, classes)) if row != name]
    moved = [i for i in wrong if classes[i] in rows]
    if not moved and len(wrong) <= len(rows) / 2:
        return None
    if not moved:
        first = wrong[0]
        kind = "other classes"
    else:
        first = moved[0]
        kind = "the classes are shifted by one" if _is_shifted(rows, classes) else "the classes are in another order"
    return (
        f"{kind}: {len(wrong)} of {len(rows)} names differ; class {first} is '{table[first]}' in the table and "
        f"'{labels[first]}' in the expert"
    )


def other_spellings(table: Sequence[str], labels: Sequence[str]) -> int:
    """The number of classes that are spelt differently, apart from case and punctuation."""
    return sum(_plain(row) != _plain(name) for row, name in zip(table, labels))


def _plain(name: str) -> str:
    return "".join(re.findall(r"\w+", name.lower())).replace("_", "")


def _is_shifted(rows: list[str], classes: list[str]) -> bool:
    return rows[:-1] == classes[1:] or rows[1:] == classes[:-1]


def possible_orders(table: Sequence[str] | None, labels: Sequence[str] | None) -> dict[str, list[int]]:
    """
    Orders that an expert's classes may have by mistake, for [`examine_stem`].

    Args:
        table (`Sequence[str]`, *optional*): the names of the table's rows.
        labels (`Sequence[str]`, *optional*): the names of the expert's classes.
    """
    orders: dict[str, list[int]] = {}
    if table is None:
        return orders
    rows = {_plain(name): index for index, name in reversed(list(enumerate(table)))}
    if labels is not None and difference_of_names(table, labels) is not None:
        orders["its classes are in another order than the table (by their names)"] = [
            rows.get(_plain(name), BACKGROUND) for name in labels
        ]
    alphabetical = sorted(range(len(table)), key=lambda index: table[index].lower())
    if alphabetical != list(range(len(table))):
        orders["its classes are numbered in alphabetical order"] = alphabetical
    return orders


def fault_of_table(features: torch.Tensor, background: torch.Tensor, names: Sequence[str] | None) -> str | None:
    """
    Finds an error in a table, without its encoder. Returns `None` if there is none.

    Args:
        features (`torch.Tensor` of shape `(classes, channels)`): the rows.
        background (`torch.Tensor` of shape `(channels,)`): the feature of the background.
        names (`Sequence[str]`, *optional*): the names of the rows.
    """
    if not torch.isfinite(features).all() or not torch.isfinite(background).all():
        return "it has numbers that are not finite"
    if not background.any():
        return "the feature of the background is zero: it was converted without background_features.pt"
    if empty := (features == 0).all(1).nonzero()[:, 0].tolist():
        return f"{len(empty)} rows are zero, first row {empty[0]}"
    if names is None:
        return None
    first_of: dict[str, int] = {}
    for index, name in enumerate(names):
        first = first_of.setdefault(name, index)
        if not torch.allclose(features[first], features[index], atol=1e-3):
            return f"rows {first} and {index} have the same name '{name}' and different features: names are misplaced"
    rows, distinct = features[list(first_of.values())], list(first_of)
    _, group, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    if (counts > 1).any():
        one, other = (group == counts.argmax()).nonzero()[:2, 0].tolist()
        return f"'{distinct[one]}' and '{distinct[other]}' have the same features: names are misplaced"
    return None


def fault_of_order(
    features: torch.Tensor, names: Sequence[str], text_features: Callable[[list[str]], np.ndarray]
) -> str | None:
    """
    Checks that each row of a table has the features of its name. Returns `None` if it has.

    Args:
        features (`torch.Tensor` of shape `(classes, channels)`): the rows.
        names (`Sequence[str]`): their names.
        text_features (`Callable`): the encoder of the table, such as [`ClipTextFeatures`] with the published analysis.
    """
    distinct = sorted(set(names))
    expected = torch.as_tensor(np.asarray(text_features(distinct)), dtype=torch.float64)
    closest = torch.cdist(features.double().cpu(), expected).argmin(1)
    own = torch.tensor([distinct.index(name) for name in names])
    share = (closest == own).double().mean().item()
    if share >= MOST:
        return None
    first = int((closest != own).nonzero()[0])
    return (
        f"only {share:.0%} of the rows have the features of their names: row {first}, '{names[first]}', is closest to "
        f"'{distinct[int(closest[first])]}'"
    )
