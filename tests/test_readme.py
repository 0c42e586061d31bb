"""
The Python of the README and of guides runs, block after block, as a reader would run it, and prints what its comments
say.
"""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import modeling_prismer
from modeling_prismer.processing.experts import Expert
from modeling_prismer.processing.image_processing_prismer import PrismerImageProcessorTorchvision


REPOSITORY = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
OFFLINE_BLOCKS = [block for block in BLOCKS if "openai/clip" not in block]


def test_python_blocks_run_and_print_what_they_say(monkeypatch, tmp_path, capsys):
    (tmp_path / "modeling_prismer").symlink_to(REPOSITORY / "modeling_prismer")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    assert len(OFFLINE_BLOCKS) == len(BLOCKS) - 1 >= 3
    for block in OFFLINE_BLOCKS:
        exec(block, namespace)
    printed = capsys.readouterr().out
    assert "['teal']" in printed and "['triangle', 'no']" in printed
    assert printed.splitlines()[2].startswith("[2,")  # a triangle is the best of the three


@pytest.mark.parametrize(
    "guide, printed",
    [
        (
            "generation.md",
            ["['teal']", "['triangle']", "['no']", "Teal", "torch.Size([1, 4, 9, 80])"]
            + ["[{'input_text': 'What color is the shape?', 'generated_text': ' Teal'}]"]
            + ["What color is the shape? Teal", "Is it red? No", "triangle", "1.0"],
        ),
        ("sharing.md", []),
        (
            "first_steps.md",
            ["['teal']", "edge_values (1, 1, 64, 64)", "expert_mask (1, 2)", "triangle", "['triangle', 'no']"]
            + ["['triangle', 'teal', 'no']", "(64, 64) ['▲']", "[[False, False]]", "['teal']"],
        ),
        ("own_expert.md", ["(64, 64) uint8", "(1, 1, 64, 64) [[True, True, True]]", "1", "(64, 64)"]),
        ("convert.md", ["['teal']", "left over in the checkpoint (79):", "  expert_encoder.resampler.*"]),
    ],
)
def test_python_blocks_of_a_guide_run_and_print_what_they_say(monkeypatch, tmp_path, capsys, guide, printed):
    (tmp_path / "modeling_prismer").symlink_to(REPOSITORY / "modeling_prismer")
    monkeypatch.chdir(tmp_path)
    classes = [cls for cls in vars(modeling_prismer).values() if inspect.isclass(cls) and hasattr(cls, "_auto_class")]
    for cls in [*classes, PrismerImageProcessorTorchvision]:  # what sharing.md changes is put back
        monkeypatch.setattr(cls, "_auto_class", cls._auto_class)
    monkeypatch.setattr(Expert, "registry", dict(Expert.registry))  # and what own_expert.md adds to it
    namespace = {"__name__": "guide"}
    for block in re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / guide).read_text(), flags=re.DOTALL):
        if "trl" not in block or importlib.util.find_spec("trl"):
            exec(block, namespace)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line in printed] == printed


def test_the_guide_to_deployment_runs_as_far_as_its_libraries_are_there(monkeypatch, tmp_path, capsys):
    (tmp_path / "modeling_prismer").symlink_to(REPOSITORY / "modeling_prismer")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "deploy.md").read_text(), flags=re.DOTALL)
    optional = ("torchao", "bitsandbytes", "modeling_prismer.conversion", "onnxruntime")
    libraries = {name: "onnxscript" if name == "modeling_prismer.conversion" else name for name in optional}
    there = [b for b in blocks if all(importlib.util.find_spec(libraries[name]) for name in optional if name in b)]
    namespace = {"__name__": "guide"}
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute; test_compile.py does it
        for block in there:
            exec(block, namespace)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("['")]
    assert lines == ["['teal']"] * sum("# ['teal']" in block for block in there) and len(lines) >= 2


def test_every_file_and_make_target_that_it_names_exists():
    readme = (REPOSITORY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (REPOSITORY / link).exists(), link
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"`make ([a-z-]+)`", readme)) | set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
