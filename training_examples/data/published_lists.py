"""
The annotation lists that were published, as their sites give them.

- Captions of COCO, Flickr8k and Flickr30k in A. Karpathy's splits: `dataset_coco.json` and its likes, from
  cs.stanford.edu/people/karpathy/deepimagesent. Pictures: `image_folder/val2014/COCO_val2014_….jpg`. Flat lists
  made of it, `[{"image": "val2014/COCO_….jpg", "caption": …}]`, are read as any list.
- Captions of COCO, from cocodataset.org: `captions_train2017.json`, `image_info_test2017.json`; of NoCaps, from
  nocaps.org: `nocaps_val_4500_captions.json`, `nocaps_test_image_info.json`. Pictures: in `image_folder` itself.
- VQAv2, from visualqa.org: `v2_OpenEnded_mscoco_train2014_questions.json`, with
  `v2_mscoco_train2014_annotations.json` beside it. Pictures: as A. Karpathy's, or all in `image_folder` itself.
- Visual Genome, from homes.cs.washington.edu/~ranjay/visualgenome: `question_answers.json`,
  `region_descriptions.json`. Pictures: in `VG_100K` and `VG_100K_2` of `image_folder`, or all in it.

CC3M, CC12M and SBU were published as URLs. What was fetched from them is read as webdataset tars, which img2dataset
writes, or as a .tsv, .csv or .json of file names and captions.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset


VISUAL_GENOME_QA_WEIGHT = 0.2


def published_reader(field: str | None, first: dict[str, Any]) -> tuple[str, Callable] | None:
    """The task of a published list and what reads it, by the field that holds its records, and the first of them."""
    if field == "questions" or (field == "annotations" and "answers" in first):
        return "vqa", read_vqa
    if field == "images" and "sentences" in first:
        return "caption", read_karpathy
    if field in ("images", "annotations"):
        return "caption", read_coco
    if "qas" in first:
        return "vqa", read_visual_genome_questions
    return ("caption", read_visual_genome_regions) if "regions" in first else None


def read_karpathy(path: Path, root: str, load_json: Callable) -> tuple[Dataset, dict[str, str]]:
    records = load_json(path, "images")
    image = "{filepath}/{filename}" if "filepath" in records.column_names else "{filename}"
    return records, {"image": image, "caption": "sentences"}


def read_coco(path: Path, root: str, load_json: Callable) -> tuple[Dataset, dict[str, str]]:
    """Of COCO and NoCaps; without annotations, as for the test pictures, its pictures alone."""
    images = load_json(path, "images")
    try:
        captions = load_json(path, "annotations")
    except ValueError:
        captions = None
    if captions is None or not len(captions):
        return images, {"image": "file_name", "image_number": "id"}
    if "caption" not in captions.column_names:
        raise ValueError(f"{path} has no captions, but {', '.join(captions.column_names)}")
    files = dict(zip(images["id"], images["file_name"]))
    lacking = set(captions["image_id"]) - files.keys()
    if lacking:
        raise ValueError(f"{path} has captions for image {min(lacking)}, which is not among its images")
    captions = captions.select_columns(["image_id", "caption"])
    captions = captions.add_column("file_name", [files[number] for number in captions["image_id"]])
    return captions, {"image": "file_name", "image_number": "image_id"}


def read_vqa(path: Path, root: str, load_json: Callable) -> tuple[Dataset, dict[str, str]]:
    """The questions of VQAv2 with their ten answers each, if the file of these is beside them."""
    named = re.search(r"OpenEnded_mscoco_((train|val|test)(?:-dev)?(\d{4}))_questions\.json$", path.name)
    if named is None:
        raise ValueError(
            f"{path}: VQAv2 is read by its files of questions under their own names, such as "
            "v2_OpenEnded_mscoco_train2014_questions.json, each with its annotations beside it"
        )
    questions = _in_order(load_json(path, "questions"))
    annotations = path.with_name(path.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))
    if annotations.exists():
        answers = _in_order(load_json(annotations, "annotations"))
        if answers["question_id"][:] != questions["question_id"][:]:
            raise ValueError(f"{annotations} has {len(answers)} questions, and not those {len(questions)} of {path}")
        questions = datasets.concatenate_datasets([questions, answers.select_columns("answers")], axis=1)
    elif named.group(2) != "test":
        raise FileNotFoundError(f"there is no {annotations.name} beside {path}; the answers are in it")
    folder = f"{named.group(2)}{named.group(3)}"  # test-dev asks about pictures of test
    image = f"COCO_{folder}_{{image_id:012d}}.jpg"
    return questions, {"image": f"{folder}/{image}" if Path(root, folder).is_dir() else image}


def _in_order(questions: Dataset) -> Dataset:
    return questions.select(np.argsort(questions["question_id"][:], kind="stable"))


def read_visual_genome_questions(path: Path, root: str, load_json: Callable) -> tuple[Dataset, dict[str, str]]:
    """Its answers are sentences; their full stop goes, as answers of VQAv2 have none."""
    return _visual_genome(load_json(path, None), "qas", root), {}


def read_visual_genome_regions(path: Path, root: str, load_json: Callable) -> tuple[Dataset, dict[str, str]]:
    return _visual_genome(load_json(path, None), "regions", root), {}


def _visual_genome(records: Dataset, entries: str, root: str) -> Dataset:
    """One row for each question or region. The published lists do not say which of two folders a picture is in."""
    folders = [folder for folder in ("VG_100K", "VG_100K_2") if Path(root, folder).is_dir()]
    places = {file.name: f"{folder}/" for folder in folders for file in Path(root, folder).iterdir()}

    def unfold(batch: dict[str, list]) -> dict[str, list]:
        rows = [(f"{number}.jpg", entry) for number, among in zip(batch["id"], batch[entries]) for entry in among]
        unfolded = {"image": [places.get(file, "") + file for file, _ in rows]}
        if entries == "regions":
            return {**unfolded, "caption": [entry["phrase"] for _, entry in rows]}
        unfolded["question"] = [entry["question"] for _, entry in rows]
        unfolded["answer"] = [entry["answer"].strip().removesuffix(".") for _, entry in rows]
        return {**unfolded, "weight": np.full(len(rows), VISUAL_GENOME_QA_WEIGHT)}

    # not from the cache: the pictures may lie elsewhere by now
    return records.map(unfold, batched=True, remove_columns=records.column_names, load_from_cache_file=False)
