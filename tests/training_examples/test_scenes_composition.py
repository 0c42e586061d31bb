"""Scenes 2: programs, questions that demand composition, marked objects, and readers of labels and questions."""

import json
import re
from collections import Counter, defaultdict
from functools import lru_cache

import numpy as np
import pytest


datasets = pytest.importorskip("datasets")

from scenes import ceilings, composition  # noqa: E402
from scenes.facts import describe  # noqa: E402
from scenes.labels import DETECTION_CLASSES  # noqa: E402
from scenes.language import captions_of, mentions, true_share  # noqa: E402
from scenes.programs import Reader, Unclear  # noqa: E402
from scenes.render import look  # noqa: E402
from scenes.scene import COLORS, HELD_OUT, MATERIALS, SHAPES, SIZES  # noqa: E402
from scenes.scenes import Scenes, expert_labels, make_example, make_scene  # noqa: E402


def thing(look, x, depth):
    size, material, color, shape = look.split()
    place = {"center": [x, 0.5], "position": [10 * x, depth, 0.5], "depth": depth, "distance": depth}
    return {"size": size, "material": material, "color": color, "shape": shape, **place}


SCENE = {
    "objects": [
        thing("large shiny red ball", 0.1, 5.0),
        thing("small matte red cube", 0.4, 7.0),
        thing("small striped blue cube", 0.7, 3.0),
        thing("large matte green cone", 0.9, 9.0),
    ],
    "signs": [
        {"word": "fox", "on_wall": False, "center": [0.2, 0.4], "position": [2, 6, 1], "depth": 6, "distance": 6}
    ],
    "marked": 2,
}
ALL = ["objects"]


def only(**attributes):
    return ["unique", ["filter", attributes, ALL]]


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        (["query", "color", ["filter", {"shape": "ball"}, ALL]], "red"),
        (["query", "color", ["filter", {"shape": "ring"}, ALL]], "none"),
        (["query", "shape", ["related", "right", only(color="blue"), ALL]], "cone"),
        (["query", "color", ["filter", {"shape": "cube"}, ["related", "front", only(shape="ball"), ALL]]], "blue"),
        (["count", ["without", {"color": "red"}, ALL]], "2"),
        (["count", ["without", {"color": "red"}, ["filter", {"shape": "cube"}, ALL]]], "1"),
        (["query", "shape", ["same", "color", only(shape="ball"), ALL]], "cube"),
        (["count", ["same", "size", ["marked"], ALL]], "1"),
        (["query", "material", ["set_of", ["marked"]]], "striped"),
        (["query", "color", ["set_of", ["first", "nearest", ALL]]], "blue"),
        (["query", "color", ["set_of", ["first", "rightmost", ["filter", {"shape": "cube"}, ALL]]]], "blue"),
        (["choose", "left", "right", only(shape="cone"), ["unique", ["signs"]]], "right"),
        (["choose", "front", "behind", only(color="blue"), only(shape="cone")], "in front"),
        (["holds", "behind", only(shape="cone"), only(shape="ball")], "yes"),
        (["holds", "nearer", only(shape="cone"), only(shape="ball")], "no"),
        (["larger", only(shape="ball"), only(color="blue")], "yes"),
        (["more", ["filter", {"shape": "cube"}, ALL], ["filter", {"shape": "ball"}, ALL]], "yes"),
        (["equal", "material", only(color="blue"), only(shape="cone")], "no"),
        (["word", ["unique", ["signs"]]], "fox"),
        (["exists", ["filter", {"word": "fox"}, ["signs"]]], "yes"),
    ],
)
def test_program_gives_the_answer(program, answer):
    assert Reader(SCENE).read(program) == answer
    assert Reader(SCENE, margins=False).read(json.loads(json.dumps(program))) == answer


@pytest.mark.parametrize(
    "program",
    [
        ["query", "color", ["filter", {"shape": "cube"}, ALL]],
        ["larger", only(shape="ball"), only(shape="cone")],
        ["first", "nearest", ["filter", {"shape": "ring"}, ALL]],
        ["unique", ["filter", {"shape": "ring"}, ALL]],
    ],
)
def test_undetermined_answer_is_unclear(program):
    with pytest.raises(Unclear):
        Reader(SCENE).read(program)


