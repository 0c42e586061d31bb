"""run_lm.py trains PrismerLM on captions, questions and conversations, and saves the trained weights alone."""

import json
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipVisionModel, TrainerCallback

import run_lm
import training
from feature_cache import FeatureCache
from lm_training import batches_by_length, tidy_answer, with_learned_logits
from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor
from modeling_prismer.processing.data import load_chats
from modeling_prismer.processing.experts import CannyEdges
from tests.processing.tiny_lm_processors import make_vlm, make_vlm_processor


STEMS = json.dumps(
    {"hidden_size": 32, "image_size": 32, "num_latents": 4, "resampler_layers": 1, "resampler_attention_heads": 2}
)


@pytest.fixture
def chats(image_folder, tmp_path):
    """Conversations in the formats of LLaVA and of messages."""
    llava = {"from": "human", "value": "<image>\nwhat color is it"}, {"from": "gpt", "value": "red"}
    more = {"from": "human", "value": "is it red"}, {"from": "gpt", "value": "yes"}
    rows = [{"image": "00.png", "conversations": [*llava, *more]}]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "is it red"}]
    answer = {"role": "assistant", "content": "no"}
    rows.append({"images": ["01.png", "02.png"], "messages": [{"role": "user", "content": content}, answer]})
    rows.append({"messages": [{"role": "user", "content": "is it red"}, answer]})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(monkeypatch, cache, tmp_path, language):
    """Runs the script, in `tmp_path / "out"` unless told otherwise, and returns the folder."""

    monkeypatch.setattr("run_captioning.shutil.which", lambda name: None)  # the metrics that need no Java

    def run(*arguments, out=tmp_path / "out", main=run_lm.main):
        shared = ["--output_dir", out, "--use_cpu", "--disable_tqdm", "true", "--max_steps", 2, "--labels", "live"]
        shared += ["--dtype", "float32"]
        shared += ["--per_device_train_batch_size", 3, "--learning_rate", 0.01, "--experts_config", STEMS]
        monkeypatch.setattr(sys, "argv", ["run_lm.py", *map(str, shared), *map(str, arguments)])
        main()
        return out

    return run


def load(folder):
    return PrismerLMForConditionalGeneration.from_pretrained(folder), PrismerLMProcessor.from_pretrained(folder)


def results(folder):
    return json.loads((folder / "eval_results.json").read_text())


def test_two_stages_follow_each_other(recipe, language, vision, image_folder, chats, suites, tmp_path):
    captions = image_folder / "captions.csv"
    backbones = ("--language", language, "--vision", vision, vision, "--experts", suites["edges"])
    first = recipe(*backbones, "--train_data", captions, "--eval_data", captions, "--do_train", "--do_eval")
    assert 0 <= results(first)["eval_cider"]
    model, processor = load(first)
    assert len(model.model.vision_encoders) == 2 and model.config.expert_names == ["edge"]
    before = load_file(first / "model.safetensors")
    assert not any(name.startswith(("model.language_model", "model.vision_encoders")) for name in before)

    questions = image_folder / "questions.jsonl"
    data = ("--train_data", questions, chats, "--image_folder", image_folder, "--eval_data", questions)
    second = recipe(
        "--stage", "questions", "--model", first, *data, "--do_train", "--do_eval", out=tmp_path / "second"
    )
    assert {"eval_exact", "eval_vqa_accuracy"} <= results(second).keys()
    after = load_file(second / "model.safetensors")
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.vision_projection.fc1.weight"], after["model.vision_projection.fc1.weight"])


