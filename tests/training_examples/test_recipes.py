"""Runs the recipes by their command line, on a small checkpoint and a dozen images."""

import json
import shutil
import sys

import datasets
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, GenerationConfig, RobertaConfig, RobertaForMaskedLM

import run_captioning
import run_classification
import run_pretraining
import run_vqa
import training
from modeling_prismer import TASKS, PrismerForConditionalGeneration, PrismerProcessor, pretrained_path
from modeling_prismer.processing.labels import LabelStore
from tests.training_examples.conftest import NUM_IMAGES, color_of


def run(script, output_dir, *arguments):
    command = [script.__name__, "--output_dir", output_dir, "--per_device_train_batch_size", 4, "--logging_steps", 1]
    command += ["--save_strategy", "no", "--learning_rate", 2e-3]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", list(map(str, [*command, *arguments])))
        script.main()
    return output_dir


def small(checkpoint, batch=4):
    return "--model", checkpoint, "--image_size", 32, "--total_batch_size", batch


@pytest.fixture(scope="module")
def captions(checkpoint, image_folder, tmp_path_factory):
    """The output folder of a captioning run that trained, evaluated and published."""
    folder = tmp_path_factory.mktemp("captions")
    data = ("--train_data", image_folder, "--eval_data", image_folder)
    arguments = ("--do_train", "--do_eval", "--num_train_epochs", 2, "--publish_to", folder / "published")
    arguments += ("--report_to", "tensorboard")
    return run(run_captioning, folder, *small(checkpoint), *data, *arguments)


@pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs Java")
def test_captioning_has_all_metrics(captions):
    results = json.loads((captions / "eval_results.json").read_text())
    assert {f"eval_{name}" for name in ("cider", "bleu_1", "bleu_4", "meteor", "rouge_l")} <= results.keys()


def test_output_folder_has_model_processor_and_card(captions):
    processor = PrismerProcessor.from_pretrained(captions)
    PrismerForConditionalGeneration.from_pretrained(captions)
    assert processor.task == "caption" and list(processor.experts) == ["edge"]


def test_cards_have_the_metrics_and_no_local_paths(captions):
    for folder in (captions, captions / "published"):
        card = (folder / "README.md").read_text()
        assert "pipeline_tag: image-text-to-text" in card and "| experts | edge |" in card and "| cider |" in card
        assert str(captions.parent) not in card


def test_tensorboard_gets_the_losses(captions):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list(captions.rglob("events.out.tfevents.*"))  # of the training and of the evaluation after it
    tags = {tag for file in files for tag in EventAccumulator(str(file)).Reload().Tags()["scalars"]}
    assert {"train/loss", "eval/cider"} <= tags


def test_published_model_has_half_precision(captions):
    trained = PrismerForConditionalGeneration.from_pretrained(captions).state_dict()
    published = PrismerForConditionalGeneration.from_pretrained(captions / "published", dtype="auto").state_dict()
    assert all(torch.equal(published[name], tensor.to(published[name].dtype)) for name, tensor in trained.items())
    assert published["model.vision_model.embeddings.patch_embedding.weight"].dtype == torch.float16


def with_generation(folder, checkpoint, **settings):
    """Saves a copy of the checkpoint with these generation settings."""
    model = PrismerForConditionalGeneration.from_pretrained(checkpoint)
    model.generation_config.update(**settings)
    model.save_pretrained(folder)
    PrismerProcessor.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


ANSWERS = {"max_new_tokens": 2, "num_beams": 2, "length_penalty": -1.0, "repetition_penalty": 3.0}
CAPTIONS = {"min_length": 12, "max_length": 16, "num_beams": 2, "no_repeat_ngram_size": 1}


@pytest.mark.parametrize(
    "script, before", [(run_captioning, ANSWERS), (run_vqa, CAPTIONS), (run_classification, CAPTIONS)]
)
def test_generation_settings_of_the_old_task_are_replaced(script, before, checkpoint, image_folder, tmp_path):
    model = with_generation(tmp_path / "before", checkpoint, **before)
    data = image_folder
    if script is run_classification:
        data = tmp_path / "classes"
        (data / "red").mkdir(parents=True)
        shutil.copy(image_folder / "00.png", data / "red")
    arguments = ("--train_data", data, "--do_train", "--max_steps", 1, "--total_batch_size", 4)
    run(script, tmp_path / "after", "--model", model, "--image_size", 32, *arguments)
    saved = PrismerForConditionalGeneration.from_pretrained(tmp_path / "after").generation_config
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    expected = TASKS[PrismerProcessor.from_pretrained(tmp_path / "after").task].generation
    assert saved.to_diff_dict().items() >= (expected | tokens).items()
    plain = GenerationConfig()
    assert all(getattr(saved, name) == getattr(plain, name) for name in set(before) - set(expected))


