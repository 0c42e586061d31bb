"""Saved with its code, Prismer loads and says the same where this package is not installed; what goes to the Hub."""

import inspect
import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import modeling_prismer
from modeling_prismer import (
    PrismerForConditionalGeneration,
    PrismerProcessor,
    pretrained_path,
    register_for_auto_class,
)
from modeling_prismer.processing.experts import ExpertSuite
from modeling_prismer.processing.experts.edge import CannyEdges
from modeling_prismer.processing.image_processing_prismer import PrismerImageProcessorTorchvision

from . import tiny_lm
from .tiny import image_inputs, prompts, tiny_model, without


NETWORK = (
    *("modeling_prismer", "adapter_targets", "backbones", "cache", "expert_editing", "expert_stems", "generation"),
    *("half_precision", "image_features", "imitation", "imitation_spec", "layers", "loss", "ranking"),
    "routed_adaptors",
)
CODE = {f"{name}.py" for name in ("configuration_prismer", "expert_spec", *NETWORK)}
PROCESSOR_CODE = {
    *("processing_prismer.py", "image_processing_prismer.py", "expert_labels.py"),
    *("experts_processor.py", "image_loading.py", "image_fetching.py", "tasks.py"),
}
SHAPE = Path(modeling_prismer.__file__).parent / "assets" / "shape.png"
QUESTION = "What shape is in the image?"


def language_model_inputs():
    config = tiny_lm.tiny_config()
    return {"input_ids": tiny_lm.prompts(config, 2), **tiny_lm.image_inputs(config, 2)}


# the model and its inputs; one of the six experts is imitated
MODELS = {
    "six experts": (
        lambda: tiny_model(imitation={"experts": ["depth"], "layers": [0, 1]}),
        lambda: {"input_ids": prompts(), **without(image_inputs(), "depth")},
    ),
    "no experts": (lambda: tiny_model(experts=[]), lambda: {"input_ids": prompts(), **image_inputs(experts=[])}),
    "language model": (tiny_lm.tiny_model, language_model_inputs),
}


@pytest.fixture(scope="module")
def saves_code():
    """Changes by `register_for_auto_class` are undone."""
    classes = [cls for cls in vars(modeling_prismer).values() if inspect.isclass(cls) and hasattr(cls, "_auto_class")]
    with pytest.MonkeyPatch.context() as patch:
        for cls in [*classes, PrismerImageProcessorTorchvision]:
            patch.setattr(cls, "_auto_class", None)
        register_for_auto_class()
        yield


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """Of an environment that sees this one's libraries, but neither this package nor an editable install."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site_packages = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    # of a folder named in a .pth file, the .pth files inside are not read: no editable install
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    if any(Path(library, "modeling_prismer").exists() for library in libraries):
        pytest.skip("this package is installed among its libraries, not in editable mode")
    (site_packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return python


# One process for all: most of its time goes into imports.
SCRIPT = """
import importlib.util, json, sys
from pathlib import Path

if importlib.util.find_spec("peft"):  # before a model is made: with default modules
    from peft import LoraConfig, get_peft_model
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, logging, pipeline
)

