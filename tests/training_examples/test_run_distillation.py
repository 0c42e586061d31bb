"""run_distillation.py: the student learns first, then the task; the teachers stay, and the evaluation runs none."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import run_distillation
import run_lm
from distillation import draw_teachers, forward_as, teachers_of
from modeling_prismer import PrismerForConditionalGeneration, PrismerLMForConditionalGeneration, PrismerModel
from tests.modeling_prismer.test_imitation import IMITATION
from tests.modeling_prismer.tiny import image_inputs, tiny_model
from tests.training_examples import distributed_distillation
from tests.training_examples.distributed_launch import launch


STEMS = json.dumps(
    {"hidden_size": 32, "image_size": 32, "num_latents": 4, "resampler_layers": 1, "resampler_attention_heads": 2}
)


@pytest.fixture(scope="module")
def recipe():
    """Runs a script, and returns its output folder."""

    def run(out, *arguments, script=run_distillation):
        shared = ["--output_dir", out, "--use_cpu", "--max_steps", 3, "--logging_steps", 1, "--save_strategy", "no"]
        shared += ["--per_device_train_batch_size", 4, "--learning_rate", 0.01, "--labels", "live"]
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr("run_captioning.shutil.which", lambda name: None)  # the metrics that need no Java
            monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, [*shared, *arguments])])
            script.main()
        return out

    return run


@pytest.fixture(scope="module")
def student(recipe, checkpoint, image_folder, tmp_path_factory):
    """The output folder of the first stage."""
    adaptors = ("--imitate", "edge", "--layers", "0,1", "--num_adaptors", 3, "--adaptor_size", 8)
    data = ("--train_data", image_folder / "captions.csv", "--image_size", 32, "--do_train")
    return recipe(tmp_path_factory.mktemp("student"), "--model", checkpoint, *adaptors, *data)


def test_all_experts_without_the_task(recipe, student, image_folder, tmp_path):
    data = ("--train_data", image_folder / "captions.csv", "--do_train", "--distil", "experts", "--model", student)
    new = changed(student, recipe(tmp_path, *data))
    assert new and all(".imitation." in name for name in new)
    assert any("image_condition" in name for name in new) and not any("teacher_embedding" in name for name in new)


def changed(before, after):
    """Names of weights that differ, and of new ones."""
    before, after = (load_file(folder / "model.safetensors") for folder in (before, after))
    return {name for name, tensor in after.items() if name not in before or not torch.equal(tensor, before[name])}


def test_first_stage_trains_the_student_alone(student, checkpoint):
    new = changed(checkpoint, student)
    assert new and all(".imitation." in name for name in new)
    imitation = PrismerForConditionalGeneration.from_pretrained(student).model.vision_model.imitation
    assert imitation.adaptors[0].up_proj.weight.any() and imitation.adaptors[1].router.film.weight.any()
    assert not imitation.image_condition.bias.any()  # the routers see the teacher
    assert imitation.heads["edge"].token_mean.any() and imitation.heads["edge"].token_scale != 1
    history = json.loads((student / "trainer_state.json").read_text())["log_history"]
    assert {"imitation_tokens", "imitation_maps", "imitation_balance"} <= history[0].keys()


@pytest.mark.parametrize("texts_per_image", [(), ("--texts_per_image", 2)])
def test_images_have_different_numbers_of_questions(recipe, student, image_folder, tmp_path, texts_per_image):
    lines = (image_folder / "questions.jsonl").read_text().splitlines()
    more = json.dumps(json.loads(lines[0]) | {"question": "is it large", "question_id": 1000})
    (tmp_path / "questions.jsonl").write_text("\n".join([*lines, more]))
    data = ("--train_data", tmp_path / "questions.jsonl", "--image_folder", image_folder, "--do_train")
    out = recipe(tmp_path / "out", "--distil", "task", "--model", student, "--task", "vqa", *data, *texts_per_image)
    assert any("text_model" in name for name in changed(student, out))


@pytest.mark.parametrize("task, data", [("vqa", "questions.jsonl"), ("caption", "captions.csv")])
def test_second_stage_learns_the_task(recipe, student, image_folder, tmp_path, task, data):
    data = ("--train_data", image_folder / data, "--eval_data", image_folder / data, "--do_train", "--do_eval")
    out = recipe(tmp_path, "--distil", "task", "--model", student, "--task", task, *data, "--live_experts", 0.3)
    new = changed(student, out)
    assert any(".imitation." in name for name in new) and any("text_model" in name for name in new)
    assert any(".resampler." in name for name in new)
    parts = ("expert_stems", "teacher_embedding", "token_mean", "token_scale")
    assert not any(part in name for name in new for part in parts)
    explained = json.loads((out / "imitation_results.json").read_text())
    assert explained.keys() == {"edge"} and explained["edge"] < 1
    assert (out / "eval_results.json").exists()


def test_evaluation_runs_no_imitated_expert(recipe, student, image_folder, tmp_path, monkeypatch):
    seen = []
    original = PrismerForConditionalGeneration.generate
    monkeypatch.setattr(
        PrismerForConditionalGeneration,
        "generate",
        lambda self, **inputs: seen.append(inputs["expert_mask"]) or original(self, **inputs),
    )
    data = ("--eval_data", image_folder / "captions.csv", "--do_eval", "--model", student)
    recipe(tmp_path / "none", *data)
    assert seen and not torch.cat(seen).any()
    seen.clear()
    recipe(tmp_path / "all", *data, "--eval_experts", "all")
    assert seen and torch.cat(seen).all()


def test_task_runs_on_imitations(recipe, student, image_folder, tmp_path, monkeypatch):
    seen, original = [], PrismerModel.get_image_features

    def remember(self, pixel_values, expert_mask=None, **kwargs):
        seen.append(expert_mask)
        return original(self, pixel_values, expert_mask, **kwargs)

    monkeypatch.setattr(PrismerModel, "get_image_features", remember)
    data = ("--train_data", image_folder / "captions.csv", "--do_train", "--distil", "task", "--model", student)
    recipe(tmp_path / "all imitated", *data)
    assert seen and not torch.cat(seen).any()
    seen.clear()
    recipe(tmp_path / "all live", *data, "--live_experts", 1)
    assert seen and torch.cat(seen).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--imitate", "heat"), "experts heat; the config's experts are: edge"),
        (("--layers", "5"), "layer 5; the encoder's layers are 0 to 1"),
    ],
)
def test_wrong_students_are_named(recipe, checkpoint, image_folder, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        recipe(tmp_path, "--model", checkpoint, "--train_data", image_folder, "--do_train", *arguments)


def test_student_imitates_what_it_has_learned(recipe, student, image_folder, tmp_path):
    with pytest.raises(SystemExit, match="the model imitates edge already"):
        recipe(tmp_path, "--model", student, "--imitate", "ocr", "--train_data", image_folder, "--do_train")


def test_a_sample_has_a_teacher_that_it_has_labels_of():
    model = tiny_model(imitation=IMITATION)
    mask = torch.tensor([[True, False, False, False, False, True], [False, True, True, False, True, False]])
    batch = {**image_inputs(2), "expert_mask": mask}
    teachers, present = teachers_of(model, batch)
    assert teachers.keys() == set(IMITATION["experts"])
    torch.manual_seed(0)
    drawn = torch.stack([draw_teachers(model, present) for _ in range(50)])
    names = IMITATION["experts"]
    assert {names[i] for i in drawn[:, 0].tolist()} == {"depth", "ocr"}
    assert {names[i] for i in drawn[:, 1].tolist()} == {"segmentation", "detection"}
    with pytest.raises(ValueError, match="a batch has no labels of depth"):
        teachers_of(model, {"pixel_values": batch["pixel_values"]})


def test_forward_is_put_back():
    model = torch.nn.Linear(2, 2)
    with forward_as(model, lambda x: "other"):
        assert model(1) == "other"
    assert model(torch.zeros(1, 2)).shape == (1, 2) and "forward" not in vars(model)
    wrapped = model.forward = lambda x: "wrapped"  # as accelerate does
    with forward_as(model, lambda x: "other"):
        assert model(1) == "other"
    assert vars(model)["forward"] is wrapped


def test_language_model(recipe, language, vision, image_folder, suites, tmp_path):
    questions = image_folder / "questions.jsonl"
    data = ("--train_data", questions, "--eval_data", questions, "--dtype", "float32", "--stage", "questions")
    backbones = ("--language", language, "--vision", vision, "--experts", suites["edges"], "--experts_config", STEMS)
    first = recipe(tmp_path / "first", *data, *backbones, "--do_train", script=run_lm)
    student = recipe(tmp_path / "student", *data, "--model", first, "--num_adaptors", 3, "--do_train")
    new = changed(first, student)
    assert new and all(".imitation." in name for name in new)
    out = recipe(tmp_path / "out", *data, "--distil", "task", "--model", student, "--do_train", "--do_eval")
    new = changed(student, out)
    assert any("experts_projection" in name for name in new) and not any("expert_stems" in name for name in new)
    assert json.loads((out / "imitation_results.json").read_text()).keys() == {"edge"}
    model = PrismerLMForConditionalGeneration.from_pretrained(out)
    assert model.config.imitated_experts == ["edge"]


def test_two_processes_learn_the_same(checkpoint, image_folder, tmp_path):
    """DDP finds a gradient of each trained weight, and the processes keep equal weights."""
    codes = launch(distributed_distillation.all_stages, tmp_path, checkpoint, image_folder, number=2)
    assert codes == [0, 0]
    first, second = (json.loads((tmp_path / f"sums_{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first) == 3
    assert len({tuple(sums) for sums in first.values()}) == 3


def test_weight_beside_a_loss_of_tokens():
    """The loss of a language model is divided by the tokens of all micro-batches and processes."""
    args = SimpleNamespace(average_tokens_across_devices=True, world_size=2, gradient_accumulation_steps=4)
    trainer = SimpleNamespace(distillation=SimpleNamespace(weight=0.5), args=args)
    weigh = run_distillation.LmDistillationTrainer.weigh
    assert weigh(trainer, 8.0, {}) == 4.0
    assert weigh(trainer, 8.0, {"num_items_in_batch": 100}) == 0.5
