"""
Reads published annotation lists, unchanged from their sites.

| data | file | images below `image_folder` |
| --- | --- | --- |
| COCO, Flickr8k and Flickr30k in A. Karpathy's splits (cs.stanford.edu/people/karpathy/deepimagesent) | `dataset_coco.json` and similar | `val2014/COCO_val2014_….jpg` |
| COCO (cocodataset.org), NoCaps (nocaps.org) | `captions_train2017.json`, `nocaps_val_4500_captions.json`, `image_info_test2017.json` | the folder itself |
| VQAv2, OK-VQA (visualqa.org, okvqa.allenai.org) | `v2_OpenEnded_mscoco_train2014_questions.json`, with its annotations next to it | `train2014`, or the folder itself |
| A-OKVQA (allenai.org) | `aokvqa_v1p0_train.json` | `train2017`, or the folder itself |
| GQA (cs.stanford.edu/people/dorarad/gqa) | `train_balanced_questions.json` | `images`, or the folder itself |
| TextVQA (textvqa.org) | `TextVQA_0.5.1_train.json` | `train_images` and `test_images`, or the folder itself |
| Visual Genome (homes.cs.washington.edu/~ranjay/visualgenome) | `question_answers.json`, `region_descriptions.json` | `VG_100K` and `VG_100K_2`, or the folder itself |

lists.py reads the text files of Flickr8k and Flickr30k. CC3M, CC12M and SBU were published as URLs. If img2dataset has
fetched them, tars.py reads its tars, or lists.py a list of the files.
"""  # noqa: E501

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .faults import BadRecord


CAPTIONS, QUESTIONS = ("caption",), ("question", "answer")
VISUAL_GENOME_QA_WEIGHT = 0.2

Record = dict[str, Any] | BadRecord


@dataclass
class PublishedList:
    """The columns of a published list, and its reader, which takes the path, the image folder and a JSON reader."""

    columns: tuple[str, ...]
    read: Callable[[Path, str, Callable[[Path], Any]], Iterator[Record]]


def published_list(field: str | None, first: dict[str, Any]) -> PublishedList | None:
    """
    Recognises a published list, or returns `None` for your own list.

    Args:
        field (`str`, *optional*):
            The field that holds the records. `None` if the file is a list; `""` if it has one object per line.
        first (`dict`): The first record.
    """
    if field == "":
        return None
    if field == "questions" or (field == "annotations" and "answers" in first):
        return PublishedList(QUESTIONS, read_vqa)
    if field == "images" and "sentences" in first:
        return PublishedList(CAPTIONS, read_karpathy)
    if field == "images" or (field == "annotations" and "image_id" in first):
        return PublishedList(CAPTIONS, read_coco)
    if "imageId" in first and "question" in first:
        return PublishedList(QUESTIONS, read_gqa)
    if "image_id" in first and "question" in first and not {"image", "file_name"} & first.keys():
        if field == "data":
            return PublishedList(QUESTIONS, read_textvqa)
        if "choices" in first:
            return PublishedList(QUESTIONS, read_aokvqa)
    if "qas" in first:
        return PublishedList(QUESTIONS, read_visual_genome)
    return PublishedList(CAPTIONS, read_visual_genome) if "regions" in first else None


def _in_folder(root: str, *folders: str) -> str:
    """The first of the folders that exists in the root, `"train2017/"`; `""` if the root itself has the images."""
    return next((f"{folder}/" for folder in folders if Path(root, folder).is_dir()), "")


def read_karpathy(path: Path, root: str, load_json: Callable) -> Iterator[Record]:
    for entry in load_json(path)["images"]:
        folder = f"{entry['filepath']}/" if "filepath" in entry else ""
        yield {**entry, "image": f"{folder}{entry['filename']}", "caption": entry.get("sentences")}