assert importlib.util.find_spec("modeling_prismer") is None
folder, shape, question = Path(sys.argv[1]), *sys.argv[2:]
said, trust = {}, {"trust_remote_code": True}
for name in ("language model", "six experts", "no experts"):
    inputs = load_file(folder / f"{name}.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder / name, **trust)
    base = AutoModel.from_pretrained(folder / name, **trust)
    said[name] = [AutoConfig.from_pretrained(folder / name, **trust).model_type, type(base).__name__]
    model.save_pretrained(folder / "again")
    again = AutoModelForImageTextToText.from_pretrained(folder / "again", **trust)
    with torch.no_grad():
        found = {
            "logits": model(**inputs).logits,
            "logits of the model saved again": again(**inputs).logits,
            "last hidden state": base(**inputs).last_hidden_state,
            "generated": model.generate(**inputs, do_sample=False, num_beams=3, max_new_tokens=6).contiguous(),
        }
    if name == "language model":  # its trained weights alone
        parts = {"language": str(folder / "language"), "vision": str(folder / "vision")}
        trained = AutoModelForImageTextToText.from_pretrained(folder / "trained", **parts, **trust)
        with torch.no_grad():
            found["logits"] = trained(**inputs).logits
    save_file(found, folder / f"{name} found.safetensors")

if importlib.util.find_spec("peft"):
    said["adapts"] = sorted(get_peft_model(model, LoraConfig()).peft_config["default"].target_modules)

bundled = folder / "bundled"
processor = AutoProcessor.from_pretrained(bundled, **trust)
image_processor = AutoImageProcessor.from_pretrained(bundled, **trust)
said["processors"] = [type(processor).__name__, type(image_processor).__name__]
edge = Image.open(folder / "edge.png")
inputs = processor(shape, question, expert_labels={"edge": edge, "ocr": None})
save_file(dict(inputs), folder / "inputs found.safetensors")
model = AutoModelForImageTextToText.from_pretrained(bundled, **trust)
said["answer"] = processor.post_process_generation(model.generate(**inputs), inputs["input_ids"].shape[1])
ranked = model.classify(processor, shape, ["circle", "triangle"], question, expert_labels={"edge": edge})
said["class"] = ranked[0][0]["label"]
pipe = pipeline("image-text-to-text", model=str(bundled), **trust)
said["pipeline"] = pipe(shape, "What color is the shape?", experts=[])[0]["generated_text"]
said["mask without labels"] = processor(shape, question)["expert_mask"].tolist()
try:
    processor.experts = "offline"
except ImportError as error:
    said["live experts"] = str(error)
print(json.dumps(said))
"""


def run_model(model, inputs):
    with torch.no_grad():
        logits = model(**inputs).logits
        return {
            "logits": logits,
            "logits of the model saved again": logits,
            "last hidden state": model.model(**inputs).last_hidden_state,
            "generated": model.generate(**inputs, do_sample=False, num_beams=3, max_new_tokens=6),
        }


@pytest.fixture(scope="module")
def elsewhere(saves_code, bare_python, tmp_path_factory):
    """Folders saved here with their code, and what they said in the bare environment: (folder, said, warnings)."""
    folder = tmp_path_factory.mktemp("saved")
    for name, (make_model, make_inputs) in MODELS.items():
        model = make_model()
        model.save_pretrained(folder / name)
        save_file(make_inputs(), folder / f"{name}.safetensors")
        if name == "language model":
            model.language_model.save_pretrained(folder / "language")
            model.model.vision_encoders[0].save_pretrained(folder / "vision")
            model.freeze_backbones().save_pretrained(folder / "trained", trained_only=True)
    path = pretrained_path("prismer-easy-vqa")
    processor = PrismerProcessor.from_pretrained(path)
    for part in (processor, PrismerForConditionalGeneration.from_pretrained(path)):
        part.save_pretrained(folder / "bundled")
    Image.fromarray(processor.run_experts(SHAPE, experts=["edge"])[0]["edge"]).save(folder / "edge.png")

    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [bare_python, "-c", SCRIPT, folder, SHAPE, QUESTION]
    finished = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return folder, json.loads(finished.stdout.splitlines()[-1]), finished.stderr


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A folder that stands for the Hub: what is uploaded lies there afterwards."""
    root = tmp_path / "hub"

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            file = root / repo_id / operation.path_in_repo
            file.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as uploaded:
                file.write_bytes(uploaded.read())

    def upload_folder(self, repo_id, folder_path, allow_patterns, **kwargs):
        files = [file.relative_to(folder_path).as_posix() for file in Path(folder_path).rglob("*") if file.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path, name), root / repo_id / name)

    class Repository:
        def __init__(self, repo_id, **kwargs):
            self.repo_id = repo_id

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: Repository(repo_id))
    monkeypatch.setattr(HfApi, "create_branch", lambda self, **kwargs: None)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return root


def names(folder):
    return {file.relative_to(folder).as_posix() for file in Path(folder).rglob("*") if file.is_file()}


def test_the_code_is_saved_only_when_asked_for(saves_code, monkeypatch, tmp_path):
    model = tiny_model(experts=[])
    model.save_pretrained(tmp_path / "with")
    assert {name for name in names(tmp_path / "with") if name.endswith(".py")} == CODE
    monkeypatch.setattr(PrismerForConditionalGeneration, "_auto_class", None)
    monkeypatch.setattr(modeling_prismer.PrismerConfig, "_auto_class", None)
    tiny_model(experts=[]).save_pretrained(tmp_path / "without")
    assert not [name for name in names(tmp_path / "without") if name.endswith(".py")]
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "without"), "auto_map")


