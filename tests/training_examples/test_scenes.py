"""Images, labels, questions and captions of Scenes agree with the scene, and are reproducible."""

import hashlib
import inspect
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_prismer import PrismerImageProcessor
from modeling_prismer.expert_spec import BACKGROUND
from modeling_prismer.processing.experts import RapidOcrText
from scenes import facts as truth
from scenes import language, run_scenes
from scenes.labels import DETECTION_CLASSES, EXPERTS
from scenes.language import CAPTIONS, TYPES, ask, captions_of, mentions, true_share
from scenes.render import CLASSES, _trace, look
from scenes.scene import COLORS, DOMAINS, HELD_OUT, MATERIALS, SHAPES, SIZES
from scenes.scenes import Scenes, as_row, expert_labels, make_example, make_scene
from scenes.words import WORDS


ROOT = Path(__file__).parents[2]
DRAWN = 10  # scenes with images
TOLD = 80  # scenes without images


@pytest.fixture(scope="module")
def examples():
    return [make_example("train", index) for index in range(DRAWN)]


@pytest.fixture(scope="module")
def views():
    """The scenes of `examples`, with their views."""
    scenes = [make_scene(np.random.default_rng([0, 0, 0, index])) for index in range(DRAWN)]
    return [(scene, look(scene, 128)) for scene in scenes]


