"""The Python blocks of the README and of the guides run in order and print what their comments promise."""

import importlib.util
import inspect
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    RobertaConfig,
    RobertaForMaskedLM,
    TrainingArguments,
)

import modeling_prismer
from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path
from modeling_prismer.processing.experts import Expert
from modeling_prismer.processing.image_processing_prismer import PrismerImageProcessorTorchvision
from modeling_prismer.processing.labels import LabelEngine, label_images


REPOSITORY = Path(__file__).resolve().parent.parent


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / page).read_text(), flags=re.DOTALL)


BLOCKS = python_blocks("README.md")
OFFLINE_BLOCKS = [block for block in BLOCKS if "openai/clip" not in block]


@pytest.fixture(autouse=True)
def nothing_is_trained_in_half_precision(caplog):
    yield
    for when in ("setup", "call"):
        assert not [record for record in caplog.get_records(when) if "weights are trained" in record.getMessage()]


@pytest.fixture(autouse=True)
def in_a_folder_with_the_package(monkeypatch, tmp_path):
    """Paths in the texts start at the top of the repository. Experts and engines that a text adds are removed."""
    (tmp_path / "modeling_prismer").symlink_to(REPOSITORY / "modeling_prismer")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Expert, "registry", dict(Expert.registry))
    monkeypatch.setattr(LabelEngine, "registry", dict(LabelEngine.registry))


def test_python_of_the_readme_runs(capsys):
    namespace = {}
    assert len(OFFLINE_BLOCKS) == len(BLOCKS) - 1 >= 3
    for block in OFFLINE_BLOCKS:
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert "['frog']" in printed and "['ring', 'frog']" in printed
    assert printed.splitlines()[3].startswith("[2,")  # of the three words the one on the sign


@pytest.mark.parametrize(
    "guide, printed",
    [
        (
            "generation.md",
            ["['teal']", "['triangle']", "['no']", "Teal", "torch.Size([1, 4, 9, 80])"]
            + ["[{'input_text': 'What color is the shape?', 'generated_text': ' Teal'}]"]
            + ["What color is the shape? Teal", "Is it red? No", "Teal", "['no']"]
            + ["triangle", "1.0"],
        ),
        ("sharing.md", []),
        ("distillation.md", ["torch.Size([1, 1, 32, 32])"]),
        (
            "first_steps.md",
            ["['teal']", "edge_values (1, 1, 64, 64)", "expert_mask (1, 2)", "triangle", "['triangle', 'no']"]
            + ["['triangle', 'teal', 'no']", "(64, 64) ['▲']", "[[False, False]]", "['teal']"],
        ),
        ("tasks.md", ["['frog']", "frog"]),
        ("own_expert.md", ["(64, 64) uint8", "(1, 1, 64, 64) [[True, True, True]]", "1", "(64, 64)"]),
        ("convert.md", ["['teal']", "left over in the checkpoint (79):", "  expert_encoder.resampler.*"]),
    ],
)
def test_python_of_a_guide_runs(monkeypatch, capsys, guide, printed):
    classes = [cls for cls in vars(modeling_prismer).values() if inspect.isclass(cls) and hasattr(cls, "_auto_class")]
    for cls in [*classes, PrismerImageProcessorTorchvision]:  # undo the changes of sharing.md
        monkeypatch.setattr(cls, "_auto_class", cls._auto_class)
    namespace = {"__name__": "guide"}
    for block in python_blocks(f"docs/{guide}"):
        if "trl" not in block or importlib.util.find_spec("trl"):
            exec(block, namespace)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in printed] == printed


def given_experts():
    config = AutoConfig.for_model("roberta", vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**vision)).save_pretrained("dinov2")
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained("dinov2")
    return {
        "path": pretrained_path("prismer-easy-vqa"),
        "image": Image.open("modeling_prismer/assets/shape.png"),
        "question": "What color is the shape?",
        "vision": CLIPVisionModel(CLIPVisionConfig(**vision)),
        "text": RobertaForMaskedLM(config),
        "trained_model": PrismerForConditionalGeneration.from_pretrained(pretrained_path("prismer-easy-vqa")),
    }


