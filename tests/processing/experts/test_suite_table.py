"""The tables of suites are counted from configurations, and the page shows them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modeling_prismer.cli import app
from modeling_prismer.processing.experts import ExpertSuite, suite_markdown, suite_rows


PAGE = Path(__file__).parents[3] / "docs" / "experts.md"
SUITES = ("published", "fast", "commercial", "offline")
# They allow commercial use of the weights.
PERMISSIVE = ("apache-2.0", "mit", "none needed: no weights")


@pytest.mark.parametrize("suite", SUITES)
def test_the_page_has_the_table_of_the_suite(suite):
    page = PAGE.read_text(encoding="utf-8")
    start, end = f"<!-- prismer experts --list {suite} --markdown -->\n", "\n<!-- end -->"
    assert page.count(start) == 1, f"docs/experts.md needs the marks {start!r} and {end!r}"
    shown = page.partition(start)[2].partition(end)[0].strip()
    assert shown == suite_markdown(suite), f"docs/experts.md: paste `prismer experts --list {suite} --markdown`"


@pytest.mark.parametrize("suite", SUITES)
def test_stated_facts_are_those_that_are_counted(suite):
    for row, expert in zip(suite_rows(suite), ExpertSuite.from_name(suite).values()):
        assert (row.expert, row.license) == (expert.name, expert.license)
        assert row.size == pytest.approx(expert.size_in_bytes, rel=0.02)
        assert row.memory <= row.size


def test_the_commercial_suite_has_permissive_licences():
    rows = suite_rows("commercial")
    assert {row.license for row in rows} <= set(PERMISSIVE)
    assert {row.license for row in suite_rows("fast")} - set(PERMISSIVE)  # Mask2Former's is not clear
    assert sum(row.memory for row in rows) < 2e9  # of 4 GB; what running takes is in the table of memory


def test_the_command_prints_the_table():
    result = CliRunner().invoke(app, ["experts", "--list", "offline", "--markdown"])
    assert result.exit_code == 0
    assert result.stdout.strip() == suite_markdown("offline")
    result = CliRunner().invoke(app, ["experts", "--list", "offline"])
    assert "CannyEdges" in result.stdout
    assert "|" not in result.stdout.replace("│", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--list", "best"], "there is no suite of experts 'best'"),
        (["--markdown"], "--markdown belongs to --list SUITE"),
        (["--out", "panels"], "no images are given"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    result = CliRunner().invoke(app, ["experts", *arguments])
    assert result.exit_code == 1
    assert message in result.output.replace("\n", " ")


def test_descriptions_of_suites_are_plain_json():
    for name in SUITES:
        json.dumps(ExpertSuite.from_name(name).to_dict())
