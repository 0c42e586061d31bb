"""SMART-101: values of answers, the loader with the published irregularities, splits, and both measures, by hand."""

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from smart.answers import answer_value
from smart.metrics import find_hits, interval, option_is_right, read_values, score_groups
from smart.puzzles import PUBLISHED, Puzzle, find_puzzles
from smart.rows import COLUMNS, FEATURES, held_out_answer, load_smart, split


HEADER = ("id", *COLUMNS)


def write_puzzle(folder, number, rows, name=None):
    """A puzzle in the published layout. A row has the five options and the answer."""
    images = folder / str(number) / "img"
    images.mkdir(parents=True)
    with (images.parent / (name or f"puzzle_{number}.csv")).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for index, (*options, answer) in enumerate(rows):
            Image.new("RGB", (8, 8), (index % 256, 0, 0)).save(images / f"{index}.png")
            writer.writerow((index, f"Question {index}?", f"{index}.png", *options, answer))


def number_rows(answers):
    """Rows whose right option is C."""
    return [(value - 2, value - 1, value, value + 1, value + 2, "C") for value in answers]


@pytest.mark.parametrize(
    ("text", "answers", "value"),
    [
        ("12", "value", [12]),
        (" 3 hours ", "value", [3]),
        ("45 cm", "value", [45]),
        ("20cm", "value", [20]),
        ("18 km", "value", [18]),
        ("-4", "value", [-4]),
        ("Impossible", "value", [0]),
        ("D", "value", [3]),
        ("d", "value", [3]),
        ("Airplane", "icon", [0]),
        ("marine animals", "icon", [32]),
        ("book", "icon", [7]),
        ("star", "icon", [42]),
        ("11:00 AM", "clock", [11]),
        ("1:00 PM", "clock", [13]),
        ("12:00 pm", "clock", [24]),
        ("2:00", "clock", [2]),
        ("+2", "operator", [12]),
        ("-38", "operator", [58]),
        ("x6", "operator", [36]),
        ("/ 8", "operator", [48]),
        ("1 and 2", "numbers", [1, 2]),
        ("5-2-3-1-4", "numbers", [5, 2, 3, 1, 4]),
        ("1, 3, or 5", "numbers", [1, 3, 5]),
        ("only 5", "numbers", [5]),
        ("A, B and D", "letters", [0, 1, 3]),
        ("E", "letters", [4]),
        ("KAO", "word", [10, 0, 14]),
        ("and", "word", [0, 13, 3]),
    ],
)
def test_value_of_answer(text, answers, value):
    assert answer_value(text, answers) == value


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        *(("", "value"), ("5-2", "value"), ("red", "value"), ("dragon", "icon"), ("noon", "clock"), ("1:30", "clock")),
        *(("6", "operator"), ("none", "numbers"), ("1-2-3-4-5-6-7-8-9-1-2", "numbers"), ("none", "letters")),
        ("A1", "word"),
    ],
)
def test_text_without_value_is_named(text, answers):
    with pytest.raises(ValueError, match=f"{text!r} is no answer of the type '{answers}'; .* is accepted"):
        answer_value(text, answers)


def test_published_puzzles():
    kinds = Counter(puzzle.kind for puzzle in PUBLISHED.values())
    assert sorted(PUBLISHED) == list(range(1, 102))
    assert kinds == {
        **{"counting": 26, "algebra": 15, "math": 14, "path": 12, "spatial": 9, "logic": 9, "measure": 8},
        **{"pattern": 5, "order": 3},
    }
    assert Counter(puzzle.part for puzzle in PUBLISHED.values()) == {"train": 77, "validation": 3, "test": 21}
    assert [number for number, puzzle in PUBLISHED.items() if puzzle.is_sequence] == [63, 16, 35, 39, 100, 18]
    assert sum(puzzle.by_letter for puzzle in PUBLISHED.values()) == 10
    assert PUBLISHED[18].padded([4, 1]) == [4, 1, 5, 5, 5, 5, 5, 5, 5, 5]
    assert PUBLISHED[16].padded([4, 1]) == [4, 1, *[26] * 8]
    assert PUBLISHED[7].padded([4]) == [4]


# ---- the loader ----


