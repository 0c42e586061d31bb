"""Starting: the command line without torch, the Auto classes after the import, and one checkout at a time."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from modeling_prismer import PrismerForConditionalGeneration, __version__, installation, pretrained_path
from modeling_prismer.cli import app


REPOSITORY = Path(__file__).resolve().parents[2]
SCENE = str(REPOSITORY / "modeling_prismer" / "assets" / "scene.png")
EASY_VQA = pretrained_path("prismer-easy-vqa")


def python(*arguments, cwd):
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def console_script(folder, code):
    """Runs code in a script named as the one that pip installs."""
    script = folder / "prismer"
    script.write_text(f"from modeling_prismer.cli import app\n{code}")
    return python(script, cwd=folder)


# ---- the command line ----

# arguments, exit status, what is said
WITHOUT_TORCH = [
    (["--help"], 0, "classify"),
    (["label", "--help"], 0, "--shard"),
    (["--version"], 0, f"prismer {__version__}"),
    (["paint"], 2, "paint"),
    (["caption"], 2, "IMAGES"),
    (["caption", SCENE, "--beems", "3"], 2, "--beems"),
    (["caption", SCENE, "--beams", "0"], 2, "--beams"),
    (["caption", "missing.png"], 1, "there is no file 'missing.png'"),
    (["classify", "missing.png", "cat"], 1, "there is no file 'missing.png'"),
    (["experts", "missing.png", "--out", "panel"], 1, "there is no file 'missing.png'"),
    (["caption", "*.nothing"], 1, "there is no file '*.nothing'"),
    (["ask", SCENE], 1, "there is no question"),
    (["ask", SCENE, " "], 1, "a question is empty"),
    (["caption", SCENE, "--model", "no/such/model"], 1, "model 'no/such/model' is neither a folder"),
    (["caption", SCENE, "--model", "me/missing"], 1, "prismer-easy-vqa, prismer-scenes"),
    (["caption", SCENE, "--model", "prismer-scene"], 1, "Did you mean prismer-scenes?"),
    (["caption", SCENE, "--model", "."], 1, "has no config.json"),
    (["caption", SCENE, "--dtype", "half"], 2, "'half' is not one of"),
    (["export", "no/such/model", "out"], 1, "model 'no/such/model' is neither a folder"),
    (["caption", SCENE, "--device", "gpu"], 1, "--device is 'gpu'; accepted are auto, cpu, cuda"),
    (["caption", SCENE, "--device", "cuda:first"], 1, "--device is 'cuda:first'"),
    (["label", SCENE, "--out", "store", "--device", "gpu"], 1, "--device is 'gpu'"),
    (["check", "--device", "gpu"], 1, "--device is 'gpu'"),
    (["features", "names.txt", "--out", "table.safetensors"], 1, "names.txt"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """For each of `WITHOUT_TORCH`: exit status, output, and whether torch had been imported."""
    code = f"""
import json, sys
from typer.testing import CliRunner
for arguments in {[arguments for arguments, *_ in WITHOUT_TORCH]}:
    result = CliRunner().invoke(app, arguments)
    print(json.dumps([result.exit_code, result.output, "torch" in sys.modules]))
"""
    finished = console_script(tmp_path_factory.mktemp("start"), code)
    assert finished.returncode == 0, finished.stderr
    return [json.loads(line) for line in finished.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(WITHOUT_TORCH)), ids=lambda i: "-".join(WITHOUT_TORCH[i][0])[:30])
def test_help_and_errors_in_arguments_need_no_torch(runs, number):
    _, status, said = WITHOUT_TORCH[number]
    exit_code, output, has_torch = runs[number]
    assert (exit_code, has_torch) == (status, False) and said in output


def test_public_names_are_there_in_the_command(tmp_path):
    code = f"""