@pytest.mark.parametrize(
    "options",
    [
        ("--experts_as", "words"),
        ("--experts_as", "both", "--fusion", "cross_attention", "--cross_attention_every", 2),
        ("--experts", "none", "--no_chat"),
        ("--experts_as", "words", "--chat_template", "plain"),
        ("--question_queries",),
        ("--dora", 2, "--vision", "none", "--no_pack", "--texts_per_image", 1),
    ],
    ids=["words", "cross_attention", "no_experts", "plain_template", "question_queries", "dora"],
)
def test_each_way_trains_and_loads_again(recipe, language, vision, image_folder, suites, options):
    questions = image_folder / "questions.jsonl"
    arguments = ("--stage", "questions", "--language", language, "--vision", vision, "--experts", suites["both"])
    arguments += ("--train_data", questions, "--eval_data", questions, "--max_eval_rows", 4, "--do_train", "--do_eval")
    folder = recipe(*arguments, *options)
    assert results(folder)["eval_samples_per_second"] > 0
    model, processor = load(folder)
    inputs = processor(str(image_folder / "00.png"), "what color is it")
    assert torch.isfinite(model(**inputs).logits).all()
    assert (processor.chat_template is None) == ("--no_chat" in options)
    assert any("lora_B" in name for name in load_file(folder / "model.safetensors")) == ("--dora" in options)


def test_plain_template_is_kept_and_has_no_roles(recipe, language, vision, image_folder, suites):
    questions = image_folder / "questions.jsonl"
    arguments = ("--stage", "questions", "--language", language, "--vision", vision, "--experts", suites["both"])
    arguments += ("--experts_as", "words", "--train_data", questions)
    _, processor = load(recipe(*arguments, "--chat_template", "plain", "--do_train"))
    user = {"role": "user", "content": "is it red"}
    assert processor.apply_chat_template([user], add_generation_prompt=True) == "is it red"
    answered = [user, {"role": "assistant", "content": "no"}]
    assert processor.apply_chat_template(answered) == f"is it red no{processor.tokenizer.eos_token}"
    with pytest.raises(SystemExit, match="there is no file 'plane'"):
        recipe(*arguments, "--chat_template", "plane", "--do_train")


def test_loss_of_learned_places_is_the_whole_loss(language):
    model = PrismerLMForConditionalGeneration.from_backbones(language)
    ids = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[0, 4:6], labels[1, 8], labels[2, 0] = ids[0, 4:6], ids[1, 8], ids[2, 0]
    expected = model(ids, labels=labels)
    outputs = model(**with_learned_logits({"input_ids": ids, "labels": labels}))
    assert outputs.logits.shape[1] == 3
    torch.testing.assert_close(outputs.loss, expected.loss)


def test_words_alone_are_measured_without_training(recipe, language, image_folder, suites):
    questions = ("--eval_data", image_folder / "questions.jsonl", "--max_eval_rows", 4)
    folder = recipe(
        *("--stage", "questions", "--language", language, "--vision", "none", "--experts", suites["both"]),
        *("--experts_as", "words", "--do_eval", *questions),
    )
    assert "eval_exact" in results(folder)


def test_vision_language_model_gets_experts(recipe, image_folder, suites, tmp_path):
    vlm_processor = make_vlm_processor()
    for part in (vlm_processor, make_vlm(vlm_processor)):
        part.save_pretrained(tmp_path / "vlm")
    questions = image_folder / "questions.jsonl"
    arguments = ("--stage", "questions", "--language", tmp_path / "vlm", "--experts", suites["edges"], "--lora", 2)
    folder = recipe(*arguments, "--train_data", questions, "--eval_data", questions, "--do_train", "--do_eval")
    assert "eval_exact" in results(folder)
    adapted = [name for name in load_file(folder / "model.safetensors") if "lora_A" in name]
    assert adapted and not any("visual" in name for name in adapted)


def test_only_trained_weights_reach_the_optimizer(recipe, language, vision, image_folder, monkeypatch):
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            seen.extend(names[id(weight)] for group in optimizer.param_groups for weight in group["params"])

    watched = partial(run_lm.make_lm_trainer, callbacks=[Watch()])
    monkeypatch.setattr(run_lm, "make_lm_trainer", watched)
    data = ("--train_data", image_folder / "captions.csv", "--do_train")
    recipe("--language", language, "--vision", vision, "--experts", "none", "--lora", 2, *data)
    assert {name.split(".")[1] for name in seen} == {"vision_projection", "language_model"}
    assert all("lora_" in name for name in seen if "language_model" in name)


def test_resumed_training_ends_the_same(recipe, language, vision, image_folder, suites, tmp_path):
    arguments = ("--language", language, "--vision", vision, "--experts", suites["edges"], "--lora", 2, "--do_train")
    arguments += ("--train_data", image_folder / "captions.csv", "--save_steps", 1)
    straight = recipe(*arguments)
    resumed = recipe(*arguments, "--resume_from_checkpoint", straight / "checkpoint-1", out=tmp_path / "resumed")
    straight, resumed = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert straight.keys() == resumed.keys()
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor)


