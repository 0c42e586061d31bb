"""Groups rows: by image, by question, or a few rows of each class."""

from collections import defaultdict

import numpy as np
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets

from .images import WithImages, with_images


def join_references(rows: Dataset) -> Dataset:
    """Joins rows with the same image and question into one row with all their references."""
    if "references" not in rows.column_names:
        return rows
    columns = [rows[name][:] for name in ("image_id", "text", "question_id") if name in rows.column_names]
    first: dict[tuple, int] = {}
    references: dict[tuple, list[str]] = defaultdict(list)
    for row, (key, texts) in enumerate(zip(zip(*columns), rows["references"][:])):
        first.setdefault(key, row)
        references[key] += texts
    if len(first) == len(rows):
        return rows
    rows = rows.select(list(first.values())).remove_columns("references")
    return rows.add_column("references", [references[key] for key in first], feature=List(Value("string")))


def group_by_image(rows: Dataset) -> Dataset:
    """
    Joins the rows of each image into one row, in which `text`, `suffix` and `weight` are lists. The model then encodes
    each image once for all its texts, or for a random few of them (`texts_per_image` of the collator).

    Raises:
        ValueError: The rows are a stream.
    """
    if not isinstance(rows, Dataset):
        raise ValueError("the rows of a stream cannot be grouped by image; leave out streaming")
    transform = rows.format["format_kwargs"].get("transform")
    rows = rows.with_format(None)
    listed = [name for name in ("text", "suffix", "weight") if name in rows.column_names]
    first: dict[str, int] = {}
    groups: dict[str, dict[str, list]] = {name: defaultdict(list) for name in listed}
    for row, (image_id, *values) in enumerate(zip(rows["image_id"][:], *(rows[name][:] for name in listed))):
        first.setdefault(image_id, row)
        for name, value in zip(listed, values):
            groups[name][image_id].append(value)
    first_rows = list(first.values())
    columns = {"image_row": first_rows, "image_id": list(first)}
    columns |= {name: list(groups[name].values()) for name in listed}
    features = {"image_row": Value("int64"), "image_id": Value("string")}
    features |= {name: List(rows.features[name]) for name in listed}
    if isinstance(transform, WithImages):
        columns["image_row"] = rows.select(first_rows)["image_row"][:]
        return Dataset.from_dict(columns, Features(features)).with_transform(transform)
    grouped, images = Dataset.from_dict(columns, Features(features)), rows.select_columns("image")
    if images.cast_column("image", Image(decode=False))[0]["image"]["bytes"] is not None:
        return with_images(grouped, images)
    return concatenate_datasets([images.select(first_rows), grouped.remove_columns("image_row")], axis=1)


def draw_shots(rows: Dataset, shots: int, seed: int) -> Dataset:
    """
    Draws `shots` rows of each class at random. The result depends on the seed, not on the order of the rows.

    Raises:
        ValueError: A class has fewer rows.
    """
    keys, of_class = rows["image_id"][:], defaultdict(list)
    for row, name in enumerate(rows["suffix"][:]):
        of_class[name].append(row)
    generator, drawn = np.random.default_rng(seed), []
    for name in sorted(of_class):
        if len(of_class[name]) < shots:
            raise ValueError(f"class '{name}' has {len(of_class[name])} rows; each needs at least {shots}")
        by_key = sorted(of_class[name], key=lambda row: keys[row])
        drawn += [by_key[i] for i in generator.choice(len(by_key), shots, replace=False)]
    return rows.select(sorted(drawn))