def given_peft():
    row = {"image": Image.open("modeling_prismer/assets/shape.png"), "text": "What color is it?", "suffix": "teal"}
    training_args = TrainingArguments(
        "runs/adapter", max_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False, disable_tqdm=True
    )
    return {"checkpoint": pretrained_path("prismer-easy-vqa"), "rows": [row] * 2, "training_args": training_args}


def write_photos():
    for name in ("summer/beach.jpg", "beach.jpg", "cats/torn.jpg"):
        path = Path("photos", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.open("modeling_prismer/assets/shape.png").convert("RGB").save(path)


def given_own_data():
    write_photos()
    Path("photos/cats/torn.jpg").write_bytes(b"torn")
    label_images("photos", "offline", "photo_labels")
    shutil.copytree(pretrained_path("prismer-easy-vqa"), "runs/answers")
    return {}


def given_label_store():
    write_photos()
    keys = ["beach.jpg", "summer/beach.jpg"]
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"))
    return {
        "keys": keys,
        "dataset": Dataset.from_dict({"file_name": keys}),
        "args": SimpleNamespace(labels="photo_labels"),
        "processor": processor,
        "experts": processor.image_processor.experts,
        "images": [f"photos/{key}" for key in keys],
        "questions": ["What color is the shape?"] * 2,
        "answers": ["teal"] * 2,
    }


def given_new_model():
    """Small backbones in local folders."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=32)).save_pretrained("clip")
    tokenizer = AutoTokenizer.from_pretrained(pretrained_path("prismer-easy-vqa"))
    tokenizer.save_pretrained("roberta")
    RobertaForMaskedLM(RobertaConfig(**sizes, vocab_size=len(tokenizer))).save_pretrained("roberta")
    return {}


# replacements for names in guides that need a GPU or the Hub
AT_HAND = {'"fast"': '"offline"', '"cuda"': '"cpu"', '["depth", "ocr"]': '["edge", "ocr"]'}
AT_HAND |= {
    '"openai/clip-vit-base-patch16"': '"clip"',
    '"FacebookAI/roberta-base"': '"roberta"',
    '"facebook/dinov2-small"': '"dinov2"',
}


@pytest.mark.parametrize(
    "given, printed",
    [
        (given_experts, r"edge.*ocr"),
        (given_peft, r"train_runtime"),
        (given_new_model, r"\['edge', 'ocr'\]\ntorch.Size\(\[1, \d+\]\) True\n"),
        (given_own_data, r"\{'cats/torn.jpg': .*\}\n\['[a-z]+'\]\n"),
        (given_label_store, r"3 0 \{\} [\d.]+\n"),
    ],
)
def test_python_of_a_guide_runs_with_given_names(capsys, given, printed):
    names = {"__name__": "guide", **given()}
    capsys.readouterr()
    guide = given.__name__.removeprefix("given_")
    for block in python_blocks(f"docs/{guide}.md"):
        for named, at_hand in AT_HAND.items():
            block = block.replace(named, at_hand)
        exec(block, names)
    assert re.search(printed, capsys.readouterr().out, flags=re.DOTALL)


def test_python_of_the_deployment_guide_runs(capsys):
    blocks = python_blocks("docs/deploy.md")
    optional = ("torchao", "bitsandbytes", "modeling_prismer.conversion", "onnxruntime")
    libraries = {name: "onnxscript" if name == "modeling_prismer.conversion" else name for name in optional}
    there = [b for b in blocks if all(importlib.util.find_spec(libraries[name]) for name in optional if name in b)]
    namespace = {"__name__": "guide"}
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute; test_compile.py does it
        for block in there:
            exec(block, namespace)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("['")]
    assert lines == ["['teal']"] * sum("# ['teal']" in block for block in there) and len(lines) >= 2


def test_files_and_make_targets_in_the_readme_exist():
    readme = (REPOSITORY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (REPOSITORY / link).exists(), link
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"`make ([a-z-]+)`", readme)) | set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