def test_new_expert_trains_its_stem_alone(recipe, language, image_folder, suites, tmp_path):
    data = ("--stage", "questions", "--train_data", image_folder / "questions.jsonl", "--do_train")
    without = ("--vision", "none", "--experts", suites["both"], "--without_experts", "ocr")
    first = recipe("--language", language, *without, *data)
    second = recipe("--model", first, "--experts", suites["both"], "--add_expert", "ocr", *data, out=tmp_path / "more")
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.experts.expert_stems.ocr.") for name in changed)
    model, processor = load(second)
    assert model.config.expert_names == ["edge", "ocr"] == list(processor.experts)


# ---- encoded images ----


def count_images(monkeypatch, kind, name):
    """The numbers of images in the calls of a method."""
    method, seen = getattr(kind, name), []

    def counted(self, images=None, **kwargs):
        images = kwargs.pop("pixel_values", images)
        seen.append(len(images))
        return method(self, images, **kwargs)

    monkeypatch.setattr(kind, name, counted)
    return seen


def test_cached_features_give_the_same_training(
    recipe, language, vision, image_folder, suites, tmp_path, monkeypatch, chats
):
    arguments = ("--stage", "questions", "--language", language, "--vision", vision, "--experts", suites["edges"])
    arguments += ("--train_data", image_folder / "questions.jsonl", chats, "--image_folder", image_folder)
    live = load_file(recipe(*arguments, "--do_train") / "model.safetensors")
    encoded = count_images(monkeypatch, SiglipVisionModel, "forward")
    folder = recipe(*arguments, "--do_train", "--cache_features", out=tmp_path / "cached")
    assert encoded == [1, 12]  # the first one finds the number of patches
    cached = load_file(folder / "model.safetensors")
    for name, tensor in live.items():
        torch.testing.assert_close(cached[name], tensor, atol=2e-3, rtol=1e-2)
    recipe(*arguments, "--do_train", "--cache_features", out=tmp_path / "cached")
    assert encoded == [1, 12, 1]
    (of_encoder,) = (folder / "image_features").iterdir()
    assert [path.suffix for path in of_encoder.iterdir()] == [".safetensors"]


def test_features_of_a_prismer_replace_its_experts(recipe, language, checkpoint, image_folder, monkeypatch, tmp_path):
    arguments = ("--stage", "questions", "--language", language, "--vision", checkpoint, "--do_train")
    arguments += ("--train_data", image_folder / "questions.jsonl")
    seen = count_images(monkeypatch, CannyEdges, "run")
    folder = recipe(*arguments, "--cache_features", "--max_steps", 5)
    assert sum(seen) == 12
    model, _ = load(folder)
    assert model.config.has_prismer_encoder and model.config.expert_names == ["edge"]
    blind = recipe(*arguments, "--experts", "none", "--cache_features", out=tmp_path / "blind")
    assert sum(seen) == 12
    assert next((blind / "image_features").iterdir()).name != next((folder / "image_features").iterdir()).name