def test_close_objects_are_unclear_within_the_margins():
    things = [thing("small matte red cube", 0.40, 5.0), thing("small matte blue ball", 0.45, 5.1)]
    facts = {"objects": things, "signs": [], "marked": None}
    for relation in ("left", "front", "nearer"):
        program = ["holds", relation, only(shape="cube"), only(shape="ball")]
        with pytest.raises(Unclear):
            Reader(facts).read(program)
        assert Reader(facts, margins=False).read(program) == "yes"
    with pytest.raises(Unclear, match="marked"):
        Reader(facts).read(["marked"])
    with pytest.raises(ValueError, match="no operation 'paint'"):
        Reader(facts).read(["paint"])


# ---- questions ----


@lru_cache
def told(held_out=False):
    found = []
    for index in range(20 if held_out else 45):
        random = np.random.default_rng([6, index])
        scene = make_scene(random, "scenes2", held_out)
        facts = describe(scene, look(scene, 128))
        facts["marked"] = int(random.integers(len(facts["objects"])))
        found.append((facts, composition.ask(facts, random, held_out)))
    return found


ATTRIBUTES = "|".join([*SIZES, *MATERIALS, *COLORS])
NOUN = rf"((?:(?:{ATTRIBUTES}) )*(?:marked object|objects?|(?:{'|'.join(SHAPES)})s?))"
BESIDE = r"(left of|right of|in front of|behind)"


def answer_of_words(question, facts):
    """The answer to a question from its words, without its program; `None` for other forms."""

    def all_of(words):
        words = {word.removesuffix("s") if word.removesuffix("s") in (*SHAPES, "object") else word for word in words}
        values = words - {"object"}
        return [o for o in facts["objects"] if values <= {o["shape"], o["color"], o["material"], o["size"]}]

    def one(words):
        (found,) = [facts["objects"][facts["marked"]]] if words == "marked object" else all_of(words.split())
        return found

    def beside(relation, other):
        key, sign = {"left": ("x", 1), "right": ("x", -1), "in front": ("depth", 1), "behind": ("depth", -1)}[relation]
        place = {id(o): sign * (o["center"][0] if key == "x" else o["depth"]) for o in facts["objects"]}
        return [o for o in facts["objects"] if place[id(o)] < place[id(other)]]

    def matched(pattern):
        return re.fullmatch(pattern.replace("NOUN", NOUN).replace("BESIDE", BESIDE), question)

    if found := matched(r"How many NOUN are not (\w+)\?"):
        return str(sum(found[2] not in (o["color"], o["material"]) for o in all_of(found[1].split())))
    if found := matched(r"How many NOUN are BESIDE the NOUN\?"):
        near = beside(found[2].removesuffix(" of"), one(found[3]))
        return str(sum(o in near for o in all_of(found[1].split())))
    if found := matched(r"How many other objects have the same (\w+) as the NOUN\?"):
        return str(sum(o[found[1]] == one(found[2])[found[1]] for o in facts["objects"]) - 1)
    if found := matched(r"What (\w+) is the NOUN BESIDE the NOUN\?"):
        near = beside(found[3].removesuffix(" of"), one(found[4]))
        (answer,) = [o for o in all_of(found[2].split()) if o in near]
        return answer[found[1]]
    if found := matched(r"What (\w+) is the other object with the same (\w+) as the NOUN\?"):
        own = one(found[3])
        (answer,) = [o for o in facts["objects"] if o is not own and o[found[2]] == own[found[2]]]
        return answer[found[1]]
    if found := matched(r"What (\w+) is the NOUN that is not (\w+)\?"):
        (answer,) = [o for o in all_of(found[2].split()) if found[3] not in (o["color"], o["material"], o["size"])]
        return answer[found[1]]
    if found := matched(r"What (\w+) is the NOUN\?"):
        if found[2] != "marked object" and not all_of(found[2].split()):
            return "none"
        return one(found[2])[found[1]]
    return None


@pytest.mark.parametrize("held_out", [False, True])
def test_answers_follow_from_the_words(held_out):
    checked = Counter()
    for facts, questions in told(held_out):
        assert len({each["question"] for each in questions}) == len(questions) > 12
        for each in questions:
            assert each["answer"] == Reader(facts).read(json.loads(each["program"]))
            answer = answer_of_words(each["question"], facts)
            if answer is not None:
                assert answer == each["answer"], each
                checked[each["type"]] += 1
    assert {"two steps", "same", "not", "absent", "marked", "count", "color"} <= set(checked)


