"""
The Scenes data set: rendered rooms and tables with objects and signs, true expert labels, captions, and questions with
answers.

    export PYTHONPATH=training_examples
    python -m scenes.scenes --preview 50 preview.png
    python -m scenes.scenes --scene 7 scene.png
    python -m scenes.scenes --generate --cache_dir runs/scenes-data --num_proc 2

The first command draws a sheet of fifty scenes. The second draws one enlarged scene with its six labels, and prints
its captions and questions. The third makes the data set. In a program:

    from scenes.scenes import Scenes, expert_labels

    builder = Scenes(cache_dir="runs/scenes-data")
    builder.download_and_prepare(num_proc=2)
    row = builder.as_dataset(split="test")[0]
    processor(images=row["image"], expert_labels=expert_labels(row), text=row["questions"][0]["question"])
"""

import argparse
import io
import os
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from PIL import Image

from . import composition
from .facts import describe, is_clear
from .labels import DETECTION_CLASSES, EXPERTS, true_labels
from .language import ask, captions_of
from .render import CLASSES, look, render
from .scene import DOMAINS, Scene, plan_scene, propose_scene


SPLITS = ("train", "validation", "test")
SAMPLES = 2  # rays per pixel, along each side
PROPOSALS = 25  # tries for one plan, before another plan is drawn


def make_scene(random: np.random.Generator, domain: str = "scenes", held_out: bool = False) -> Scene:
    """Draws a scene in which every object and sign is visible by the margins of facts.py, for any image size."""
    while True:
        plan = plan_scene(random, domain, held_out)
        for _ in range(PROPOSALS):
            scene = propose_scene(random, plan)
            if scene is not None and is_clear(scene, look(scene, 128)):
                return scene


def make_example(
    split: str, index: int, seed: int = 0, image_size: int = 128, domain: str = "scenes"
) -> dict[str, Any]:
    """
    Makes one example, which depends on the arguments alone.

    The scenes of the split `test` with an odd index have pairs of color and shape that never occur in training and
    validation (`HELD_OUT`). Those with an even index are like the training scenes.

    Returns:
        `dict` with `image`, uint8 (size, size, 3); `labels`, see [`true_labels`]; `captions`; `questions`; `facts`,
        see [`describe`]; `held_out`.
    """
    random = np.random.default_rng([seed, list(DOMAINS).index(domain), SPLITS.index(split), index])
    held_out = split == "test" and index % 2 == 1
    scene = make_scene(random, domain, held_out)
    view = look(scene, image_size)
    image = render(scene, image_size, SAMPLES)
    facts = describe(scene, view)
    captions = captions_of(facts)
    if domain == "scenes2":
        facts["marked"] = int(random.integers(len(facts["objects"])))
        questions = composition.ask(facts, random, held_out)
    else:
        questions = ask(facts, random, held_out)
    return {
        "image": image,
        "labels": true_labels(view, image, facts),
        "captions": captions,
        "questions": questions,
        "facts": facts,
        "held_out": held_out,
    }


# ---- the data set ----


@dataclass
class ScenesConfig(datasets.BuilderConfig):
    """
    Args:
        domain (`str`): the appearance: `"scenes"` or `"shifted"`.
        image_size (`int`): width and height of images and maps, in pixels.
        train, validation, test (`int`): numbers of scenes; a split without scenes is left out.
        seed (`int`): the seed of all scenes.
    """

    domain: str = "scenes"
    image_size: int = 128
    train: int = 12_000
    validation: int = 500
    test: int = 1_000
    seed: int = 0