def test_captions_of_a_vqa_checkpoint_are_not_cut(checkpoint, image_folder, tmp_path):
    model = with_generation(tmp_path / "before", checkpoint, **ANSWERS)
    arguments = ("--eval_data", image_folder, "--predict_only", "--max_eval_rows", 2)
    run(run_captioning, tmp_path, "--model", model, *arguments)
    processor = PrismerProcessor.from_pretrained(checkpoint)
    for prediction in json.loads((tmp_path / "predictions.json").read_text()):
        assert len(processor.tokenizer(prediction["caption"])["input_ids"]) > 2 + 2  # <s> and </s>


@pytest.fixture
def without_live_experts(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "no_experts")
    PrismerProcessor.from_pretrained(checkpoint, experts=None).save_pretrained(tmp_path / "no_experts")
    return tmp_path / "no_experts"


@pytest.mark.parametrize("labels", ["precomputed", "live"])
def test_missing_live_experts_are_an_error_with_remedies(without_live_experts, image_folder, tmp_path, labels):
    arguments = ("--train_data", image_folder, "--do_train", "--max_steps", 1, "--labels", labels)
    with pytest.raises(SystemExit, match="cannot run its experts edge(?s:.*)--labels STORE(?s:.*)--experts none"):
        run(run_captioning, tmp_path / "out", *small(without_live_experts), *arguments)
    run(run_captioning, tmp_path / "out", *small(without_live_experts), *arguments, "--experts", "none")


def test_only_wanted_experts_label_the_images(tmp_path):
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"))
    image = Image.new("RGB", (48, 48), "white")
    rows = datasets.Dataset.from_dict({"image_id": ["a"], "image": [image]}).cast_column("image", datasets.Image())
    store = tmp_path / "train"
    labels = training.label_rows([rows], processor, "precomputed", store, ["edge"])(["a"])
    assert list(labels[0]) == ["edge"] and not store.exists()
    training.label_rows([rows], processor, "precomputed", store)
    assert {spec["name"] for spec in LabelStore(store).descriptions} == {"edge", "ocr"}
    shutil.rmtree(tmp_path / "train-edge")
    labels = training.label_rows([rows], processor, "precomputed", store, ["edge"])(["a"])
    assert list(labels[0]) == ["edge"] and not (tmp_path / "train-edge").exists(), "the store of all experts is used"


def test_unknown_expert_is_named(checkpoint, image_folder, tmp_path):
    arguments = ("--train_data", image_folder, "--do_train", "--experts", "edge,depht")
    with pytest.raises(SystemExit, match="--experts: depht; the model's experts are edge"):
        run(run_captioning, tmp_path, *small(checkpoint), *arguments)


def test_all_weights_except_the_vision_backbone_are_trained(captions, checkpoint):
    before = PrismerForConditionalGeneration.from_pretrained(checkpoint)
    after = PrismerForConditionalGeneration.from_pretrained(captions).state_dict()
    frozen = {id(parameter) for parameter in before._backbone_parameters(before.model, vision=True)}
    # key biases of self-attention have no gradient, because softmax ignores them
    for name, parameter in before.named_parameters():
        same = torch.equal(parameter, after[name])
        assert same if id(parameter) in frozen else (not same or name.endswith("k_proj.bias")), name


def test_experts_run_only_once_per_image(captions, checkpoint, image_folder, monkeypatch):
    def fail(*args):
        raise AssertionError("the experts ran again")

    from modeling_prismer.processing.experts import CannyEdges

    monkeypatch.setattr(CannyEdges, "run", fail)
    data = ("--eval_data", image_folder)
    run(run_captioning, captions, *small(checkpoint), *data, "--predict_only")
    with pytest.raises(Exception, match="ran again"):
        run(run_captioning, captions, *small(checkpoint), *data, "--predict_only", "--labels", "live")


