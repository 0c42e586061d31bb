"""The README's Python runs, block after block, as a reader would run it, and prints what its comments say."""

import re
from pathlib import Path


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


def test_every_file_and_make_target_that_it_names_exists():
    readme = (REPOSITORY / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (REPOSITORY / link).exists(), link
    makefile = (REPOSITORY / "Makefile").read_text()
    targets = set(re.findall(r"`make ([a-z-]+)`", readme)) | set(re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