class Scenes(datasets.GeneratorBasedBuilder):
    """
    The data set. `Scenes(cache_dir=…, config_name="scenes")` is for training; `"shifted"`, for studies of transfer,
    has other shades of the same colors, and other textures, light, camera and resolution. The fields of
    [`ScenesConfig`] are accepted as arguments.

    Columns: `image_id`; `image`; `depth`, `normal`, `segmentation`, `edge`, `detection` and `ocr`, maps as images;
    `detection_classes` and `detection_boxes`; `ocr_words`; `captions`, five; `questions`, a list of {question, answer,
    type}; `held_out`; `facts`, see [`describe`]. [`expert_labels`] makes expert labels from a row.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = ScenesConfig
    BUILDER_CONFIGS = [
        ScenesConfig(name="scenes", version=VERSION, description="Rooms and tables at 128x128"),
        ScenesConfig(
            name="shifted",
            version=VERSION,
            description="The same objects in other shades, textures, light and resolution",
            domain="shifted",
            image_size=192,
            train=0,
            validation=0,
            test=500,
        ),
        ScenesConfig(
            name="scenes2",
            version=datasets.Version("2.0.0"),
            description="More objects, signs and kinds of questions, with a marked object; 128x128",
            domain="scenes2",
        ),
    ]
    DEFAULT_CONFIG_NAME = "scenes"
    SHARD = 50  # scenes that a process makes at a time

    def _info(self) -> datasets.DatasetInfo:
        text, number = datasets.Value("string"), datasets.Value("float32")
        question, marked = {"question": text, "answer": text, "type": text}, {}
        if self.config.domain == "scenes2":
            question, marked = {**question, "program": text}, {"marked": datasets.Value("int32")}
        integers = datasets.List(datasets.Value("int32"))
        place = {
            "position": datasets.List(number),
            "center": datasets.List(number),
            "depth": number,
            "distance": number,
            "box": integers,
        }
        thing = {"shape": text, "color": text, "material": text, "size": text, "on_stand": datasets.Value("bool")}
        thing |= {"visible_pixels": datasets.Value("int32"), "visible_share": number, **place}
        sign = {"word": text, "on_wall": datasets.Value("bool"), "corners": datasets.List(datasets.List(number))}
        return datasets.DatasetInfo(
            description=type(self).__doc__,
            features=datasets.Features(
                {
                    "image_id": text,
                    "image": datasets.Image(),
                    **{name: datasets.Image() for name in EXPERTS},
                    "detection_classes": integers,
                    "detection_boxes": datasets.List(integers),
                    "ocr_words": datasets.List(text),
                    "captions": datasets.List(text),
                    "questions": datasets.List(question),
                    "held_out": datasets.Value("bool"),
                    "facts": {
                        "place": text,
                        "objects": datasets.List(thing),
                        "signs": datasets.List({**sign, **place}),
                        **marked,
                    },
                }
            ),
        )

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        generators = []
        for split in SPLITS:
            number = getattr(self.config, split)
            starts = range(0, number, self.SHARD)
            shards = [(split, start, min(start + self.SHARD, number)) for start in starts]
            if shards:
                generators.append(datasets.SplitGenerator(name=split, gen_kwargs={"shards": shards}))
        if not generators:
            raise ValueError("train, validation and test are all 0; at least one split needs scenes")
        return generators

    def _generate_examples(self, shards: list[tuple[str, int, int]]):
        config = self.config
        for split, start, end in shards:
            for index in range(start, end):
                example = make_example(split, index, config.seed, config.image_size, config.domain)
                yield f"{split}-{index}", as_row(example, f"{config.name}/{split}/{index:06d}")


def as_row(example: dict[str, Any], image_id: str) -> dict[str, Any]:
    """Converts an example to a row of the data set, with images and maps as PNG."""
    labels = example["labels"]
    maps = {name: labels[name]["ids"] if isinstance(labels[name], dict) else labels[name] for name in EXPERTS}
    return {
        "image_id": image_id,
        **{name: {"path": None, "bytes": _png(array)} for name, array in {"image": example["image"], **maps}.items()},
        "detection_classes": labels["detection"]["classes"],
        "detection_boxes": labels["detection"]["boxes"],
        "ocr_words": labels["ocr"]["words"],
        "captions": example["captions"],
        "questions": example["questions"],
        "held_out": example["held_out"],
        "facts": example["facts"],
    }


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def expert_labels(row: dict[str, Any], word_features=None, names: tuple[str, ...] = EXPERTS) -> dict[str, Any]:
    """
    The true labels of a row, in the form that the processor takes as `expert_labels`.

    Args:
        row (`dict`): a row of the data set, with its images decoded.
        word_features ([`WordFeatures`], *optional*, defaults to [`HashedNgrams`]): the features of words.
        names (`tuple[str]`, *optional*): the experts. `"regions"` is the marked object of Scenes 2.
    """
    maps = [name for name in names if name not in ("detection", "ocr", "regions")]
    labels: dict[str, Any] = {name: np.asarray(row[name]) for name in maps}
    if "detection" in names:
        labels["detection"] = {"ids": np.asarray(row["detection"]), "classes": list(row["detection_classes"])}
    if "ocr" in names:
        if word_features is None:
            from modeling_prismer.processing.experts.word_features import HashedNgrams

            word_features = HashedNgrams()
        words = list(row["ocr_words"])
        labels["ocr"] = {"ids": np.asarray(row["ocr"]), "words": words, "features": word_features(words)}
    if "regions" in names:
        from modeling_prismer.processing.experts import UserRegions

        box = row["facts"]["objects"][row["facts"]["marked"]]["box"]
        regions = UserRegions(word_features)
        labels["regions"] = regions.label_from([{"box": tuple(box), "name": "marked"}], row["image"])
    return {name: labels[name] for name in names}


# ---- arguments of scripts ----

NUMBERS = ("train", "validation", "test")


@dataclass
class ScenesOptions:
    """Which scenes a script opens. A mixin of the arguments of scripts."""

    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set; made if missing."})
    data_config: str = field(
        default="scenes", metadata={"help": "scenes, scenes2, or shifted, which has another appearance."}
    )
    train_scenes: int | None = field(default=None, metadata={"help": "Scenes of `train`, if not all."})
    validation_scenes: int | None = field(default=None, metadata={"help": "Scenes of `validation`, if not all."})
    test_scenes: int | None = field(default=None, metadata={"help": "Scenes of `test`, if not all."})

    def open_scenes(self) -> datasets.DatasetDict:
        numbers = self.train_scenes, self.validation_scenes, self.test_scenes
        return open_scenes(self.data_dir, self.data_config, *numbers)


def open_scenes(
    data_dir: str | None, config: str, train: int | None, validation: int | None, test: int | None
) -> datasets.DatasetDict:
    """The splits of a configuration; a number of scenes that is `None` is that of the data set."""
    numbers = {"train": train, "validation": validation, "test": test}
    own = {name: number for name, number in numbers.items() if number is not None}
    builder = Scenes(cache_dir=data_dir, config_name=config, **own)
    builder.download_and_prepare()
    return builder.as_dataset()


def first(rows: datasets.Dataset, number: int | None) -> datasets.Dataset:
    """The first rows; all if there are fewer, or without a `number`."""
    return rows.select(range(min(number or len(rows), len(rows))))


def add_data_arguments(parser: argparse.ArgumentParser, config: str) -> None:
    """Adds `--data_dir`, `--data_config` and the numbers of scenes, which [`open_data`] reads."""
    parser.add_argument("--data_dir", required=True, help="folder of the data set; made if missing")
    parser.add_argument("--data_config", default=config, choices=list(Scenes.builder_configs))
    for name in NUMBERS:
        parser.add_argument(f"--{name}", type=int, help="scenes of this split, if not those of the data set")


def open_data(arguments: argparse.Namespace) -> datasets.DatasetDict:
    """The splits of the data set that the arguments name."""
    return open_scenes(arguments.data_dir, arguments.data_config, *(getattr(arguments, name) for name in NUMBERS))


# ---- preview ----


def preview(number: int, config: ScenesConfig, split: str, columns: int = 10) -> Image.Image:
    """A sheet of the first scenes of a split."""
    size, gap = config.image_size, 4
    rows = -(-number // columns)
    sheet = Image.new("RGB", (columns * (size + gap) + gap, rows * (size + gap) + gap), "white")
    for index in range(number):
        example = make_example(split, index, config.seed, size, config.domain)
        row, column = divmod(index, columns)
        place = (gap + column * (size + gap), gap + row * (size + gap))
        sheet.paste(Image.fromarray(example["image"]), place)
    return sheet


def panel(example: dict[str, Any]) -> Image.Image:
    """The image of one example and its six labels."""
    from modeling_prismer.processing.visualization import experts_panel

    names = {"segmentation": CLASSES, "detection": DETECTION_CLASSES}
    return experts_panel(Image.fromarray(example["image"]), example["labels"], class_names=names, tile_size=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--preview", nargs=2, metavar=("NUMBER", "PNG"), help="draw a sheet of NUMBER scenes")
    action.add_argument("--scene", nargs=2, metavar=("INDEX", "PNG"), help="draw one scene with its labels")
    action.add_argument("--generate", action="store_true", help="make the data set")
    parser.add_argument("--config", default="scenes", choices=list(Scenes.builder_configs))
    parser.add_argument("--split", default="test", choices=SPLITS, help="split for --preview and --scene")
    parser.add_argument("--cache_dir", help="folder for --generate; by default the cache of datasets")
    parser.add_argument("--num_proc", type=int, default=1)
    for name in ("train", "validation", "test", "image_size", "seed"):
        parser.add_argument(f"--{name}", type=int, default=None)
    arguments = parser.parse_args()
    names = ("train", "validation", "test", "image_size", "seed")
    chosen = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    config = ScenesConfig(**{**vars(Scenes.builder_configs[arguments.config]), **chosen})

    if arguments.preview:
        preview(int(arguments.preview[0]), config, arguments.split).save(arguments.preview[1])
    elif arguments.scene:
        index = int(arguments.scene[0])
        example = make_example(arguments.split, index, config.seed, config.image_size, config.domain)
        panel(example).save(arguments.scene[1])
        print(*example["captions"], "", sep="\n")
        for each in example["questions"]:
            print(f"{each['type']:10}{each['question']}  {each['answer']}")
    else:
        from .scenes import Scenes as Builder  # the name by which other processes can import it

        builder = Builder(cache_dir=arguments.cache_dir, config_name=arguments.config, **chosen)
        builder.download_and_prepare(num_proc=arguments.num_proc if arguments.num_proc > 1 else None)
        print(builder.as_dataset())
        print(os.path.abspath(builder.cache_dir))


if __name__ == "__main__":
    main()
