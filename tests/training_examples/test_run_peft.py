"""LoRA, DoRA and (IA)³ on each part of the network are trained, merged, saved and loaded."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file


peft = pytest.importorskip("peft")

from transformers import GenerationConfig  # noqa: E402

from modeling_prismer import TASKS, PrismerForConditionalGeneration, PrismerProcessor  # noqa: E402
from modeling_prismer.processing.data import load_rows  # noqa: E402
from run_peft import DEFAULTS, PARTS, PeftArguments, load_model, main  # noqa: E402
from training import make_trainer, parse_arguments  # noqa: E402


METHODS = ("lora", "dora", "ia3")
COMBINATIONS = [f"{method}-{part}" for method in METHODS for part in PARTS]
IN_PARTS = {"decoder": ".text_model.layers.", "encoder": ".vision_model.layers.", "resampler": ".resampler.layers."}


@pytest.fixture
def command_line(monkeypatch, checkpoint, tmp_path):
    """Sets the command line of the script, and returns its output folder."""

    def set_command_line(*arguments, model=checkpoint, steps=4):
        shared = ["--output_dir", tmp_path / "out", "--use_cpu", "--labels", "live", "--disable_tqdm", "true"]
        shared += ["--max_steps", steps, "--total_batch_size", 4, "--per_device_train_batch_size", 4, "--rank", 4]
        shared += ["--model", model] if model else []
        monkeypatch.setattr(sys, "argv", ["run_peft.py", *map(str, shared), *map(str, arguments)])
        return tmp_path / "out"

    return set_command_line


@pytest.fixture(scope="module")
def rows(image_folder):
    return load_rows(image_folder / "captions.csv", "caption")


class Trained:
    """A model whose adapter was trained for a few steps, with its state before and after."""

    def __init__(self, args, training_args, rows):
        torch.manual_seed(0)
        self.model, self.processor = load_model(args, do_train=True)
        trainer = make_trainer(self.model, self.processor, args, training_args, rows)
        self.batch = trainer.data_collator([rows[i] for i in range(8)])
        self.before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.loss_before = self.model.eval()(**self.batch).loss.item()
        trainer.train()
        trainer.save_model()
        self.folder = trainer.args.output_dir
        output = self.model.eval()(**self.batch)
        self.loss, self.logits = output.loss.item(), output.logits.detach()
        self.after = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.fixture(scope="module", params=COMBINATIONS)
def trained(request, rows, checkpoint, tmp_path_factory):
    method, part = request.param.split("-")
    arguments = f"--model {checkpoint} --method {method} --parts {part} --do_train --train_data - --no_augment"
    arguments += " --labels live --use_cpu --disable_tqdm true --max_steps 6 --total_batch_size 8 --rank 4"
    arguments += f" --learning_rate 0.02 --output_dir {tmp_path_factory.mktemp('out')} --save_strategy no"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run_peft.py", *arguments.split()])
        args, training_args = parse_arguments(PeftArguments, **DEFAULTS)
    return Trained(args, training_args, rows), part


def test_loss_falls(trained):
    assert trained[0].loss < trained[0].loss_before


def test_only_the_adapter_of_the_part_changes(trained):
    trained, part = trained
    changed = {name for name, tensor in trained.after.items() if not torch.equal(tensor, trained.before[name])}
    assert changed
    assert all(("lora_" in name or "ia3_" in name) and IN_PARTS[part] in name for name in changed)


def test_saved_adapter_is_small_and_loads_unchanged(trained, checkpoint):
    trained, _ = trained
    saved = load_file(f"{trained.folder}/adapter_model.safetensors")
    whole = load_file(f"{checkpoint}/model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) < 0.1 * sum(tensor.numel() for tensor in whole.values())
    base = PrismerForConditionalGeneration.from_pretrained(checkpoint)
    loaded = peft.PeftModel.from_pretrained(base, trained.folder).eval()
    loaded.config.label_smoothing = trained.model.config.label_smoothing
    assert torch.equal(loaded(**trained.batch).logits, trained.logits)


def test_merged_model_has_the_same_outputs(trained):
    trained, _ = trained
    merged = trained.model.merge_and_unload()
    assert type(merged) is PrismerForConditionalGeneration
    difference = (merged(**trained.batch).logits - trained.logits).abs().max()
    assert difference < 5e-5 * trained.logits.abs().max()


def test_command_saves_an_adapter_and_a_merged_model(command_line, image_folder, tmp_path):
    data = ("--train_data", image_folder / "captions.csv", "--do_train")
    folder = command_line(*data, "--parts", "decoder,encoder,resampler", "--merge_to", tmp_path / "merged")
    main()
    adapted = PrismerForConditionalGeneration.from_pretrained(folder)
    merged = PrismerForConditionalGeneration.from_pretrained(tmp_path / "merged")
    processor = PrismerProcessor.from_pretrained(tmp_path / "merged")
    inputs = processor(image_folder / "00.png", return_tensors="pt")
    logits = merged(**inputs).logits
    assert (adapted(**inputs).logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert any("lora_" in name for name in adapted.state_dict())
    assert not any("lora_" in name for name in merged.state_dict())
    assert PrismerProcessor.from_pretrained(folder).task == processor.task == "caption"
    for saved in (folder, tmp_path / "merged"):
        assert GenerationConfig.from_pretrained(saved).to_diff_dict().items() >= TASKS["caption"].generation.items()


def test_adapter_loads_its_model_and_image_size(command_line, image_folder):
    data = ("--task", "vqa", "--train_data", image_folder / "questions.jsonl")
    folder = command_line(*data, "--do_train", "--image_size", 64, "--train_whole", "edge", steps=2)
    main()
    assert any("expert_stems.edge" in name for name in load_file(folder / "adapter_model.safetensors"))
    data = ("--task", "vqa", "--eval_data", image_folder / "questions.jsonl", "--max_eval_rows", 4)
    command_line(*data, "--predict_only", "--adapter", folder, model=None)
    main()
    assert [set(answer) for answer in json.loads((folder / "predictions.json").read_text())] == [
        {"question_id", "answer"}
    ] * 4
    args, _ = parse_arguments(PeftArguments, **DEFAULTS)
    model, processor = load_model(args, do_train=False)
    assert model.config.vision_config.image_size == processor.image_processor.size["height"] == 64
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_adapter_with_new_tokens_resizes_the_embeddings(command_line, image_folder, checkpoint, tmp_path):
    processor = PrismerProcessor.from_pretrained(checkpoint)
    processor.tokenizer.add_tokens(["[DEFECT]"])
    model = PrismerForConditionalGeneration.from_pretrained(checkpoint)
    model.resize_token_embeddings(len(processor.tokenizer))
    model = peft.get_peft_model(model, peft.LoraConfig())
    with pytest.warns(UserWarning, match="has been resized"):
        model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    command_line("--train_data", image_folder, "--do_train", "--adapter", tmp_path / "adapter", model=None)
    args, _ = parse_arguments(PeftArguments, **DEFAULTS)
    loaded, processor = load_model(args, do_train=True)
    assert "[DEFECT]" in processor.tokenizer.get_vocab()
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_resumed_training_gives_the_same_adapter(command_line, image_folder, tmp_path):
    data = ("--train_data", image_folder / "captions.csv", "--do_train", "--save_steps", 2)
    folder = command_line(*data)
    main()
    straight = load_file(folder / "adapter_model.safetensors")
    command_line(*data, "--resume_from_checkpoint", folder / "checkpoint-2", "--output_dir", tmp_path / "resumed")
    main()
    resumed = load_file(tmp_path / "resumed" / "adapter_model.safetensors")
    assert not (tmp_path / "resumed" / "checkpoint-2").exists()
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in straight.items())


def test_unknown_part_is_named(command_line, image_folder):
    command_line("--train_data", image_folder, "--do_train", "--parts", "decoder,stems")
    with pytest.raises(SystemExit, match="stems is none of decoder, encoder, resampler"):
        main()
