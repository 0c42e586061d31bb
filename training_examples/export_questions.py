"""
Writes the questions of easy-VQA or of Scenes as a folder that `prismer worth` and the recipes read: the images, and
`questions.jsonl` with `image`, `question`, `answer` and `type`.

    python training_examples/export_questions.py easy-vqa --max_images 200 --output_dir runs/easy-vqa-test
    python training_examples/export_questions.py scenes --data_dir runs/scenes-data --max_images 200 \\
        --output_dir runs/scenes-test

Without `--max_images`, all images of the split are written. Scenes are generated, unless `--data_dir` has a data set
of just these.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from run_easy_vqa import load_easy_vqa, question_type
from scenes.scenes import SPLITS, Scenes, ScenesConfig


Question = dict[str, str]


def questions_of_easy_vqa(split: str, max_images: int | None) -> Iterator[tuple[str, dict[str, Any], list[Question]]]:
    """The name, the image (undecoded) and the questions of each image."""
    images = load_easy_vqa(split, max_images).cast_column("image", datasets.Image(decode=False))
    for row in images:
        pairs = zip(row["text"], row["suffix"])
        asked = [{"question": text, "answer": answer, "type": question_type(answer)} for text, answer in pairs]
        yield f"{row['image_id']}.png", row["image"], asked


def questions_of_scenes(
    split: str, max_images: int | None, data_dir: str | None
) -> Iterator[tuple[str, dict[str, Any], list[Question]]]:
    """The same of scenes, which depend on split and number alone."""
    number = max_images or getattr(ScenesConfig(), split)
    builder = Scenes(cache_dir=data_dir, **{name: number if name == split else 0 for name in SPLITS})
    builder.download_and_prepare()
    scenes = builder.as_dataset(split=split).select_columns(["image_id", "image", "questions"])
    for row in scenes.cast_column("image", datasets.Image(decode=False)):
        yield f"{row['image_id']}.png", row["image"], row["questions"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["easy-vqa", "scenes"])
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--max_images", type=int, help="the first images only")
    parser.add_argument("--data_dir", help="folder for the generated scenes; by default the cache of datasets")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    if args.data == "easy-vqa":
        if args.split == "validation":
            parser.error("easy-VQA has the splits train and test")
        found = questions_of_easy_vqa(args.split, args.max_images)
    else:
        found = questions_of_scenes(args.split, args.max_images, args.data_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    images = questions = 0
    temporary = args.output_dir / ".questions.jsonl.tmp"
    with temporary.open("w") as file:
        for name, image, asked in found:
            path = args.output_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if image["bytes"] is None:
                shutil.copyfile(image["path"], path)
            else:
                path.write_bytes(image["bytes"])
            file.writelines(json.dumps({"image": name, **question}) + "\n" for question in asked)
            images += 1
            questions += len(asked)
    temporary.replace(args.output_dir / "questions.jsonl")
    print(f"{questions} questions about {images} images in {args.output_dir}")


if __name__ == "__main__":
    main()