def read_coco(path: Path, root: str, load_json: Callable) -> Iterator[Record]:
    """COCO and NoCaps. A list without annotations, such as that of the test images, gives only the images."""
    content = load_json(path)
    files: dict[str, str] = {}  # ids may be numbers or texts
    twice: dict[str, str] = {}
    for image in content.get("images") or []:
        name = files.setdefault(str(image["id"]), image["file_name"])
        if name != image["file_name"]:
            twice[str(image["id"])] = f"id {image['id']} names two images, {name} and {image['file_name']}"
    captions = content.get("annotations") or []
    if captions and "caption" not in captions[0]:
        raise ValueError(f"{path} has no captions; its annotations have {', '.join(captions[0])}")
    if captions and not files:
        raise ValueError(f"{path} has no field 'images' with the file names; use the list that has both")
    if not captions:
        for image in content["images"]:
            known = str(image["id"])
            yield BadRecord(twice[known]) if known in twice else {**image, "image_number": image["id"]}
    for caption in captions:
        known = str(caption["image_id"])
        if known in twice:
            yield BadRecord(twice[known])
        elif known not in files:
            yield BadRecord(f"the caption belongs to image {known}, which the list does not have")
        else:
            texts = {"caption": caption.get("caption"), "image_number": caption["image_id"]}
            yield {"file_name": files[known], **texts}


def read_vqa(path: Path, root: str, load_json: Callable) -> Iterator[Record]:
    """VQAv2 and OK-VQA: the questions, with ten answers each if the annotations are next to them."""
    named = re.search(r"OpenEnded_mscoco_((train|val|test)(?:-dev)?(\d{4}))_questions\.json$", path.name)
    if named is None:
        raise ValueError(
            f"{path} does not have the published name of a VQAv2 file of questions, such as "
            "v2_OpenEnded_mscoco_train2014_questions.json; its annotations must be next to it"
        )
    questions = sorted(load_json(path)["questions"], key=lambda question: question["question_id"])
    annotations = path.with_name(path.name.replace("OpenEnded_", "").replace("_questions", "_annotations"))
    answers: dict[int, dict[str, Any]] = {}
    if annotations.exists():
        for entry in load_json(annotations)["annotations"]:
            kept = {field: entry[field] for field in ("question_type", "answer_type") if field in entry}
            answers[entry["question_id"]] = {"answers": entry["answers"], **kept}
        if answers.keys() != {question["question_id"] for question in questions}:
            raise ValueError(f"{annotations} has {len(answers)} questions, other than the {len(questions)} of {path}")
    elif named.group(2) != "test":
        raise FileNotFoundError(f"{annotations.name} with the answers is missing next to {path}")
    name = f"{named.group(2)}{named.group(3)}"  # test-dev has images of test
    folder = _in_folder(root, name)
    for question in questions:
        image = f"{folder}COCO_{name}_{int(question['image_id']):012d}.jpg"
        yield {"image": image, **question, **answers.get(question["question_id"], {})}


def read_aokvqa(path: Path, root: str, load_json: Callable) -> Iterator[Record]:
    """A-OKVQA. Its images are those of COCO 2017; test questions have no answers."""
    for entry in load_json(path):
        folder = _in_folder(root, f"{entry.get('split', 'train')}2017")
        answers = {"answers": entry["direct_answers"]} if "direct_answers" in entry else {}
        yield {"image": f"{folder}{int(entry['image_id']):012d}.jpg", **entry, **answers}


def read_gqa(path: Path, root: str, load_json: Callable) -> Iterator[Record]:
    folder = _in_folder(root, "images")
    for number, entry in load_json(path).items():
        yield {"question_id": number, "image": f"{folder}{entry['imageId']}.jpg", **entry}


def read_textvqa(path: Path, root: str, load_json: Callable) -> Iterator[Record]:
    """TextVQA. The images of its validation split are in the folder of the training images."""
    for entry in load_json(path)["data"]:
        folder = _in_folder(root, "test_images" if entry.get("set_name") == "test" else "train_images")
        yield {"image": f"{folder}{entry['image_id']}.jpg", **entry}


def read_visual_genome(path: Path, root: str, load_json: Callable) -> Iterator[Record]:
    """
    Visual Genome: one record for each question or region. The lists do not tell which of two folders has an image. The
    full stop of an answer is removed, since answers of VQAv2 have none.
    """
    folders = [folder for folder in ("VG_100K", "VG_100K_2") if Path(root, folder).is_dir()]
    places = {file.name: f"{folder}/" for folder in folders for file in Path(root, folder).iterdir()}
    for entry in load_json(path):
        name = f"{entry['id']}.jpg"
        image = {"image": places.get(name, "") + name}
        for region in entry.get("regions", []):
            yield {**image, "caption": region["phrase"]}
        for question in entry.get("qas", []):
            answer = question["answer"].strip().removesuffix(".")
            yield {**image, "question": question["question"], "answer": answer, "weight": VISUAL_GENOME_QA_WEIGHT}
