"""
Rows of a picture and a text to train on, from a user's own files, the published annotation lists, and any data set
that `datasets` reads.

    rows = load_rows("photos", "caption")  # a folder with pictures and captions.csv
    rows = load_rows("photos/questions.jsonl", "vqa", "train[90%:]", train=False)
    rows = load_rows("cc3m/*.tar", "caption", streaming=True)

[`load_rows`] says what it reads and what a row holds. sources.py opens folders, tars and data sets, lists.py a user's
lists, published_lists.py those of COCO and the like, tars.py webdataset tars; tables.py keeps their records on the
disk; rows.py makes rows of what they give; texts.py and pictures.py read the cells; faults.py reports what is wrong.
"""

import os
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from modeling_prismer.processing.tasks import find_task

from .answers import shorten_answers
from .faults import checked, raise_together
from .grouping import group_by_image
from .lists import COLUMN_NAMES, open_text, parse_json
from .pictures import leave_undecoded, pictures_of, refuse_doubled_names
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
    check_pictures: bool = True,
    **own_columns: str | None,
) -> Dataset | IterableDataset:
    """
    Rows to train on or to evaluate with.

    | column | type | which rows have it |
    | --- | --- | --- |
    | `image` | `datasets.Image` | all |
    | `image_id` | str | all but those of a stream that does not name its pictures; the key in a label store |
    | `text` | str | for `"vqa"`: the question, as it was written |
    | `suffix` | str | to train: the caption, the answer or the class, as it was written |
    | `weight` | float | to train: the weight of the sample's loss, 1 if nothing says otherwise |
    | `references` | list of str | to evaluate, if known: all captions, all annotators' answers, or the class |
    | `question_id` | int or str | to evaluate `"vqa"`: what result files name; else the number of the row |
    | `image_number` | int | to evaluate, if known: the same for captions |

    To train there is one row for each caption of a picture, or for each distinct answer to a question, weighted by
    its share among the answers. To evaluate there is one row for each picture, or for each question.

    Args:
        source:
            - A folder of pictures with a list of captions or of questions and answers, or the list itself: `.csv`;
              `.tsv` (nothing is quoted there; it needs no header where one of two columns has the pictures' names);
              `.jsonl`; a `.json` that is a list of objects, or in any orientation of `pandas.to_json`; the text files
              of Flickr8k and Flickr30k. Columns are known by their usual names, `COLUMN_NAMES`. Cells stay as they
              were written: 007 and 2.50 are texts. Several captions or answers may be a list, or lines of their own.
              Of several lists in a folder those count whose columns fit the task; a word such as `train` or `val` in
              a file's name tells the splits apart.
            - A published list, known by what is in it; published_lists.py says which.
            - Webdataset tars: a file, a glob (in quotes), or a folder of them. A picture's text may be its `.txt`, or
              in its `.json`.
            - For `"classification"` a folder that has a folder of pictures for each class, as ImageNet's.
            - Any other data set: its name on the Hub (`name:configuration`), a folder that `save_to_disk` wrote, a
              folder or files of Parquet, an `imagefolder`, a `Dataset`, `DatasetDict` or `IterableDataset`.
            - A Python list of all these: their rows one after another.

            A picture is a path, a URL, the bytes of a file, base64, a `data:` URI, `{"bytes": …, "path": …}`, or a
            list of one of these. A path that is not there is looked for without regard to case and Unicode's normal
            form. Numbers of a `ClassLabel` become their names. A column `split` of a source that has one split tells
            its splits apart.
        task (`str`): The name of a registered task: `"caption"`, `"vqa"`, `"classification"` or your own.
        split (`str`, *optional*):
            As `datasets` writes it: `"train"`, `"train+restval"`, `"train[:90%]"`; a file whose name says no split is
            `train`. By default `train` to train, `validation` or else `test` to evaluate, or the only one there is.
        train (`bool`): Whether the rows are to train on.
        image_folder (`str`, *optional*):
            What the pictures' paths start from, and `image_id` too: then it is the key that
            `prismer label IMAGE_FOLDER` gives. By default the list's folder. One for each source, if it is a list.
        image_column, caption_column, question_column, answer_column, class_column (`str`, *optional*):
            Columns that are called otherwise. `image_column` may also make a path of several: `"{folder}/{name}.png"`.
        own_columns: The same for the columns of a task of your own, such as `phrase_column="text"`.
        key_column (`str`, *optional*): Of a data set that brings its pictures: their names. By default what
            `prismer label` takes: `key`, `id`, `image_id`, `file_name` or `__key__`, else the number of the row.
        split_column (`str`, *optional*): The column that tells splits apart, if it is not called `split`.
        class_names (`dict`, *optional*): What to call each class in words; [`read_class_names`] reads such.
        shots (`int`, *optional*): To train: so many rows of each class, drawn by `seed`.
        streaming (`bool`):
            Read while training; nothing is stored, and an `IterableDataset` comes back. To evaluate, a picture that
            comes several times then has several rows.
        max_rows (`int`, *optional*): No more rows than these.
        bad_rows (`str`, *optional*):
            `"error"` refuses data in which a picture or a text is missing, empty or damaged, and names the rows of
            all such faults, the first ten in full; `"skip"` leaves these rows out with the same report as a warning.
            By default `"error"`, and `"skip"` if `streaming`, as a stream shows its rows too late.
        check_pictures (`bool`):
            Whether to open each picture beforehand (of a stream as it comes), about 5 ms each on a core. Switch it
            off where `prismer label` has looked at them already.

    Returns:
        `Dataset`, or `IterableDataset` if `streaming`. Paths and texts lie in `datasets`' cache on the disk, not in
        memory. Pictures that a data set brings are not copied: if some have several texts, rows look them up when
        they are read (`image` is then no column; [`pictures_of`] gives all pictures).

    Raises:
        FileNotFoundError: if there is no such file, or if nothing is wrong but that pictures are missing.
        ValueError: if a list cannot be read, a column or a split is missing, or rows cannot be used.
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
    columns = {"image": image_column, "caption": caption_column, "question": question_column}
    columns |= {"answer": answer_column, "class": class_column, "key": key_column, "split": split_column}
    columns = {role: column for role, column in {**columns, **own}.items() if column}
    folders = image_folder if isinstance(image_folder, list) else [image_folder] * len(sources)
    if len(folders) != len(sources):
        raise ValueError(f"{len(folders)} image folders for {len(sources)} sources; give one, or one for each")

    parts, problems = [], []
    for one, folder in zip(sources, folders):
        name = os.fspath(one) if isinstance(one, str | os.PathLike) else "the data set"
        try:
            tables, root = open_tables(one, found_task, folder, columns, streaming)
            records, used_column = choose_split(tables, split, train, name, split_column, streaming)
            known = find_columns(records, found_task, train, columns, name)
            maker = RowMaker(
                source=name,
                task=found_task,
                train=train,
                root=root,
                skip=bad_rows == "skip",
                check_pictures=check_pictures,
                columns=known | ({"split": used_column} if used_column else {}),
                features=records.features,
                class_names=class_names,
            )
            if isinstance(records, IterableDataset):
                parts.append(stream_rows(records, maker))
            else:  # where each record gives a row at least, not all have to be looked at
                enough = max_rows if train and not shots and bad_rows == "error" else None
                parts.append(make_rows(records, maker, shots if train else None, seed, enough))
        except (ValueError, FileNotFoundError) as problem:  # what is wrong with the others is said as well
            problems.append(problem)
    raise_together(problems)
    if len(parts) > 1 and any(isinstance(part, Dataset) and part.format["type"] == "custom" for part in parts):
        raise ValueError("data sets whose pictures have several texts each can only be joined with streaming=True")
    refuse_doubled_names(parts)
    rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    if max_rows is None:
        return rows
    return rows.take(max_rows) if isinstance(rows, IterableDataset) else rows.select(range(min(max_rows, len(rows))))


def read_class_names(path: str | Path) -> dict[str, str]:
    """
    What classes are called in words, by their names in the data: of a `.json` object, `{"n01440764": "tench"}` or
    `{"0": ["n01440764", "tench"]}`, or a text file of lines `n01440764 tench, Tinca tinca`, where the first name
    counts. `_` becomes a space.
    """
    with open_text(Path(path)) as file:
        text = file.read()
    if str(path).lower().endswith(".json"):
        content = parse_json(text, str(path))
        if not isinstance(content, dict):
            raise ValueError(f'{path} holds no object; {{"n01440764": "tench"}} is needed')
        pairs = [(key, value) if isinstance(value, str) else value for key, value in content.items()]
    else:
        pairs = [line.strip().split(maxsplit=1) for line in text.splitlines() if line.strip()]
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
            raise ValueError(f"{path}, entry {number} is {pair!r}; a class and its name are needed")
    return {key: names.split(",")[0].strip().replace("_", " ") for key, names in pairs}


def read_candidates(path: str | Path) -> list[str]:
    """
    The answers to choose from, each once: of a text file with one a line; of a JSON list, `["yes", "no"]`, as
    `answer_list.json` was published; or the keys of a JSON object, `{"yes": 0, "no": 1}`.

    Raises:
        ValueError: if there is none, or one is no text.
    """
    with open_text(Path(path)) as file:
        text = file.read()
    answers: list = text.splitlines()
    if text.lstrip().startswith(("[", "{")) or str(path).lower().endswith(".json"):
        content = parse_json(text, str(path))
        answers = list(content) if isinstance(content, list | dict) else [content]
    for number, answer in enumerate(answers, 1):
        if not isinstance(answer, str | int):
            raise ValueError(f"{path}, answer {number} is {answer!r}; a list of texts is needed")
    texts = [checked(as_text(answer), "answer").strip() for answer in answers]
    texts = [text for text in dict.fromkeys(texts) if text]
    if not texts:
        raise ValueError(f"{path} has no answers; write one a line, or a JSON list")
    return texts