@lru_cache
def told(held_out: bool = False, domain: str = "scenes"):
    """Facts and questions of scenes that are not rendered."""
    found = []
    for index in range(TOLD if domain == "scenes" and not held_out else TOLD // 3):
        random = np.random.default_rng([5, index])
        scene = make_scene(random, domain, held_out)
        facts = truth.describe(scene, look(scene, 128))
        found.append((facts, ask(facts, random, held_out)))
    return found


# ---- reproducible ----


def digest(split, index, **arguments):
    row = as_row(make_example(split, index, **arguments), "name")
    return hashlib.sha256(repr(sorted(row.items())).encode()).hexdigest()


def test_same_seed_gives_same_bytes_in_another_process():
    # the function alone, without the imports of this module
    script = f"import hashlib\nfrom scenes.scenes import as_row, make_example\n{inspect.getsource(digest)}"
    command = [sys.executable, "-c", f"{script}\nprint(digest('train', 3), digest('test', 1))"]
    printed = subprocess.check_output(command, cwd=ROOT / "training_examples", text=True).split()
    assert printed == [digest("train", 3), digest("test", 1)]


def test_scene_depends_on_split_seed_index_and_domain():
    small = {"image_size": 32}
    found = [digest("train", 0, **small), digest("validation", 0, **small), digest("train", 1, **small)]
    found += [digest("train", 0, seed=1, **small), digest("train", 0, domain="shifted", **small)]
    assert len(set(found)) == len(found)


def test_scene_does_not_depend_on_the_resolution():
    small, large = (make_example("train", 2, image_size=size) for size in (64, 128))
    assert [o["position"] for o in small["facts"]["objects"]] == [o["position"] for o in large["facts"]["objects"]]
    reduced = large["image"].reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(reduced - small["image"]).mean() < 4


# ---- images ----


def test_images_are_neither_dark_nor_overexposed(examples):
    for example in examples:
        assert example["image"].shape == (128, 128, 3) and example["image"].dtype == np.uint8
        assert 60 < example["image"].mean() < 200
        assert (example["image"] == 255).all(-1).mean() < 0.05


def test_every_ray_hits_a_part_and_normals_are_unit_vectors(views):
    for _, view in views:
        assert (view.part >= 0).all() and np.isfinite(view.depth).all() and (view.depth > 0).all()
        assert np.abs(np.linalg.norm(view.normal, axis=-1) - 1).max() < 1e-4


def test_visible_surfaces_face_the_camera(views):
    for scene, view in views:
        across = ((np.arange(128) + 0.5) / 128 - 0.5) / scene.camera.focal_length
        rays = np.stack(np.broadcast_arrays(across, -across[:, None], -1.0), axis=-1)
        facing = -(rays * view.normal).sum(-1)
        # sphere tracing is inexact at the outline of a ring
        assert facing.min() > -0.15 and (facing < 0).mean() < 1e-3


def test_each_object_is_at_its_projected_center(views):
    for scene, view in views:
        for number, thing in enumerate(scene.things):
            x, y, depth = scene.camera.project(thing.center)[0]
            mask = view.mask(thing=number)
            rows, columns = np.nonzero(mask)
            assert columns.min() - 1 <= x * 128 <= columns.max() + 1 or mask.sum() < view.whole.max()
            near = np.hypot(rows - y * 128, columns - x * 128).min()
            # the center of a ring is a hole
            assert near < 0.8 * thing.radius * scene.camera.focal_length * 128 / depth
            # the surface is near the center
            assert np.abs(view.depth[mask] - depth).max() < 1.5 * thing.radius


def test_hidden_parts_are_behind_visible_ones(views):
    """A part rendered alone has the same depth where it is visible; where it is hidden, the scene is nearer."""
    hidden = 0
    for scene, view in views[:5]:
        for number, part in enumerate(view.parts):
            if part.thing is None:
                continue
            alone, _, whole, _, _ = _trace(scene.camera, [part], 128)
            seen = view.part == number
            assert np.array_equal(alone[seen], view.depth[seen])
            behind = np.isfinite(alone) & ~seen
            assert (view.depth[behind] <= alone[behind]).all()
            assert whole[0] == seen.sum() + behind.sum() == view.whole[number]
            hidden += behind.sum()
    assert hidden > 100


def test_normals_of_balls_and_planes_match_their_depth(views):
    for scene, view in views:
        right, up, forward = scene.camera.axes
        floor = np.isin(view.part, [k for k, part in enumerate(view.parts) if part.label == "floor"])
        expected = np.array([right[2], up[2], -forward[2]])
        assert np.abs(view.normal[floor] - expected).max(initial=0) < 1e-5
        for number, thing in enumerate(scene.things):
            if thing.shape == "ball":
                mask = view.mask(thing=number)
                middle = scene.camera.project(thing.center)[0, 2]
                assert np.abs((middle - view.depth[mask]) / thing.radius - view.normal[mask][:, 2]).max() < 1e-3


# ---- labels ----


def test_labels_have_the_form_of_the_experts(examples):
    for example in examples:
        labels = example["labels"]
        assert tuple(labels) == EXPERTS
        for name in ("depth", "segmentation", "edge"):
            assert labels[name].shape == (128, 128) and labels[name].dtype == np.uint8
        assert labels["normal"].shape == (128, 128, 3) and labels["normal"].dtype == np.uint8
        for name, ids, entries in (("detection", "classes", "boxes"), ("ocr", "words", "words")):
            label = labels[name]
            assert label["ids"].shape == (128, 128) and label["ids"].dtype == np.uint8
            numbers = set(np.unique(label["ids"]).tolist()) - {BACKGROUND}
            assert numbers <= set(range(len(label[ids]))) and len(label[ids]) == len(label[entries])


def test_depth_label_is_bright_at_the_nearest_point(examples, views):
    for example, (_, view) in zip(examples, views):
        depth = example["labels"]["depth"]
        assert depth.min() == 0 and depth.max() == 255
        assert depth.flat[view.depth.argmin()] == 255 and depth.flat[view.depth.argmax()] == 0


def test_edges_are_dark_lines_along_outlines(examples):
    for example in examples:
        edge, segments = example["labels"]["edge"], example["labels"]["segmentation"]
        assert edge.min() == 0 and edge.max() == 255 and np.median(edge) > 200
        outline = np.zeros(segments.shape, bool)
        outline[:, 1:] |= segments[:, 1:] != segments[:, :-1]
        assert edge[outline].mean() < 70


def test_segments_and_boxes_match_the_objects(examples):
    for example in examples:
        labels, objects = example["labels"], example["facts"]["objects"]
        count = Counter(DETECTION_CLASSES[number] for number in labels["detection"]["classes"])
        assert count == Counter([*(o["shape"] for o in objects), *("sign" for _ in example["facts"]["signs"])])
        for thing in objects:
            assert thing["box"] in labels["detection"]["boxes"]
            left, top, right, bottom = thing["box"]
            own = labels["segmentation"] == CLASSES.index(thing["shape"])
            assert own[top:bottom, left:right].sum() >= thing["visible_pixels"]


def test_words_are_on_their_boards(examples):
    for example in examples:
        label = example["labels"]["ocr"]
        assert set(label["words"]) == {sign["word"] for sign in example["facts"]["signs"]} <= set(WORDS)
        for number in range(len(label["words"])):
            region = label["ids"] == number
            assert region.sum() > 100
            on_sign = example["labels"]["segmentation"][region] == CLASSES.index("sign")
            assert on_sign.mean() > 0.97


@pytest.mark.parametrize("size", [64, 192])
def test_labels_have_the_size_of_the_image(size):
    example = make_example("test", 1, image_size=size, domain="shifted")
    assert example["image"].shape == (size, size, 3)
    assert {example["labels"][name].shape[:2] for name in ("depth", "normal", "segmentation", "edge")} == {
        (size, size)
    }


def test_ocr_reads_signs(examples):
    pytest.importorskip("rapidocr")
    chosen = [example for example in examples if example["facts"]["signs"]][:4]
    found = RapidOcrText(num_threads=1)([Image.fromarray(example["image"]) for example in chosen])
    signs = [
        (sign["word"], label["words"]) for example, label in zip(chosen, found) for sign in example["facts"]["signs"]
    ]
    assert sum(word in words for word, words in signs) >= len(signs) - 1


# ---- questions, answered again from their words ----

ATTRIBUTES = "|".join([*SIZES, *MATERIALS, *COLORS])
NAME = rf"the ((?:(?:{ATTRIBUTES}) )+object|(?:(?:{ATTRIBUTES}) )*(?:{'|'.join(SHAPES)}))"
NAME_OR_SIGN = NAME[:-1] + "|sign)"


def called(name: str, facts: dict) -> dict:
    """The only object or sign with this name."""
    if name == "sign":
        (found,) = facts["signs"]
        return found
    words = set(name.split()) - {"object"}
    (found,) = [o for o in facts["objects"] if words <= {o["shape"], o["color"], o["material"], o["size"]}]
    return found


def correct_answer(question: str, facts: dict) -> str:
    """Finds the answer from the words of the question and the facts."""
    objects, signs = facts["objects"], facts["signs"]

    def match(pattern):
        found = re.fullmatch(pattern, question)
        return found and [
            called(part, facts) if number in (1, 2) and part else part for number, part in enumerate(found.groups(), 1)
        ]

    def yes(holds):
        return "yes" if holds else "no"

    def distance_to_sign(thing):
        return np.hypot(*np.subtract(thing["position"][:2], signs[0]["position"][:2]))

    for name in ("color", "shape"):
        if found := match(rf"What(?: {name} is| is the {name} of) {NAME}\?"):
            return found[0][name]
        if question == f"What {name} is the object nearest to the camera?":
            return min(objects, key=lambda o: o["distance"])[name]
        if question == f"What {name} is the object farthest from the camera?":
            return max(objects, key=lambda o: o["distance"])[name]
        if question == f"What {name} is the object nearest to the sign?":
            return min(objects, key=distance_to_sign)[name]
    if found := match(rf"(?:Is {NAME} matte, shiny or striped|What does the surface of {NAME} look like)\?"):
        return (found[0] or found[1])["material"]
    if found := match(rf"(?:Is {NAME} small or large|What size is {NAME})\?"):
        return (found[0] or found[1])["size"]
    if found := re.fullmatch(r"How many (.+) (?:are there|can you see)\?", question):
        words = {word[:-1] if word[:-1] in (*SHAPES, "object") else word for word in found[1].split()} - {"object"}
        return str(sum(words <= {o["shape"], o["color"], o["material"], o["size"]} for o in objects))
    if found := match(rf"Is {NAME} left or right of {NAME_OR_SIGN}\?"):
        return "left" if found[0]["center"][0] < found[1]["center"][0] else "right"
    if found := match(rf"Is {NAME} in front of or behind {NAME_OR_SIGN}\?"):
        return "in front" if found[0]["depth"] < found[1]["depth"] else "behind"
    if found := match(rf"Which is nearer to the camera, {NAME} or {NAME}\?"):
        return min(found, key=lambda o: o["distance"])["shape"]
    if question in ("What does the sign say?", "What word is on the sign?"):
        return signs[0]["word"]
    if found := re.fullmatch(r"What does the (left|right) sign say\?", question):
        return sorted(signs, key=lambda sign: sign["center"][0])[found[1] == "right"]["word"]
    if found := re.fullmatch(r"Does the sign say (\w+)\?", question):
        return yes(signs[0]["word"] == found[1])
    if found := re.fullmatch(r"Is there an? (\w+) (\w+)\?", question):
        return yes(any((o["color"], o["shape"]) == found.groups() for o in objects))
    if found := match(rf"Is {NAME} left of {NAME}\?"):
        return yes(found[0]["center"][0] < found[1]["center"][0])
    if found := match(rf"Is {NAME} right of {NAME}\?"):
        return yes(found[0]["center"][0] > found[1]["center"][0])
    if found := match(rf"Is {NAME} in front of {NAME}\?"):
        return yes(found[0]["depth"] < found[1]["depth"])
    if found := match(rf"Is {NAME} behind {NAME}\?"):
        return yes(found[0]["depth"] > found[1]["depth"])
    if found := match(rf"Is {NAME} nearer to the camera than {NAME}\?"):
        return yes(found[0]["distance"] < found[1]["distance"])
    if found := match(rf"Is {NAME} larger than {NAME}\?"):
        return yes((found[0]["size"], found[1]["size"]) == ("large", "small"))
    if found := re.fullmatch(r"Are there more (\w+)s than (\w+)s\?", question):
        more, fewer = (sum(o["shape"] == shape for o in objects) for shape in found.groups())
        return yes(more > fewer)
    if found := match(rf"Are {NAME} and {NAME} the same color\?"):
        return yes(found[0]["color"] == found[1]["color"])
    raise AssertionError(f"unknown form of question: {question!r}")


@pytest.mark.parametrize("held_out, domain", [(False, "scenes"), (True, "scenes"), (False, "shifted")])
def test_answers_follow_from_the_facts(held_out, domain):
    kinds = set()
    for facts, questions in told(held_out, domain):
        assert len({each["question"] for each in questions}) == len(questions) >= 5
        for each in questions:
            assert correct_answer(each["question"], facts) == each["answer"], each
            kinds.add(each["type"])
    assert kinds == set(TYPES)


def test_objects_in_questions_are_visible_and_apart():
    for facts, questions in told(False, "scenes"):
        for thing in facts["objects"]:
            assert thing["visible_pixels"] >= 64 and thing["visible_share"] >= 0.55
        for each in questions:
            names = re.findall(NAME_OR_SIGN, each["question"])
            if len(names) != 2:
                continue
            one, other = (called(name, facts) for name in names)
            if " left " in each["question"] or " right " in each["question"]:
                assert abs(one["center"][0] - other["center"][0]) > 0.09
            if "front" in each["question"] or "behind" in each["question"]:
                assert abs(one["position"][1] - other["position"][1]) > 0.55
                assert (one["depth"] < other["depth"]) == (one["position"][1] < other["position"][1])
            if "nearer" in each["question"]:
                assert abs(one["distance"] - other["distance"]) > 0.5


def test_close_objects_have_no_relation():
    place = {"position": [0.0, 0.0, 0.5], "center": [0.5, 0.5], "depth": 6.0, "distance": 6.2}
    close = {**place, "position": [0.4, 0.3, 0.5], "center": [0.56, 0.45], "depth": 6.3, "distance": 6.5}
    apart = {**place, "position": [1.0, 0.9, 0.5], "center": [0.66, 0.4], "depth": 6.8, "distance": 7.0}
    for holds in (truth.is_left, truth.is_in_front, truth.is_nearer):
        assert not holds(place, close) and not holds(close, place)
        assert holds(place, apart) and not holds(apart, place)
    # farther back, but not farther away
    raised = {**place, "position": [0.0, 0.8, 1.7], "depth": 6.1, "distance": 6.3}
    assert not truth.is_in_front(place, raised) and not truth.is_nearer(place, raised)
    assert truth.nearest_to_camera([place, close, apart]) is None
    assert truth.nearest_to_camera([place, apart]) is place


# the largest allowed share of one answer, over a sample of scenes
BOUNDS = {"color": 0.2, "shape": 0.25, "material": 0.42, "size": 0.57, "count": 0.36, "relation": 0.33}
BOUNDS |= {"nearest": 0.19, "sign": 0.05, "yes/no": 0.54}


def asked_again():
    """The questions of many draws for each scene."""
    random = np.random.default_rng(1)
    return [each for facts, _ in told(False, "scenes") for _ in range(4) for each in ask(facts, random)]


def test_no_answer_is_much_more_frequent_than_others():
    answers = defaultdict(Counter)
    for each in asked_again():
        answers[each["type"]][each["answer"]] += 1
    for kind, bound in BOUNDS.items():
        assert answers[kind].most_common(1)[0][1] / answers[kind].total() < bound, (kind, answers[kind])


def test_each_form_of_yes_no_question_is_balanced():
    answers = defaultdict(Counter)
    for each in asked_again():
        if each["type"] == "yes/no":
            form = re.sub(NAME, "X", each["question"])
            form = re.sub(rf"\ban? \w+ \w+|(?<=say )\w+|\b({'|'.join(SHAPES)})s\b", "X", form)
            answers[form][each["answer"]] += 1
    assert len(answers) == 10, sorted(answers)
    for form, count in answers.items():
        assert 0.35 < count["yes"] / count.total() < 0.65, (form, count)


# ---- held-out combinations ----


def pairs_in(facts, questions, captions=()):
    pairs = {(o["color"], o["shape"]) for o in facts["objects"]}
    for text in [*(each["question"] for each in questions), *captions]:
        pairs |= {(o["color"], o["shape"]) for o in mentions(text)["objects"] if "color" in o}
    return pairs


def test_held_out_pairs_do_not_occur_in_training():
    for facts, questions in told(False, "scenes"):
        assert not pairs_in(facts, questions, captions_of(facts)) & set(HELD_OUT)


def test_every_held_out_pair_occurs_in_held_out_scenes():
    seen = Counter()
    for facts, _ in told(True, "scenes"):
        own = {(o["color"], o["shape"]) for o in facts["objects"]} & set(HELD_OUT)
        assert own
        seen.update(own)
    assert set(seen) == set(HELD_OUT)
    assert {color for color, _ in HELD_OUT} == set(COLORS) and {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_every_second_test_scene_is_held_out():
    found = [make_example("test", index, image_size=32) for index in range(4)]
    assert [example["held_out"] for example in found] == [False, True, False, True]
    for example in found:
        pairs = {(o["color"], o["shape"]) for o in example["facts"]["objects"]}
        assert bool(pairs & set(HELD_OUT)) == example["held_out"]


# ---- captions ----


def test_captions_are_true_and_short():
    for facts, _ in told(False, "scenes"):
        captions = captions_of(facts)
        assert len(captions) == CAPTIONS
        claims = 0
        for caption in captions:
            right, said = true_share(caption, facts)
            assert right == said, caption
            assert len(caption.split()) <= 30 and caption == caption.lower()
            claims += said
        assert claims >= 5


def test_claims_of_a_caption_are_counted():
    facts, _ = next(found for found in told(False, "scenes") if len(found[0]["signs"]) == 1)
    thing, word = facts["objects"][0], facts["signs"][0]["word"]
    right = f"{language.article(language.phrase(thing, ('size', 'material', 'color')))} and a sign that says {word}"
    assert true_share(right, facts) == (2, 2)
    other = next(color for color in COLORS if all(o["color"] != color for o in facts["objects"]))
    assert true_share(f"a {other} {thing['shape']} and a sign that says nothing", facts) == (0, 2)
    assert mentions("two signs that say tea and sun")["words"] == ["tea", "sun"]
    assert mentions("two large red balls") == {
        "objects": [{"size": "large", "color": "red", "shape": "ball"}],
        "words": [],
    }


# ---- the data set ----


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    builder = Scenes(
        cache_dir=str(tmp_path_factory.mktemp("scenes")), image_size=64, train=3, validation=1, test=2, seed=4
    )
    builder.download_and_prepare()
    return builder.as_dataset()


def test_stored_rows_equal_the_examples(built):
    assert {split: len(rows) for split, rows in built.items()} == {"train": 3, "validation": 1, "test": 2}
    row, example = built["train"][2], make_example("train", 2, seed=4, image_size=64)
    assert row["image_id"] == "scenes/train/000002"
    assert np.array_equal(row["image"], example["image"])
    assert row["questions"] == example["questions"] and row["captions"] == example["captions"]
    assert row["facts"]["objects"][0]["shape"] == example["facts"]["objects"][0]["shape"]
    labels = expert_labels(row)
    assert tuple(labels) == EXPERTS
    for name in EXPERTS:
        made = example["labels"][name]
        for part in ("ids",) if isinstance(made, dict) else (None,):
            assert np.array_equal(
                labels[name] if part is None else labels[name][part], made if part is None else made[part]
            )
    assert labels["detection"]["classes"] == example["labels"]["detection"]["classes"]
    assert labels["ocr"]["words"] == example["labels"]["ocr"]["words"]
    assert labels["ocr"]["features"].shape == (len(labels["ocr"]["words"]), 64)


def test_processor_accepts_the_labels_of_a_row(built):
    row = built["test"][0]
    size = {"height": 64, "width": 64}
    processor = PrismerImageProcessor(size=size, experts=run_scenes.DESCRIPTIONS)
    inputs = processor(row["image"], expert_labels=expert_labels(row), return_tensors="pt")
    assert inputs["expert_mask"].all()


def test_data_set_without_scenes_is_refused(tmp_path):
    builder = Scenes(cache_dir=str(tmp_path), train=0, validation=0, test=0)
    with pytest.raises(ValueError, match="at least one split"):
        builder.download_and_prepare()


def test_each_domain_has_a_configuration():
    assert set(Scenes.builder_configs) == {"scenes", "shifted", "scenes2"} == set(DOMAINS)
    assert Scenes.builder_configs["shifted"].image_size != Scenes.builder_configs["scenes"].image_size
