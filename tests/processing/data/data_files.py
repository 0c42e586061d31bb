"""Writes small data sets, for the tests of `load_rows`."""

import csv
import io
import json
import tarfile

import numpy as np
from PIL import Image


def example_image(number):
    return Image.fromarray(np.full((6, 8, 3), 10 * number, np.uint8))


def png(number):
    file = io.BytesIO()
    example_image(number).save(file, "PNG")
    return file.getvalue()


def write_images(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def write_json(path, content, lines=False):
    path.write_text("\n".join(map(json.dumps, content)) + "\n" if lines else json.dumps(content))
    return str(path)


def write_csv(path, *lines, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    return str(path)


def columns(rows, *names):
    rows = list(rows)
    return [tuple(row[name] for name in names) if len(names) > 1 else row[names[0]] for row in rows]


def captioned(folder, header=("image", "caption"), **options):
    """A folder with two images and captions.csv."""
    write_images(folder, "a.png", "b.png")
    write_csv(folder / "captions.csv", header, ("a.png", "a cat"), ("b.png", "a dog, asleep"), **options)
    return str(folder)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def values_of(rows):
    """The number that each row's image was made with."""
    return [np.asarray(row["image"])[0, 0, 0] // 10 for row in rows]