def test_irregular_files_load(tmp_path):
    """Folder 62 has the table of 63, options are empty, and an answer has a space."""
    write_puzzle(tmp_path, 62, [(1, 2, 3, 4, 5, "B")] * 8, name="puzzle_63.csv")
    write_puzzle(tmp_path, 14, [(9, 10, 13, 17, 20, "A ")] * 8)
    write_puzzle(tmp_path, 24, [("", "", "", "", "", "E")] * 8)
    rows = load_smart(tmp_path, max_instances=1, part="test")
    assert rows["puzzle"] == [14, 24, 62]
    assert rows["kind"] == ["counting", "counting", "logic"]
    assert rows["image_id"] == ["14/0.png", "24/0.png", "62/0.png"]
    assert rows["suffix"] == ["9", "E", "2"] and rows["answer"] == [0, 4, 1]
    assert rows["value"] == [[9], [4], [2]]
    assert rows["options"][1] == ["A", "B", "C", "D", "E"]
    assert rows["option_values"][1] == [[0], [1], [2], [3], [4]]
    assert rows[0]["image"].size == (8, 8) and rows[0]["text"] == "Question 0?"


def test_every_type_loads(tmp_path):
    write_puzzle(tmp_path, 1, [("bird", "feline", "fast train", "book", "moon", "C")])
    write_puzzle(tmp_path, 16, [("1 and 2", "2 and 3", "3 and 4", "3 and 5", "4 and 5", "E")])
    write_puzzle(tmp_path, 21, [("2 hours ", "3 hours", "4 hours", "5 hours", "1 hour", "E")])
    write_puzzle(tmp_path, 25, [("9:00 AM", "10:00 AM", "11:00 AM", "1:00 PM", "2:00 PM", "D")])
    write_puzzle(tmp_path, 39, [("KNAO", "KNGO", "KNR", "ARGO", "KAO", "A")])
    write_puzzle(tmp_path, 58, [("-38", "/8", "-45", "x6", "/6", "E")])
    rows = load_smart(tmp_path, part="test")
    assert rows["value"] == [[18], [4, 5, *[26] * 8], [1], [13], [10, 13, 0, 14, *[26] * 6], [46]]
    assert rows["option_values"][0] == [[4], [19], [18], [7], [36]]
    assert rows["option_values"][5] == [[58], [48], [65], [36], [46]]


def test_own_puzzles_have_a_table(tmp_path):
    write_puzzle(tmp_path, 301, [("A and B", "A", "B", "B and C", "C", "A")])
    (tmp_path / "puzzles.csv").write_text("id,kind,answers,part\n301,music,letters,test\n")
    assert find_puzzles(tmp_path) == {301: Puzzle(301, "music", "letters", "test")}
    assert load_smart(tmp_path, "FS", "test", shots=0)["value"] == [[0, 1, *[26] * 8]]
    (tmp_path / "puzzles.csv").write_text("id,kind,answers,part\n301,music,notes,test\n")
    with pytest.raises(ValueError, match="puzzles.csv has the row 301, music, notes, test; needed are .*one of value"):
        load_smart(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",C\n", ",F\n"), "line 2: the answer is 'F'; it must be one of A, B, C, D, E"),
        (lambda text: text.replace(",0.png", ",x.png"), "line 2: there is no image .*x.png"),
        (lambda text: text.replace("Question,", "question,"), "lacks the column 'Question'; needed are Question"),
        (lambda text: text.replace(",3,", ",three,"), "line 2: 'three' is no answer of the type 'value'"),
    ],
    ids=["answer", "image", "column", "option"],
)
def test_faulty_table_is_named(tmp_path, change, message):
    write_puzzle(tmp_path, 7, number_rows([3, 4]))
    table = tmp_path / "7" / "puzzle_7.csv"
    table.write_text(change(table.read_text().replace("\r", "")))
    with pytest.raises(ValueError, match=f"puzzle_7.csv.*{message}"):
        load_smart(tmp_path)


