"""The command `prismer label`: its output, and how it continues, repairs and refuses."""

import json
import os

import pytest
from typer.testing import CliRunner

from modeling_prismer.cli import app
from modeling_prismer.processing.experts import CannyEdges, ExpertSuite
from modeling_prismer.processing.labels import LabelStore, LabelWriter, read_manifest

from .label_experts import FailsOn, write_images


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
    assert code == 1 and lines[0].startswith("damaged: bad 00[red].jpg: ValueError: 'bad 00[red].jpg' is not an image")
    assert sum(line.startswith("damaged: ") for line in lines) == 10 and lines[10].startswith(
        "and 2 more; --report damaged.jsonl lists all"
    )
    assert lines[11].startswith("15 images labelled, 12 of them damaged")


def test_damaged_images_are_reported_in_a_file(run, tmp_path):
    for number in range(12):
        (tmp_path / f"photos/bad {number:02d}.jpg").write_bytes(b"no image")
    report = tmp_path / "reports" / "damaged.jsonl"
    code, lines = run("--report", str(report))
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert code == 1 and [row["file"] for row in rows] == [f"bad {number:02d}.jpg" for number in range(12)]
    assert all(row["error"].startswith("ValueError: 'bad ") for row in rows)
    assert not any("more" in line for line in lines)
    code, lines = run("--report", str(report))  # of the whole store, also if nothing was left to do
    assert code == 1
    assert lines[-1].startswith("0 images labelled, 0 of them damaged and 12 before, --retry-failed labels them again")
    assert len(report.read_text().splitlines()) == 12


@pytest.mark.parametrize(
    "experts, message",
    [
        ("best", "--experts: there is no 'best'; accepted are published, fast, commercial, offline, a checkpoint"),
        ("offline:depth", "--experts: offline has no 'depth'; it has edge, ocr"),
        ("none", "--experts: none leaves no expert to run"),
    ],
)
def test_unknown_experts_are_named(tmp_path, experts, message):
    write_images(tmp_path / "photos", 1)
    command = ["label", str(tmp_path / "photos"), "--out", str(tmp_path / "labels"), "--experts", experts]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and message in result.stderr and not (tmp_path / "labels").exists()


@pytest.mark.parametrize("experts", ["edge", "offline:edge", "fast:edge"])
def test_some_experts_of_a_suite_label(tmp_path, experts):
    write_images(tmp_path / "photos", 1)
    command = ["label", str(tmp_path / "photos"), "--out", str(tmp_path / "labels"), "--experts", experts]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert list(LabelStore(tmp_path / "labels").manifest["descriptions"]) == ["edge"]


def test_failed_images_are_labelled_again_on_request(run, tmp_path):
    (tmp_path / "photos/bad.png").write_bytes(b"no image")
    assert run()[0] == 1
    write_images(tmp_path / "photos", 1)
    (tmp_path / "photos/part0/0000.png").replace(tmp_path / "photos/bad.png")
    code, lines = run()
    assert code == 1 and lines[-1].startswith("0 images labelled")
    code, lines = run("--retry-failed")
    assert code == 0 and lines[-1].startswith("1 images labelled, 0 of them damaged; ")
    assert not LabelStore(tmp_path / "labels").errors


def test_failure_of_an_expert_is_an_exit_code(tmp_path):
    write_images(tmp_path / "photos", 3)
    ExpertSuite([FailsOn(width=19)]).save_pretrained(tmp_path / "suite")  # the second image
    paths = (str(tmp_path / "photos"), "--out", str(tmp_path / "labels"), "--experts", str(tmp_path / "suite"))
    result = CliRunner().invoke(app, ["label", *paths])
    assert result.exit_code == 1 and "3 images labelled, 1 of them damaged; " in result.stderr
    assert "no depth here" in result.stderr


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
    assert code == 1 and "versions.torch" in error and error.endswith(": --allow-other-versions")
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
