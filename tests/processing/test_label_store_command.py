"""The command `prismer label`: its output, and how it continues, repairs and refuses."""

import os

import pytest
from typer.testing import CliRunner

from modeling_prismer.cli import app
from modeling_prismer.processing.experts import CannyEdges, ExpertSuite
from modeling_prismer.processing.labels import LabelStore, LabelWriter, read_manifest

from .label_experts import write_images


@pytest.fixture
def run(tmp_path):
    write_images(tmp_path / "photos", 3)
    ExpertSuite([CannyEdges()]).save_pretrained(tmp_path / "suite")

    def run(*arguments):
        experts = ("--experts", str(tmp_path / "suite"), "--out", str(tmp_path / "labels"))
        result = CliRunner().invoke(app, ["label", str(tmp_path / "photos"), *experts, *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        lines = [line for line in result.stderr.splitlines() if line and not line.startswith("labels:")]
        return result.exit_code, lines

    return run


def test_damaged_images_are_listed_by_name(run, tmp_path):
    for number in range(12):
        (tmp_path / f"photos/bad {number:02d}[red].jpg").write_bytes(b"no image")
    code, lines = run()
    assert code == 0 and lines[0].startswith("damaged: bad 00[red].jpg: ValueError: 'bad 00[red].jpg' is not an image")
    assert sum(line.startswith("damaged: ") for line in lines) == 10 and lines[10].startswith(
        "and 2 more; --report damaged.jsonl lists all"
    )
    assert lines[11].startswith("15 images labelled, 12 of them damaged")


def test_failed_images_are_labelled_again_on_request(run, tmp_path):
    (tmp_path / "photos/bad.png").write_bytes(b"no image")
    run()
    write_images(tmp_path / "photos", 1)
    (tmp_path / "photos/part0/0000.png").replace(tmp_path / "photos/bad.png")
    assert run()[1][-1].startswith("0 images labelled")
    assert run("--retry-failed")[1][-1].startswith("1 images labelled, 0 of them damaged")
    assert not LabelStore(tmp_path / "labels").errors


def test_damaged_shard_is_repaired_by_the_command_in_the_error(run, tmp_path):
    run()
    (shard,) = (tmp_path / "labels").glob("labels-*")
    os.truncate(shard, 100)
    code, (error,) = run()
    assert code == 1 and error.startswith(f"error: {shard} is damaged: ")
    assert f"`prismer label IMAGES --out {tmp_path / 'labels'} --repair`" in error
    code, lines = run("--repair", "--retry-failed")
    assert code == 0 and lines[-1].startswith("3 images labelled") and len(LabelStore(tmp_path / "labels")) == 3


def test_other_versions_can_be_allowed(run, tmp_path):
    run()
    path = tmp_path / "labels/manifest.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "1.'))
    code, (error,) = run()
    assert code == 1 and "versions.torch" in error and "--allow-other-versions" in error
    assert run("--allow-other-versions")[0] == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": 2}'])
def test_damaged_manifest_is_one_line(run, tmp_path, content):
    run()
    (tmp_path / "labels/manifest.json").write_text(content)
    code, (error,) = run()
    assert code == 1 and error.startswith(f"error: {tmp_path / 'labels/manifest.json'} ")


def test_two_runs_at_once_are_refused_in_one_line(run, tmp_path):
    run()
    with LabelWriter(tmp_path / "labels", read_manifest(tmp_path / "labels")):
        code, (error,) = run()
        assert code == 1 and error.startswith(f"error: another run writes into {tmp_path / 'labels'}")
        assert run("--shard", "0/2")[0] == 1
        assert run("--retry-failed")[0] == 1
    assert run()[0] == 0