def test_faulty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no folders of puzzles"):
        load_smart(tmp_path)
    write_puzzle(tmp_path, 7, number_rows([3]), name="puzzle_8.csv")
    (tmp_path / "7" / "puzzle_9.csv").write_text("")
    with pytest.raises(FileNotFoundError, match="has 2 files puzzle_.*; needed is puzzle_7.csv"):
        load_smart(tmp_path)
    with pytest.raises(ValueError, match="scheme is 'XS'; accepted are IS, AS, PS, FS"):
        load_smart(tmp_path, scheme="XS")
    with pytest.raises(ValueError, match="part is 'dev'"):
        load_smart(tmp_path, part="dev")
    (tmp_path / "7" / "puzzle_9.csv").unlink()
    with pytest.raises(ValueError, match=r"no puzzle or kind .music.; accepted are .*, 7$"):
        load_smart(tmp_path, only=["music"])
    write_puzzle(tmp_path, 102, number_rows([3]))
    with pytest.raises(ValueError, match="has a folder 102; the kind of this puzzle is missing"):
        load_smart(tmp_path)


# ---- splits ----


def parts_of(puzzle, values, scheme, shots=0):
    return [split(puzzle, values, scheme, part, shots) for part in ("train", "validation", "test")]


@pytest.mark.parametrize("scheme", ["IS", "AS"])
def test_instances_in_file_order(scheme):
    """AS does the same with sequences and operators."""
    puzzle = PUBLISHED[18] if scheme == "AS" else PUBLISHED[7]
    train, validation, test = parts_of(puzzle, [[1]] * 40, scheme)
    assert (train, validation, test) == (list(range(32)), [32, 33], list(range(34, 40)))
    assert sum(parts_of(puzzle, [[1]] * 7, scheme), []) == list(range(7))  # none is lost


def test_answers_hold_out_one():
    values = [[value] for value in [1] * 5 + [2] * 3 + [3] * 2 + [4] * 20 + [5] * 4]
    # frequencies 5, 3, 2, and 24 for 4 and 5 together: the median is 4; 2 and 3 are below, 3 is the larger one
    assert held_out_answer([value for (value,) in values]) == 3
    train, validation, test = parts_of(PUBLISHED[7], values, "AS")
    assert test == [8, 9]
    others = [*range(8), *range(10, 34)]
    assert (train, validation) == (others[:30], others[30:])  # 95 % of 32


def test_two_largest_answers_count_as_one():
    # frequencies 6, 4, 10, and 9 for 4 and 5 together, with a median of 7.5
    assert held_out_answer([1] * 6 + [2] * 4 + [3] * 10 + [4] * 5 + [5] * 4) == 2


def test_rare_answers_are_not_held_out():
    # the answers 1, 2 and 3 are frequent, with a median of 80, which is the frequency of 3; 4 to 6 are rare
    assert held_out_answer([1] * 100 + [2] * 60 + [3] * 80 + [4] + [6]) == 3


def test_puzzles_of_three_parts():
    values = [[1]] * 20
    assert parts_of(PUBLISHED[2], values, "PS") == [list(range(16)), [], []]
    assert parts_of(PUBLISHED[43], values, "PS") == [[], [16], []]
    assert parts_of(PUBLISHED[101], values, "PS") == [[], [], [17, 18, 19]]
    assert parts_of(PUBLISHED[18], values, "PS") == [[], [], []]  # a sequence


def test_few_shots_of_held_out_puzzles():
    values = [[1]] * 30
    assert parts_of(PUBLISHED[2], values, "FS", 10) == [list(range(24)), [], []]
    assert parts_of(PUBLISHED[101], values, "FS", 10) == [list(range(10)), [], [27, 28, 29]]  # 15 % of the other 20
    assert parts_of(PUBLISHED[43], values, "FS", 10) == [list(range(10)), [26], []]


def test_parts_of_a_folder(tmp_path):
    write_puzzle(tmp_path, 2, number_rows([3] * 20))
    write_puzzle(tmp_path, 43, number_rows([4] * 20))
    write_puzzle(tmp_path, 101, number_rows([5] * 20))
    assert {len(load_smart(tmp_path, part=part)) for part in ("train", "validation", "test")} == {48, 3, 9}
    assert load_smart(tmp_path, "PS", "test")["puzzle"] == [101] * 3
    assert load_smart(tmp_path, only=["math", "2"], part="validation")["puzzle"] == [2, 43]
    assert len(load_smart(tmp_path, max_instances=10)) == 24
    empty = load_smart(tmp_path, "PS", "test", only=["math"])
    assert len(empty) == 0 and empty.features == FEATURES


