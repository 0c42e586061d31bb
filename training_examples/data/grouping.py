"""Sets of rows: one for a picture, one for a question, a few for a class."""

from collections import defaultdict

import numpy as np
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets

from .pictures import WithPictures, with_pictures


def join_references(rows: Dataset) -> Dataset:
    """One row for rows with the same picture and question, with the references of all of them."""
    if "references" not in rows.column_names:
        return rows
    columns = [rows[name][:] for name in ("image_id", "text", "question_id") if name in rows.column_names]
    first, references = {}, defaultdict(list)
    for row, (key, texts) in enumerate(zip(zip(*columns), rows["references"][:])):
        first.setdefault(key, row)
        references[key] += texts
    if len(first) == len(rows):
        return rows
    rows = rows.select(list(first.values())).remove_columns("references")
    return rows.add_column("references", [references[key] for key in first], feature=List(Value("string")))


def group_by_image(rows: Dataset) -> Dataset:
    """
    One row for a picture, in which `text`, `suffix` and `weight` are lists: the picture is then encoded once for all
    its texts, or for those of them that are drawn (`texts_per_image` of the collator).

    Raises:
        ValueError: of a stream, which would have to be read first.
    """
    if not isinstance(rows, Dataset):
        raise ValueError("a stream's rows cannot be grouped by their pictures; leave out streaming")
    transform = rows.format["format_kwargs"].get("transform")
    rows = rows.with_format(None)
    listed = [name for name in ("text", "suffix", "weight") if name in rows.column_names]
    first, groups = {}, {name: defaultdict(list) for name in listed}
    for row, (image_id, *values) in enumerate(zip(rows["image_id"][:], *(rows[name][:] for name in listed))):
        first.setdefault(image_id, row)
        for name, value in zip(listed, values):
            groups[name][image_id].append(value)
    pictures = list(first.values())
    columns = {"picture": pictures, "image_id": list(first), **{name: list(groups[name].values()) for name in listed}}
    features = {"picture": Value("int64"), "image_id": Value("string")}
    features |= {name: List(rows.features[name]) for name in listed}
    if isinstance(transform, WithPictures):
        columns["picture"] = rows.select(pictures)["picture"][:]
        return Dataset.from_dict(columns, Features(features)).with_transform(transform)
    grouped, images = Dataset.from_dict(columns, Features(features)), rows.select_columns("image")
    if images.cast_column("image", Image(decode=False))[0]["image"]["bytes"] is not None:
        return with_pictures(grouped, images)
    return concatenate_datasets([images.select(pictures), grouped.remove_columns("picture")], axis=1)


def draw_shots(rows: Dataset, shots: int, seed: int) -> Dataset:
    """
    So many rows of each class, drawn by the seed, whatever the order of the rows.

    Raises:
        ValueError: if a class has fewer.
    """
    keys, of_class = rows["image_id"][:], defaultdict(list)
    for row, name in enumerate(rows["suffix"][:]):
        of_class[name].append(row)
    generator, drawn = np.random.default_rng(seed), []
    for name in sorted(of_class):
        if len(of_class[name]) < shots:
            raise ValueError(f"class '{name}' has {len(of_class[name])} rows; {shots} of each class are wanted")
        by_key = sorted(of_class[name], key=lambda row: keys[row])
        drawn += [by_key[i] for i in generator.choice(len(by_key), shots, replace=False)]
    return rows.select(sorted(drawn))