def test_predictions_are_written_without_references(checkpoint, image_folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("b.png", "a.png"):
        shutil.copy(image_folder / "00.png", images / name)
    (images / "list.csv").write_text("file_name\nb.png\na.png\n")
    run(run_captioning, tmp_path / "out", *small(checkpoint), "--eval_data", images, "--predict_only")
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [result["image_id"] for result in results] == ["b.png", "a.png"]
    assert results[0]["caption"] == results[1]["caption"]


def test_vqa_recipe_learns_to_rank_answers(checkpoint, image_folder, tmp_path):
    candidates = tmp_path / "answers.txt"
    candidates.write_text("red\ngreen\nblue\nwhite\nyes\nno\n")
    data = ("--train_data", image_folder, "--eval_data", image_folder, "--candidates", candidates)
    arguments = ("--do_train", "--do_eval", "--num_train_epochs", 40, "--no_augment", "--freeze", "none")
    run(run_vqa, tmp_path, *small(checkpoint, batch=8), *data, *arguments, "--per_device_train_batch_size", 8)
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_vqa_accuracy"] > 0.75


def test_questions_can_share_an_image(checkpoint, image_folder, tmp_path, monkeypatch):
    shapes = []
    forward = PrismerForConditionalGeneration.forward

    def record(self, **inputs):
        shapes.append((len(inputs["pixel_values"]), len(inputs["input_ids"])))
        return forward(self, **inputs)

    monkeypatch.setattr(PrismerForConditionalGeneration, "forward", record)
    arguments = ("--train_data", image_folder, "--do_train", "--max_steps", 2, "--questions_per_image", 2)
    run(run_vqa, tmp_path, *small(checkpoint), *arguments)
    assert shapes == [(4, 8)] * 2


def test_classification_learns_from_a_few_shots(checkpoint, image_folder, tmp_path):
    for number in range(NUM_IMAGES):
        folder = tmp_path / "data" / color_of(number)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / f"{number:02}.png", folder)
    arguments = ("--train_data", tmp_path / "data", "--eval_data", tmp_path / "data", "--shots", 2)
    arguments += ("--do_train", "--do_eval", "--num_train_epochs", 40, "--no_augment", "--freeze", "none")
    run(run_classification, tmp_path / "out", *small(checkpoint, batch=8), *arguments)
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_top_1"] > 0.6


@pytest.fixture
def backbones(tokenizer, tmp_path):
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    CLIPVisionModel(CLIPVisionConfig(**shared, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vision")
    config = RobertaConfig(**shared, vocab_size=len(tokenizer), max_position_embeddings=64, type_vocab_size=1)
    RobertaForMaskedLM(config).save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    return ("--vision", tmp_path / "vision", "--text", tmp_path / "text", "--num_latents", 4, "--resampler_layers", 1)


def test_pretraining_leaves_the_backbones_unchanged(backbones, image_folder, tmp_path):
    arguments = ("--train_data", image_folder, "--do_train", "--max_steps", 2, "--image_size", 32)
    arguments += ("--expert_suite", "offline", "--total_batch_size", 4, "--warmup_steps", 1)
    run(run_pretraining, tmp_path / "out", *backbones, *arguments, "--expert_dropout", 0.2)
    model = PrismerForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert [expert["name"] for expert in model.config.experts] == ["edge", "ocr"]
    frozen = [*model._backbone_parameters(model.model, vision=True), *model._backbone_parameters(model.model, False)]
    clip = CLIPVisionModel.from_pretrained(tmp_path / "vision")
    roberta = RobertaForMaskedLM.from_pretrained(tmp_path / "text")
    weights = [*clip.parameters(), *roberta.parameters()]
    for parameter in frozen:
        assert any(parameter.shape == weight.shape and torch.equal(parameter, weight) for weight in weights)


def test_pretraining_without_experts_makes_a_prismerz(backbones, image_folder, tmp_path):
    arguments = ("--train_data", image_folder / "captions.csv", "--streaming", "--do_train", "--max_steps", 2)
    arguments += ("--expert_suite", "none", "--image_size", 32, "--total_batch_size", 4, "--labels", "live")
    run(run_pretraining, tmp_path / "out", *backbones, *arguments)
    assert PrismerForConditionalGeneration.from_pretrained(tmp_path / "out").config.experts == []


def test_schedule_of_the_paper_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--output_dir", "x", "--do_train", "--train_data", "y"])
    args, training_args = training.parse_arguments(**run_pretraining.PAPER, per_device_train_batch_size=32)
    assert training_args.gradient_accumulation_steps == 32
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=training_args.learning_rate)
    scheduler = training.Trainer(torch.nn.Linear(1, 1), training_args, optimizers=(optimizer, None)).create_scheduler(
        10_000, optimizer
    )
    rates = []
    for _ in range(10_000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx(1e-6, rel=1e-3) and max(rates) == pytest.approx(3e-4, rel=1e-3)
    assert rates[-1] == pytest.approx(1e-6, rel=0.01) and 1900 < rates.index(max(rates)) < 2100


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--do_train"], "--do_train needs --train_data"),
        ([], "nothing to do"),
        (["--do_eval"], "need --eval_data"),
        (["--do_train", "--train_data", "x", "--freeze", "all"], "accepted are none, vision, language and both"),
        (["--do_train", "--train_data", "x", "--label_smoothing_factor", "0.1"], "use --label_smoothing"),
        (["--do_train", "--train_data", "x", "--total_batch_size", "9"], "is not a multiple of the 8 samples"),
        (["--do_train", "--train_data", "x", "--predict_only"], "neither trains nor evaluates"),
    ],
)
def test_conflicting_arguments_are_refused(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["run_vqa.py", "--output_dir", "x", *arguments])
    with pytest.raises(SystemExit):
        training.parse_arguments()
    assert message in capsys.readouterr().err