def test_incomplete_file_of_features_is_not_read(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.write({"a": torch.ones(2, 3)})
    (tmp_path / "b.incomplete").write_bytes(b"half")
    cache = FeatureCache(tmp_path)
    assert list(cache.files) == ["a"]
    assert torch.equal(cache(["a", "a"]), torch.ones(2, 2, 3))


# ---- what is written ----


def test_published_folder_names_no_path(recipe, language, vision, image_folder, suites, tmp_path):
    questions = image_folder / "questions.jsonl"
    arguments = ("--stage", "questions", "--language", language, "--vision", vision, "--experts", suites["edges"])
    arguments += ("--train_data", questions, "--eval_data", questions, "--do_train", "--do_eval", "--lora", 2)
    published = tmp_path / "published"
    recipe(*arguments, "--language_id", "someone/tiny-llama", "--publish_to", published)
    texts = {path: path.read_text() for path in published.rglob("*") if path.suffix in (".md", ".json", ".jinja")}
    assert [path for path, text in texts.items() if str(tmp_path.parent) in text] == []
    card = texts[published / "README.md"]
    for part in (
        "someone/tiny-llama, with LoRA of rank 2",
        vision.name,
        "edge, as tokens",
        "| exact |",
        "base_model:",
    ):
        assert part in card
    weights = load_file(published / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} <= {torch.float16, torch.int64}
    loaded = PrismerLMForConditionalGeneration.from_pretrained(published, language=str(language), vision=str(vision))
    assert loaded.model.vision_projection.fc1.weight.dtype == torch.float32


# ---- pieces ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--do_train",), "--language is missing"),
        (("--do_train", "--language", "LANGUAGE", "--experts", "none"), "nothing is trained"),
        (("--do_train", "--language", "LANGUAGE", "--vision", "PRISMER", "--experts", "offline"), "brings its own"),
        (("--do_train", "--language", "LANGUAGE", "--lora", 2, "--dora", 2), "one adapter"),
        (("--do_train", "--language", "LANGUAGE", "--without_experts", "depth"), "the suite has edge, ocr"),
        (("--do_train", "--language", "LANGUAGE", "--cache_features"), "needs vision encoders"),
        (("--do_train", "--language", "LANGUAGE", "--add_expert", "ocr"), "needs --model"),
    ],
)
def test_impossible_arguments_are_named(recipe, language, checkpoint, image_folder, arguments, message):
    known = {"LANGUAGE": language, "PRISMER": checkpoint}
    with pytest.raises(SystemExit, match=message):
        recipe(*(known.get(part, part) for part in arguments), "--train_data", image_folder / "captions.csv")


def test_conversations_need_the_second_stage(recipe, language, chats, image_folder):
    data = ("--language", language, "--image_folder", image_folder)
    with pytest.raises(SystemExit, match="they need --stage questions"):
        recipe(*data, "--train_data", chats, "--do_train")
    with pytest.raises(SystemExit, match="conversations, which are not measured"):
        recipe(*data, "--eval_data", chats, "--do_eval")


def test_conversations_have_one_form(chats, image_folder):
    rows = load_chats(chats, image_folder)
    assert rows["image_ids"][:] == [["00.png"], ["01.png", "02.png"], []]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"] * 2
    assert rows[1]["messages"][0]["content"] == "<image><image>is it red"


def test_faulty_conversations_are_reported_together(image_folder, tmp_path):
    turn = {"role": "user", "content": "<image>what color is it"}
    rows = [{"images": ["missing.png"], "messages": [turn, {"role": "assistant", "content": "red"}]}]
    rows += [{"images": ["00.png"], "messages": [turn]}, {"images": ["00.png", "01.png"], "messages": [turn]}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as error:
        load_chats(path, image_folder)
    for part in ("3 of 3 rows", "missing.png is missing", "no turn of the assistant", "places for 1 images, but 2"):
        assert part in str(error.value)


def test_most_frequent_answer_is_learned():
    columns = {"image_id": ["a", "a", "a", "b"], "text": ["q", "q", "r", "q"], "weight": [0.3, 0.7, 1.0, 1.0]}
    rows = run_lm.datasets.Dataset.from_dict({**columns, "suffix": ["1", "2", "3", "4"]})
    assert run_lm.best_answers(rows)["suffix"][:] == ["2", "3", "4"]


def test_rows_of_a_batch_have_equally_many_prompts():
    lengths = [2, 1, 2, 3, 2, 1]
    batches = list(batches_by_length(lengths, 4))
    assert sorted(number for batch in batches for number in batch) == list(range(6))
    assert batches == [[1, 5], [0, 2], [4], [3]]


def test_answers_are_compared_without_a_full_stop():
    assert tidy_answer(" Blue.\nThe sky is blue.") == "blue"
    assert tidy_answer("") == ""


def test_bfloat16_needs_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, dtype in (("fpu avx512_bf16", torch.bfloat16), ("fpu avx512f", torch.float32)):
        monkeypatch.setattr(training.Path, "read_text", lambda self, text=flags: text)
        assert run_lm.find_dtype("auto") == dtype
    assert run_lm.find_dtype("bfloat16") == torch.bfloat16