@pytest.mark.parametrize("name", MODELS)
def test_saved_model_runs_without_this_package(elsewhere, name):
    folder, said, _ = elsewhere
    model = MODELS[name][0]()
    assert said[name] == [model.config.model_type, type(model.model).__name__]
    found = load_file(folder / f"{name} found.safetensors")
    expected = run_model(model, load_file(folder / f"{name}.safetensors"))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_processor_and_pipeline_run_without_this_package(elsewhere):
    folder, said, _ = elsewhere
    processor = PrismerProcessor.from_pretrained(folder / "bundled")
    expected = processor(SHAPE, QUESTION, expert_labels={"edge": Image.open(folder / "edge.png"), "ocr": None})
    found = load_file(folder / "inputs found.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert said["processors"] == ["PrismerProcessor", "PrismerImageProcessor"]
    assert said["answer"] == ["triangle"] and said["class"] == "triangle"
    assert said["pipeline"] == "What color is the shape? Teal"


def test_live_experts_ask_for_the_package_by_name(elsewhere):
    _, said, warnings = elsewhere
    assert "live experts need the package modeling-prismer" in said["live experts"]
    assert "The saved experts do not run: live experts need the package modeling-prismer" in warnings
    assert "The configured experts edge, ocr are neither among the live experts nor in expert_labels" in warnings
    assert said["mask without labels"] == [[False, False]]


def test_peft_has_default_modules_without_this_package(elsewhere):
    pytest.importorskip("peft", reason="needs peft")
    assert elsewhere[1]["adapts"] == ["q_proj", "v_proj"]


def test_folder_with_code_loads_without_trust(saves_code, tmp_path):
    model = tiny_model(experts=[])
    model.save_pretrained(tmp_path)
    PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa")).save_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is PrismerForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path)) is PrismerProcessor


# ---- uploads


@pytest.fixture
def suite_with_own_weights(tmp_path):
    """A suite that brings a file of its own, which lies two folders deep in a saved processor."""
    weights = tmp_path / "fine_edges.safetensors"
    save_file({"kernel": torch.ones(1)}, weights)

    class FineEdges(CannyEdges):
        type = "edges with weights"
        file_settings = ("weights",)

        def __init__(self, weights: str):
            super().__init__()
            self.weights = weights

    return ExpertSuite([FineEdges(str(weights))])


def test_model_processor_and_experts_are_pushed(saves_code, hub):
    path = pretrained_path("prismer-easy-vqa")
    processor, model = PrismerProcessor.from_pretrained(path), tiny_model(experts=[])
    model.push_to_hub("me/prismer", private=True)
    uploaded = names(hub / "me" / "prismer")
    assert uploaded == CODE | {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    processor.push_to_hub("me/prismer", revision="next", commit_message="With experts")
    uploaded = names(hub / "me" / "prismer") - uploaded
    assert PROCESSOR_CODE | {"processor_config.json", "tokenizer.json", "experts/suite.json"} <= uploaded
    loaded = AutoProcessor.from_pretrained(hub / "me" / "prismer")
    assert set(loaded.experts) == {"edge", "ocr"}
    assert torch.equal(
        PrismerForConditionalGeneration.from_pretrained(hub / "me" / "prismer").lm_head.dense.weight,
        model.lm_head.dense.weight,
    )


@pytest.mark.parametrize("how", ["push_to_hub", "save_pretrained"])
def test_experts_own_weights_are_pushed(hub, suite_with_own_weights, tmp_path, how):
    processor = PrismerProcessor.from_pretrained(pretrained_path("prismer-easy-vqa"), experts=suite_with_own_weights)
    if how == "push_to_hub":
        processor.push_to_hub("me/prismer")
    else:
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "notes.txt").write_text("not ours")
        processor.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="me/prismer")
    uploaded = names(hub / "me" / "prismer")
    assert {"experts/suite.json", "experts/edge/fine_edges.safetensors", "processor_config.json"} <= uploaded
    assert "notes.txt" not in uploaded