def test_missing_model_argument_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_vqa.py", "--output_dir", "x", "--do_eval", "--eval_data", "y"])
    args, _ = training.parse_arguments()
    with pytest.raises(SystemExit, match="--model is missing"):
        training.load_checkpoint(args, "vqa")


def test_image_size_changes_model_and_processor(checkpoint, monkeypatch):
    command = ["run_vqa.py", "--output_dir", "x", "--do_eval", "--eval_data", "y", "--model", str(checkpoint)]
    monkeypatch.setattr(sys, "argv", [*command, "--image_size", "48"])
    args, _ = training.parse_arguments()
    model, processor = training.load_checkpoint(args, "vqa")
    inputs = processor(Image.new("RGB", (60, 50)), text="is it red")
    assert inputs["pixel_values"].shape[2:] == (48, 48)
    model.generate(**inputs, max_new_tokens=2)


def test_vqav2_and_visual_genome_can_be_joined(tmp_path, monkeypatch):
    coco, genome = tmp_path / "coco", tmp_path / "vg"
    lists = []
    for split in ("train2014", "val2014"):
        (coco / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(coco / split / f"COCO_{split}_000000000007.jpg")
        question = {"question_id": 70, "image_id": 7, "question": "what is it"}
        answers = [{"answer": "cat" if i < 7 else "dog", "answer_id": i} for i in range(10)]
        lists.append(tmp_path / f"v2_OpenEnded_mscoco_{split}_questions.json")
        lists[-1].write_text(json.dumps({"questions": [question]}))
        annotations = {"annotations": [{"question_id": 70, "image_id": 7, "answers": answers}]}
        (tmp_path / f"v2_mscoco_{split}_annotations.json").write_text(json.dumps(annotations))
    genome.mkdir()
    Image.new("RGB", (8, 8)).save(genome / "1.jpg")
    lists.append(tmp_path / "question_answers.json")
    qa = {"qa_id": 3, "image_id": 1, "question": "what color?", "answer": "Red."}
    lists[-1].write_text(json.dumps([{"id": 1, "qas": [qa]}]))

    command = ["run_vqa.py", "--output_dir", "x", "--do_train", "--train_data", *lists]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--image_folder", str(coco), str(coco), str(genome)])
    args, training_args = training.parse_arguments(run_vqa.VqaArguments, **run_vqa.PAPER)
    rows, _ = training.load_data(args, training_args, "vqa")
    found = [(row["image_id"], row["suffix"], round(row["weight"], 3)) for row in rows]
    train, val = (f"{split}/COCO_{split}_000000000007.jpg" for split in ("train2014", "val2014"))
    expected = [(train, "cat", 0.7), (train, "dog", 0.3), (val, "cat", 0.7), (val, "dog", 0.3), ("1.jpg", "Red", 0.2)]
    assert found == expected


def test_image_size_of_the_paper_is_for_training_only(monkeypatch):
    sizes = []
    for arguments in (["--do_train", "--train_data", "x"], ["--do_eval"], ["--do_eval", "--image_size", "64"]):
        command = ["run_vqa.py", "--output_dir", "x", "--eval_data", "y", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        sizes.append(training.parse_arguments(run_vqa.VqaArguments, **run_vqa.PAPER)[0].image_size)
    assert sizes == [480, None, 64]


def test_checkpoint_of_several_tasks_can_get_another_task(checkpoint, tmp_path, monkeypatch):
    processor = PrismerProcessor.from_pretrained(checkpoint)
    processor.tasks = ["caption", "vqa"]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "several").mkdir(exist_ok=True)
        shutil.copy(checkpoint / name, tmp_path / "several")
    processor.save_pretrained(tmp_path / "several")
    command = ["run", "--output_dir", "x", "--do_eval", "--eval_data", "y", "--model", str(tmp_path / "several")]
    monkeypatch.setattr(sys, "argv", command)
    _, processor = training.load_checkpoint(training.parse_arguments()[0], "classification")
    processor.save_pretrained(tmp_path / "classes")
    assert PrismerProcessor.from_pretrained(tmp_path / "classes").task == "classification"