def test_every_type_occurs_and_counts_reach_nine():
    answers = defaultdict(Counter)
    for _, questions in told():
        for each in questions:
            answers[each["type"]][each["answer"]] += 1
    assert set(answers) == set(composition.TYPES)
    assert {"8", "9"} <= set(answers["count"])
    assert 0.2 < answers["absent"]["none"] / answers["absent"].total() < 0.6


def test_held_out_pairs_are_neither_shown_nor_named():
    for facts, questions in told():
        pairs = {(o["color"], o["shape"]) for o in facts["objects"]}
        for text in [*(each["question"] for each in questions), *captions_of(facts)]:
            pairs |= {(o["color"], o["shape"]) for o in mentions(text)["objects"] if "color" in o}
        assert not pairs & set(HELD_OUT)
    assert all({(o["color"], o["shape"]) for o in facts["objects"]} & set(HELD_OUT) for facts, _ in told(True))


def test_captions_are_true_and_name_every_sign():
    for facts, _ in told():
        captions = captions_of(facts)
        assert all(np.diff(true_share(caption, facts)) == 0 for caption in captions)
        assert max(len(caption.split()) for caption in captions) < 30
        assert set(mentions(captions[1])["words"]) == {sign["word"] for sign in facts["signs"]}


# ---- the data set, and its ceilings ----


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("scenes2"))
    builder = Scenes(cache_dir=folder, config_name="scenes2", train=0, validation=0, test=5)
    builder.download_and_prepare()
    return builder.as_dataset()["test"]


def test_scenes_of_the_first_version_are_unchanged():
    example = make_example("train", 0, image_size=32)
    assert "marked" not in example["facts"] and "program" not in example["questions"][0]
    assert set(Scenes(config_name="scenes").info.features["facts"]) == {"place", "objects", "signs"}


def test_marked_object_is_a_region(rows):
    row = rows[0]
    label = expert_labels(row, names=("depth", "regions"))["regions"]
    left, top, right, bottom = row["facts"]["objects"][row["facts"]["marked"]]["box"]
    assert label["words"] == ["marked"] and label["features"].shape == (1, 64)
    painted = np.argwhere(label["ids"] == 0)
    assert abs(painted.min(0) - [top, left]).max() <= 1 and abs(painted.max(0) + 1 - [bottom, right]).max() <= 1


def test_reader_of_true_labels_answers_nearly_all(rows):
    given = [ceilings.answer_from_labels(row, True, np.random.default_rng(0)) for row in rows]
    shares = ceilings.share_right(rows, given)
    assert shares["all"].value > 93 and shares["marked"].value == 100
    blind = [ceilings.answer_from_labels(row, False, np.random.default_rng(0)) for row in rows]
    assert ceilings.share_right(rows, blind)["all"].value < shares["all"].value - 20


def test_wrong_labels_lower_the_ceiling(rows):
    def read(change):
        changed = [{**row, **change(row)} for row in rows]
        given = [ceilings.answer_from_labels(row, True, np.random.default_rng(0)) for row in changed]
        return ceilings.share_right(rows, given)

    right = read(lambda row: {})
    inverted = read(lambda row: {"depth": 255 - np.asarray(row["depth"])})
    assert inverted["relation"].value < right["relation"].value and inverted["color"] == right["color"]
    assert read(lambda row: {"ocr_words": ["x"] * len(row["ocr_words"])})["sign"].value < right["sign"].value
    ball = DETECTION_CLASSES.index("ball")
    classes = read(lambda row: {"detection_classes": [ball] * len(row["detection_classes"])})
    assert classes["shape"].value < right["shape"].value


def test_shares_are_those_of_the_answers():
    rows = datasets.Dataset.from_list(
        [
            {"questions": [{"question": "a", "answer": "1", "type": "count"}] * 2},
            {"questions": [{"question": "a", "answer": "red", "type": "color"}]},
        ]
    )
    shares = ceilings.share_right(rows, [["1", "2"], ["red"]])
    assert shares["all"].value == pytest.approx(200 / 3) and (shares["all"].low, shares["all"].high) == (50, 100)
    assert shares["count"].value == 50 and shares["color"].value == 100 and shares["color"].low is None  # one scene


def test_classifier_of_questions_learns_their_wording():
    pytest.importorskip("sklearn")
    questions = [{"question": f"Is it {word}?", "answer": answer} for word, answer in (("big", "yes"), ("wet", "no"))]
    train = datasets.Dataset.from_list([{"questions": questions}] * 20)
    assert ceilings.answer_from_questions(train, train.select([0])) == [["yes", "no"]]