# ---- measures ----


@pytest.mark.parametrize(
    ("puzzle", "predicted", "right"),
    [
        (7, [11], True),  # 10 is the nearest of 2, 5, 10, 15, 20
        (7, [7], False),  # 5 is nearer
        (7, [40], False),
        (7, None, False),
        (32, [2], True),  # C is right
        (32, [10], False),
    ],
)
def test_option_of_a_value(puzzle, predicted, right):
    assert option_is_right(predicted, [10], [[2], [5], [10], [15], [20]], 2, PUBLISHED[puzzle]) == right


def test_first_of_equally_near_options():
    options = [[2], [4], [8], [16], [32]]
    assert option_is_right([3], [2], options, 0, PUBLISHED[7])
    assert not option_is_right([3], [4], options, 1, PUBLISHED[7])


def test_option_of_a_sequence_is_equal():
    value = PUBLISHED[18].padded([4, 1, 3])
    assert option_is_right(list(value), value, [], 0, PUBLISHED[18])
    assert not option_is_right(PUBLISHED[18].padded([4, 1, 2]), value, [], 0, PUBLISHED[18])


@pytest.fixture
def mixed(tmp_path):
    """Test rows: twice puzzle 7 with the answer 6, once puzzle 18 with 5-2-3-1-4, once puzzle 25 with 1 PM."""
    write_puzzle(tmp_path, 7, number_rows([6] * 2))
    write_puzzle(tmp_path, 18, [("1-2-3-4-5", "5-2-3-1-4", "5-2-1-3-4", "4-2-3-1-5", "5-3-2-1-4", "B")])
    write_puzzle(tmp_path, 25, [("9:00 AM", "10:00 AM", "11:00 AM", "1:00 PM", "2:00 PM", "D")])
    return load_smart(tmp_path, part="test")


def test_texts_to_measures(mixed):
    texts = ["6", "8 marbles", "5-2-3-1-4", "noon"]
    # of two instances, one is in the training part
    values = read_values(texts[-len(mixed) :], mixed, PUBLISHED)
    assert mixed["puzzle"] == [7, 18, 25]
    assert values == [[8], [5, 2, 3, 1, 4, *[5] * 5], None]
    solved, right = find_hits(values, mixed, PUBLISHED)
    assert solved.tolist() == [False, True, False] and right.tolist() == [False, True, False]


def test_near_value_counts_for_the_option_alone(mixed):
    puzzle = PUBLISHED[18]
    solved, right = find_hits([[6], puzzle.padded([5, 2, 3, 1]), [12]], mixed, PUBLISHED)
    assert solved.tolist() == [True, False, False]
    assert right.tolist() == [True, False, False]  # 12 is as near to 11 AM as to 1 PM
    assert find_hits([[6], None, [14]], mixed, PUBLISHED)[1].tolist() == [True, False, False]
    assert find_hits([[5], None, [13]], mixed, PUBLISHED)[1].tolist() == [False, False, True]


def test_chosen_options_replace_nearest_ones(mixed):
    solved, right = find_hits([None, None, [13]], mixed, PUBLISHED, chosen=[2, 1, 0])
    assert solved.tolist() == [False, False, True] and right.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="there are 3 rows, and 1 predicted values"):
        find_hits([None], mixed, PUBLISHED)


def test_scores_by_kind_and_puzzle(mixed):
    scores = score_groups(np.array([True, False, True]), np.array([True, True, True]), mixed)
    assert list(scores) == ["all", "algebra", "measure", "order", "7", "18", "25"]
    assert scores["all"].number == 3 and scores["all"].s_acc == pytest.approx(2 / 3) and scores["all"].o_acc == 1
    assert scores["all"].o_interval == (1, 1) and scores["all"].s_interval == (0, 1)
    assert scores["order"].s_acc == 0 and scores["7"].s_acc == 1 and scores["order"].o_acc == 1


def test_interval_is_that_of_a_binomial():
    hits = np.arange(1000) < 400
    low, high = interval(hits)
    deviation = 1.96 * np.sqrt(0.4 * 0.6 / 1000)
    assert (low, high) == (pytest.approx(0.4 - deviation, abs=0.004), pytest.approx(0.4 + deviation, abs=0.004))
    assert interval(hits[:1]) == (0, 1)
