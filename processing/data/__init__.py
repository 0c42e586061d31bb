"""
Loads rows of an image and a text: from your own files, published annotation lists, or any data set that `datasets`
reads.

    rows = load_rows("photos", "caption")  # a folder with images and captions.csv
    rows = load_rows("photos/questions.jsonl", "vqa", "train[90%:]", train=False)
    rows = load_rows("cc3m/*.tar", "caption", streaming=True)

[`load_rows`] documents the sources and the columns.

| file | job |
| --- | --- |
| sources.py | opens folders, lists, tars and data sets, and chooses the split |
| lists.py, published_lists.py, tars.py | read your own lists, published lists (COCO and others), webdataset tars |
| tables.py | stores the records of lists and tars on disk |
| rows.py, grouping.py | turn records into rows, and group rows |
| texts.py, images.py | read the cells |
| answers.py | shortens answers that are too long |
| chats.py | reads conversations with images, for PrismerLM |
| faults.py | reports faulty rows |
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from ..tasks import find_task
from .answers import shorten_answers
from .chats import is_chat_file, load_chats
from .faults import checked, raise_together
from .grouping import group_by_image
from .images import images_of, leave_undecoded, refuse_doubled_names
from .lists import COLUMN_NAMES, open_text, parse_json
from .rows import RowMaker, find_columns, make_rows, stream_rows
from .sources import choose_split, open_tables
from .texts import as_text


def load_rows(
    source: Any,
    task: str = "caption",
    split: str | None = None,
    *,
    train: bool = True,
    image_folder: str | Path | list | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    class_column: str | None = None,
    key_column: str | None = None,
    split_column: str | None = None,
    class_names: dict[str, str] | str | Path | None = None,
    shots: int | None = None,
    seed: int = 0,
    streaming: bool = False,
    max_rows: int | None = None,
    bad_rows: str | None = None,
    check_images: bool = True,
    kept_columns: Sequence[str] = (),
    **own_columns: str | None,
) -> Dataset | IterableDataset:
    """
    Loads rows for training or for evaluation.

    | column | type | present |
    | --- | --- | --- |
    | `image` | `datasets.Image` | always |
    | `image_id` | str | always, except in a stream whose images have no names; the key in a label store |
    | `text` | str | for `"vqa"`: the question, unchanged |
    | `suffix` | str | in training: the caption, the answer or the class, unchanged |
    | `weight` | float | in training: the weight of the sample's loss, 1 by default |
    | `references` | list of str | in evaluation, if known: all captions, all annotators' answers, or the class |
    | `question_id` | int or str | in evaluation, for `"vqa"`: the id in result files, by default the row number |
    | `image_number` | int | in evaluation, if known: the image's id in result files |

    In training, each caption has a row, and so has each distinct answer to a question, weighted by its share among the
    answers. In evaluation, each image or each question has one row.

    Args:
        source:
            - A folder of images with a list of captions or of questions and answers, or the list itself. The list is
              `.csv`, `.tsv` (without quoting; a list of two columns, one with the names of images, needs no header),
              `.jsonl`, `.json` (a list of objects, or any orientation of `pandas.to_json`), or a text file of Flickr8k
              or Flickr30k. `COLUMN_NAMES` lists the known column names. Cells keep their text: 007 stays 007. Several
              captions or answers of an image are a list in one cell, or lines of their own. If a folder has several
              lists, those with the columns of the task are read; a word such as `train` or `val` in the file name
              gives the split.
            - A published list, recognised by its content; see published_lists.py.
            - Webdataset tars: a file, a glob (in quotes), or a folder. The text is in the sample's `.txt` or `.json`.
            - For `"classification"`: a folder with one folder of images for each class, like ImageNet.
            - Any other data set: a name on the Hub (`name:configuration`), a folder written by `save_to_disk`, a
              folder or files of Parquet, an `imagefolder`, a `Dataset`, `DatasetDict` or `IterableDataset`.
            - A Python list of sources. Their rows are joined in this order.

            An image is a path, a URL, the bytes of a file, base64, a `data:` URI, `{"bytes": …, "path": …}`, or a
            list with one of these. If a path does not exist, a file whose name differs only in case or Unicode
            normalisation is used. The numbers of a `ClassLabel` become names. If the source has only one split, its
            column `split` divides it into splits.
        task (`str`): The name of a registered task: `"caption"`, `"vqa"`, `"classification"` or your own.
        split (`str`, *optional*):
            The split, in the syntax of `datasets`: `"train"`, `"train+restval"`, `"train[:90%]"`. A file without a
            split in its name is `train`. Default: `train` in training, `validation` or else `test` in evaluation, or
            the only split.
        train (`bool`): Whether to load rows for training. Otherwise for evaluation.
        image_folder (`str`, *optional*):
            The folder that image paths are relative to, and `image_id` too: it is then the key that
            `prismer label IMAGE_FOLDER` gives. Default: the folder of the list. If `source` is a list, this can be a
            list with one folder for each.
        image_column, caption_column, question_column, answer_column, class_column (`str`, *optional*):
            Columns with other names. `image_column` can also combine columns into a path: `"{folder}/{name}.png"`.
        own_columns: The same for the columns of your own task, such as `phrase_column="text"`.
        key_column (`str`, *optional*):
            The column with the images' names, for a data set that contains its images. Default: the same as in
            `prismer label`: `key`, `id`, `image_id`, `file_name` or `__key__`, else the number of the row.
        split_column (`str`, *optional*): The column with the split, if its name is not `split`.
        class_names (`dict`, *optional*): The name of each class in words, or a file for [`read_class_names`].
        shots (`int`, *optional*): In training: the number of rows of each class, drawn at random with `seed`.
        streaming (`bool`):
            Whether to read while training. Nothing is stored on disk, and the result is an `IterableDataset`. In
            evaluation, an image that occurs several times then has several rows.
        max_rows (`int`, *optional*): The largest number of rows.
        bad_rows (`str`, *optional*):
            `"error"` raises an error if an image or a text is missing, empty or damaged. The error counts these rows
            and lists the first ten. `"skip"` leaves the rows out and gives the same report as a warning. Default:
            `"skip"` if `streaming`, since a stream meets faulty rows during training; otherwise `"error"`.
        check_images (`bool`):
            Whether to open each image before training (in a stream: when it is read). This takes about 5 ms per image
            and core. You can turn it off if `prismer label` has already read the images.
        kept_columns (`Sequence[str]`, *optional*):
            Further columns to keep, as texts, such as the type of a question. If several lines become one row, the
            first one counts.

    Returns:
        `Dataset`, or `IterableDataset` if `streaming`. Paths and texts are in the cache of `datasets` on disk, not in
        memory. Images inside a data set are not copied: if an image has several texts, its rows fetch it when they are
        read. `image` is then not a column; [`images_of`] gives all images.

    Raises:
        FileNotFoundError: The source does not exist, or image files are missing and nothing else is wrong.
        ValueError: A list cannot be read, a column or a split is missing, or rows cannot be used.

    Examples:

    ```python
    >>> from datasets import Dataset
    >>> from modeling_prismer import sample_image
    >>> from modeling_prismer.processing.data import load_rows

    >>> data = Dataset.from_dict({"image": [sample_image()], "caption": ["a red ball"]})
    >>> load_rows(data, "caption")["suffix"][:]
    ['a red ball']
    ```
    """
    found_task = find_task(task)
    own = {name.removesuffix("_column"): column for name, column in own_columns.items()}
    if unknown := sorted(set(own) - set(found_task.columns)):
        raise TypeError(f"load_rows got {unknown[0]}_column; {task!r} has the columns {', '.join(found_task.columns)}")
    sources = source if isinstance(source, list) else [source]
    streaming = streaming or any(isinstance(one, IterableDataset) for one in sources)
    bad_rows = bad_rows or ("skip" if streaming else "error")
    if bad_rows not in ("error", "skip"):
        raise ValueError(f"bad_rows is {bad_rows!r}; accepted are 'error' and 'skip'")
    if isinstance(class_names, str | os.PathLike):
        class_names = read_class_names(class_names)
    named = {"image": image_column, "caption": caption_column, "question": question_column}
    named |= {"answer": answer_column, "class": class_column, "key": key_column, "split": split_column}
    columns = {role: column for role, column in {**named, **own}.items() if column}
    folders = image_folder if isinstance(image_folder, list) else [image_folder] * len(sources)
    if len(folders) != len(sources):
        raise ValueError(f"{len(folders)} image folders for {len(sources)} sources; give one, or one for each")

    parts, problems = [], []
    for one, folder in zip(sources, folders):
        name = os.fspath(one) if isinstance(one, str | os.PathLike) else "the data set"
        try:
            tables, root = open_tables(one, found_task, folder, columns, streaming)
            records, used_column = choose_split(tables, split, train, name, split_column, streaming)
            known = find_columns(records, found_task, train, columns, name, kept_columns)
            maker = RowMaker(
                source=name,
                task=found_task,
                train=train,
                root=root,
                skip=bad_rows == "skip",
                check_images=check_images,
                columns=known | ({"split": used_column} if used_column else {}),
                features=records.features,
                class_names=class_names,
                kept=kept_columns,
            )
            if isinstance(records, IterableDataset):
                parts.append(stream_rows(records, maker))
            else:  # each record gives at least one row here, so max_rows records are enough
                enough = max_rows if train and not shots and bad_rows == "error" else None
                parts.append(make_rows(records, maker, shots if train else None, seed, enough))
        except (ValueError, FileNotFoundError) as problem:  # report the problems of all sources together
            problems.append(problem)
    raise_together(problems)
    if len(parts) > 1 and any(isinstance(part, Dataset) and part.format["type"] == "custom" for part in parts):
        raise ValueError("data sets with several texts per image can only be joined with streaming=True")
    refuse_doubled_names(parts)
    rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if max_rows is None:
        return rows
    return rows.take(max_rows) if isinstance(rows, IterableDataset) else rows.select(range(min(max_rows, len(rows))))


def read_class_names(path: str | Path) -> dict[str, str]:
    """
    Reads the names of classes in words, keyed by the names in the data. The file is a JSON object,
    `{"n01440764": "tench"}` or `{"0": ["n01440764", "tench"]}`, or has lines such as `n01440764 tench, Tinca tinca`.
    The first of several names is used. `_` becomes a space.
    """
    with open_text(Path(path)) as file:
        text = file.read()
    if str(path).lower().endswith(".json"):
        content = parse_json(text, str(path))
        if not isinstance(content, dict):
            raise ValueError(f'{path} is not a JSON object; accepted is {{"n01440764": "tench"}}')
        pairs = [(key, value) if isinstance(value, str) else value for key, value in content.items()]
    else:
        pairs = [line.strip().split(maxsplit=1) for line in text.splitlines() if line.strip()]
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ValueError(f"{path}, entry {number} is {pair!r}; it needs a class and its name")
    return {key: names.split(",")[0].strip().replace("_", " ") for key, names in pairs}


def read_candidates(path: str | Path) -> list[str]:
    """
    Reads the answers to choose from and removes duplicates. The file is a text file with one answer per line, a JSON
    list such as the published `answer_list.json`, `["yes", "no"]`, or a JSON object whose keys are the answers,
    `{"yes": 0, "no": 1}`.

    Raises:
        ValueError: The file has no answers, or an answer is not a text.
    """
    with open_text(Path(path)) as file:
        text = file.read()
    answers: list = text.splitlines()
    if text.lstrip().startswith(("[", "{")) or str(path).lower().endswith(".json"):
        content = parse_json(text, str(path))
        answers = list(content) if isinstance(content, list | dict) else [content]
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, str | int):
            raise ValueError(f"{path}, answer {number} is {answer!r}; accepted are texts")
    texts = [checked(as_text(answer), "answer").strip() for answer in answers]
    texts = [text for text in dict.fromkeys(texts) if text]
    if not texts:
        raise ValueError(f"{path} has no answers; write one per line, or a JSON list")
    return texts