import sys, modeling_prismer
assert not hasattr(modeling_prismer, "PrismerForSpeech") and "torch" not in sys.modules
from modeling_prismer import sample_image  # any of them registers all classes
from transformers import AutoProcessor
assert type(AutoProcessor.from_pretrained({EASY_VQA!r})) is modeling_prismer.PrismerProcessor
sys.argv[1:] = ["caption", {SCENE!r}, "--device", "cpu"]
app()
"""
    finished = console_script(tmp_path, code)
    assert finished.returncode == 0, finished.stderr
    assert len(finished.stdout.split()) > 3


def test_python_m_is_the_command(tmp_path):
    finished = python("-X", "importtime", "-m", "modeling_prismer", "--version", cwd=tmp_path)
    assert finished.stdout == f"prismer {__version__}\n"
    assert " torch\n" not in finished.stderr


def test_a_model_on_the_hub_is_accepted(monkeypatch):
    def no_network(*args, **kwargs):
        raise ValueError("the network was loaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **kwargs: EASY_VQA)
    monkeypatch.setattr("modeling_prismer.PrismerProcessor.from_pretrained", no_network)
    result = CliRunner().invoke(app, ["caption", SCENE, "--model", "me/prismer"])
    assert result.exit_code == 1 and result.stderr == "error: the network was loaded\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", SCENE, "--model", EASY_VQA],
        ["classify", SCENE, "circle", "--model", EASY_VQA],
        ["ask", "{folder}/notes.png", "what is it?"],
        ["export", EASY_VQA, "{folder}/notes.png"],
    ],
)
def test_the_network_is_loaded_last(tmp_path, monkeypatch, arguments):
    def load(*args, **kwargs):
        raise AssertionError("the network was loaded before the arguments were checked")

    monkeypatch.setattr(PrismerForConditionalGeneration, "from_pretrained", load)
    (tmp_path / "notes.png").write_text("no image")
    result = CliRunner().invoke(app, [argument.format(folder=tmp_path) for argument in arguments])
    assert result.exit_code == 1 and result.stderr.startswith("error: "), result.exception


# ---- the import ----


def test_import_registers_the_auto_classes_and_no_hook(tmp_path):
    code = f"""
import sys, modeling_prismer
assert "peft" not in sys.modules
assert not any(type(finder).__module__.startswith("modeling_prismer") for finder in sys.meta_path)
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained({EASY_VQA!r})
assert isinstance(model, modeling_prismer.PrismerForConditionalGeneration)
assert isinstance(AutoProcessor.from_pretrained({EASY_VQA!r}), modeling_prismer.PrismerProcessor)
"""
    finished = python("-c", code, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr


# ---- two checkouts ----


@pytest.fixture
def other_checkout(tmp_path):
    """A copy of the code, which is not installed."""
    for folder in ("modeling_prismer", "processing", "conversion"):
        kept = shutil.ignore_patterns("__pycache__", "checkpoints", "assets")
        shutil.copytree(REPOSITORY / folder, tmp_path / "other" / folder, ignore=kept)
    shutil.copy(REPOSITORY / "setup.cfg", tmp_path / "other")
    return (tmp_path / "other").resolve()


def test_code_of_two_checkouts_is_named(other_checkout):
    finished = python("-c", "import modeling_prismer", cwd=other_checkout)
    assert finished.stderr.splitlines()[-1] == (
        f"ImportError: two checkouts are mixed: modeling_prismer comes from {other_checkout}/modeling_prismer, "
        f"but modeling_prismer.processing comes from {REPOSITORY / 'processing'}. Install this checkout: "
        f"pip install -e '{other_checkout}'"
    )


@pytest.mark.parametrize("script", ["training_examples/run_vqa.py", "tests/deep/folder/measure.py"])
def test_a_script_of_another_checkout_is_named(other_checkout, script):
    path = other_checkout / script
    path.parent.mkdir(parents=True)
    path.write_text("import modeling_prismer")
    finished = python(path, cwd=other_checkout.parent)
    assert finished.stderr.splitlines()[-1] == (
        f"ImportError: two checkouts are mixed: {path} belongs to {other_checkout}, but modeling_prismer comes from "
        f"{REPOSITORY / 'modeling_prismer'}. Install the script's checkout: pip install -e '{other_checkout}'"
    )


def test_a_checkout_that_is_not_installed_says_so(other_checkout):
    code = f"import sys; sys.path.insert(0, {str(other_checkout)!r}); import modeling_prismer"
    finished = python("-I", "-S", "-c", code, cwd=other_checkout.parent)
    assert f"processing was not found. Install this checkout: pip install -e '{other_checkout}'" in finished.stderr


def test_scripts_elsewhere_may_import_the_package(tmp_path, monkeypatch):
    (tmp_path / "setup.cfg").touch()
    for script in (tmp_path / "measure.py", REPOSITORY / "training_examples" / "run_vqa.py", None):
        monkeypatch.setattr(installation, "_script", lambda script=script: script)
        installation.check_one_checkout()
