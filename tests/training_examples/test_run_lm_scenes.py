"""run_lm_scenes.py trains PrismerLM on Scenes and measures its answers: each comparison of the documentation runs."""

import json
import sys

import datasets
import pytest
from safetensors.torch import load_file

from modeling_prismer import PrismerLMForConditionalGeneration
from scenes import run_lm_scenes
from scenes.run_scenes import CAPTION_PROMPT
from scenes.scenes import Scenes


STEMS = {"hidden_size": 32, "image_size": 32, "num_latents": 4, "resampler_layers": 1, "resampler_attention_heads": 2}
CROSS_ATTENTION = ("--fusion", "cross_attention", "--cross_attention_every", 2)
COUNTS = {"train": 10, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def scenes(data_dir):
    builder = Scenes(cache_dir=data_dir, **COUNTS)
    builder.download_and_prepare()
    return builder.as_dataset()


@pytest.fixture
def recipe(monkeypatch, data_dir, tmp_path):
    def run(*arguments, out="out"):
        shared = ["--data_dir", data_dir, "--output_dir", tmp_path / out, "--use_cpu", "--disable_tqdm", "true"]
        shared += ["--max_steps", 1, "--labels", "true", "--dtype", "float32", "--experts_config", json.dumps(STEMS)]
        for split, number in COUNTS.items():
            shared += [f"--{split}_scenes", number]
        monkeypatch.setattr(sys, "argv", ["run_lm_scenes.py", *map(str, shared), *map(str, arguments)])
        run_lm_scenes.main()
        return tmp_path / out

    return run


def results(folder):
    return json.loads((folder / "scenes_results.json").read_text())


def trained_weights(folder):
    return sum(
        tensor.numel() for name, tensor in load_file(folder / "model.safetensors").items() if "norm" not in name
    )


def test_two_stages_are_measured_by_type_of_question(recipe, language, vision, suites):
    backbones = ("--language", language, "--vision", vision, "--experts", suites["both"])
    aligned = recipe(*backbones, "--stage", "captions", "--cache_features", "--do_train", out="aligned")
    questions = ("--stage", "questions", "--texts_per_image", 4, "--do_train", "--do_eval")
    found = results(recipe("--model", aligned, *questions))
    assert found.keys() == {"validation", "test", "held_out"}
    assert {"all", "color", "relation", "sign"} <= found["test"]["answers"].keys()
    assert found["test"]["captions"].keys() == {"cider", "exact_attributes", "objects"}
    assert found["test"]["seconds"]["answers"] > 0


@pytest.mark.parametrize("way", [(), (*CROSS_ATTENTION, "--experts_as", "both")], ids=["prefix", "cross"])
def test_packed_answers_are_those_of_greedy_generation(recipe, language, vision, suites, way):
    train = ("--stage", "questions", "--freeze", "vision", "--do_train", "--max_steps", 40, "--learning_rate", 0.01)
    train += ("--without_types", "color,shape,material,size,count,relation,nearest,sign")
    backbones = ("--language", language, "--vision", vision, "--experts", suites["both"], "--chat_template", "plain")
    trained = recipe(*backbones, *way, *train, out="trained")
    evaluation = ("--model", trained, "--stage", "questions", "--do_eval")
    expected = results(recipe(*evaluation, out="generated"))
    found = results(recipe(*evaluation, "--packed_answers", out="packed"))
    for name in ("test", "held_out"):
        assert 0.05 < found[name]["answers"]["all"] < 1
        assert found[name]["answers"] == expected[name]["answers"]
        assert found[name]["interval"] == [None, None]  # of a single scene


def test_interval_is_that_of_the_scenes():
    scenes = datasets.Dataset.from_list([{"questions": [{"answer": answer}] * 2} for answer in ("yes", "no")])
    assert run_lm_scenes.answers_interval([["yes", "yes"], ["yes", "no"]], scenes) == [0.5, 1.0]


def test_words_need_no_training(recipe, language, suites):
    words = ("--vision", "none", "--experts", suites["both"], "--experts_as", "words", "--do_eval")
    folder = recipe("--language", language, *words, "--stage", "questions", "--max_eval_rows", 1)
    assert 0 <= results(folder)["test"]["answers"]["all"] <= 1


def test_both_fusions_train_as_many_weights(recipe, language, vision):
    shared = ("--language", language, "--vision", vision, "--experts", "none", "--trained_weights", 40_000)
    for name, fusion in {"prefix": (), "cross_attention": CROSS_ATTENTION}.items():
        folder = recipe(*shared, *fusion, "--stage", "questions", "--do_train", out=name)
        assert abs(trained_weights(folder) - 40_000) < 400


def test_new_expert_is_watched_while_its_stem_trains(recipe, language, suites):
    data = ("--stage", "questions", "--do_train", "--vision", "none", "--experts", suites["both"])
    before = recipe("--language", language, *data, "--without_experts", "ocr", out="before")
    watch = ("--watch_types", "sign", "--eval_strategy", "steps", "--eval_steps", 1)
    folder = recipe("--model", before, *data, "--add_expert", "ocr", *watch)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_exact" in entry] == [1]
    assert PrismerLMForConditionalGeneration.from_pretrained(folder).config.expert_names == ["edge", "ocr"]


@pytest.mark.parametrize("by", ["random", "similar"])
@pytest.mark.parametrize("way", [(), (*CROSS_ATTENTION, "--no_chat")], ids=["chat", "text"])
def test_examples_precede_questions_of_other_types(recipe, language, vision, suites, by, way):
    types = ("--without_types", "relation,sign", "--stage", "questions", "--shots", 0, 2, "--shots_by", by)
    backbones = ("--language", language, "--vision", vision, "--experts", suites["edges"], *way)
    found = results(recipe(*backbones, *types, "--do_eval", "--max_eval_rows", 1))
    assert found["test"].keys() == {"0", "2"}
    assert set(found["test"]["2"]) <= {"all", "relation", "sign"}


def test_examples_come_with_their_images():
    examples = [({"image": "a", "image_id": "1"}, {"question": "What is it?", "answer": "a cube"})]
    image = {"image": "b", "image_id": "2"}
    row = run_lm_scenes.row_with_examples(examples, image, "What is that?", is_chat=False)
    assert row["text"] == "<image>What is it? a cube\n<image>What is that?"
    assert row["images"] == ["a", "b"] and row["image_ids"] == ["1", "2"]
    turns = run_lm_scenes.row_with_examples(examples, image, "What is that?", is_chat=True)["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]


def test_types_are_left_out_of_the_training(scenes):
    scenes = scenes["train"]
    rows = run_lm_scenes.rows_to_train(scenes, "questions", ["sign", "count"])
    kept = [[q["question"] for q in own if q["type"] not in ("sign", "count")] for own in scenes["questions"]]
    assert [[text for text in texts if text != CAPTION_PROMPT] for texts in rows["text"]] == kept
    captions = run_lm_scenes.rows_to_train(scenes, "captions", [])
    assert captions["suffix"][:] == scenes["captions"][:]
    assert set(rows.column_names) == {"image_id", "image", "text", "suffix"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--without_types", "smell"), "there is no type of question 'smell'"),
        (("--shots", 2), "--shots needs --without_types"),
        (
            ("--vision", "none", "--question_queries", "--packed_answers"),
            "--packed_answers: the questions of this model",
        ),
    ],
)
def test_wrong_arguments_are_refused(recipe, language, arguments, message):
    with pytest.raises(SystemExit, match=message):
        recipe("--language", language, "--do_eval", *arguments)
