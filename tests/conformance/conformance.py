"""
Runs the common tests of transformers, which every model inside the library has to pass, on Prismer.

They are in the library's source distribution. That of the installed version is fetched by pip, checked against what is
installed, and unpacked under build/conformance; what it lacks is replaced by the files in stubs/ (each says what that
means); the testers in models/ are copied to where the library has its own.

    python tests/conformance/conformance.py                 # Prismer
    python tests/conformance/conformance.py --compare       # and GIT and BLIP-2, two models of the library
    python tests/conformance/conformance.py -- -k pipeline  # what follows `--` goes to pytest

It fails if a test of Prismer fails, or is skipped for a reason that is not in skips.py.
"""

import argparse
import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from skips import REASONS


HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "conformance"

# what the sdist lacks -> what stands in for it
STUBS = {
    "tests/generation/test_utils.py": "generation_tests.py",
    "tests/exporters/test_export.py": "exporter_tests.py",
    "tests/utils/test_configuration_utils.py": "configuration_values.py",
    "tests/distributed_testing_utils.py": "process_starting.py",
    "tests/pipelines/test_pipelines_image_text_to_text.py": "pipeline_tests.py",
    "utils/fetch_hub_objects_for_ci.py": "fetched_pictures.py",
}
# the pipelines' mixin reads from a file which small models there are: those that the testers make
TINY_MODELS = {
    "PrismerForConditionalGeneration": {
        "tokenizer_classes": ["RobertaTokenizer"],
        "processor_classes": ["PrismerImageProcessor"],
    },
    "GitForCausalLM": {"tokenizer_classes": ["BertTokenizer"], "processor_classes": ["CLIPImageProcessor"]},
    "Blip2ForConditionalGeneration": {
        "tokenizer_classes": ["GPT2Tokenizer"],
        "processor_classes": ["BlipImageProcessor"],
    },
}
COLUMNS = {
    "PrismerModelTest": "Prismer",
    "PrismerProcessorTest": "Prismer",
    "PrismerImageProcessingTest": "Prismer",
    "PrismerZModelTest": "Prismer without experts",
    "PrismerLMModelTest": "PrismerLM",
    "PrismerLMWithoutVisionModelTest": "PrismerLM without vision encoder",
    "PrismerLMCrossAttentionModelTest": "PrismerLM with cross-attention",
    "GitModelTest": "git",
    "GitProcessorTest": "git",
    "GitImageProcessingTest": "git",
    "Blip2ModelTest": "blip_2",
    "Blip2ProcessorTest": "blip_2",
    "Blip2ImageProcessingTest": "blip_2",
}
OUR_MODELS = ("prismer", "prismer_lm")
OUR_COLUMNS = tuple(column for column in dict.fromkeys(COLUMNS.values()) if column.startswith("Prismer"))


def fetch_sdist(version: str) -> Path:
    """The source distribution of transformers, downloaded by pip (which checks the index's hash) or from the cache."""
    sdist = BUILD / f"transformers-{version}.tar.gz"
    if not sdist.exists():
        print(f"Fetching the source distribution of transformers {version}", flush=True)
        partial = BUILD / "download"
        shutil.rmtree(partial, ignore_errors=True)
        # pip wants the package's metadata even of what it only downloads, for which setuptools of this environment do
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-build-isolation", "--no-binary", "transformers", "--dest", str(partial)]
        subprocess.run([*command, f"transformers=={version}"], check=True)
        os.replace(partial / sdist.name, sdist)
        shutil.rmtree(partial)
    return sdist


def check_sdist(archive: tarfile.TarFile, installed: Path) -> None:
    """The tests belong to what is installed only if the code does: every Python file must be the same."""
    others = []
    for member in archive:
        name = member.name.partition("/src/transformers/")[2]
        if member.isfile() and name.endswith(".py"):
            path = installed / name
            if not path.exists() or path.read_bytes() != archive.extractfile(member).read():
                others.append(name)
    if others:
        raise SystemExit(
            f"{len(others)} files of the installed transformers are not those of the source distribution, such as "
            f"{', '.join(others[:5])}: its tests would say nothing about it"
        )


def unpack(version: str) -> Path:
    """Lays out the library's tests as in its repository. Returns that folder."""
    installed = Path(find_spec("transformers").origin).parent
    tree = BUILD / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    with tarfile.open(fetch_sdist(version)) as archive:
        check_sdist(archive, installed)
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            if member.isfile() and re.fullmatch(r"tests/[\w/]+\.py", name):
                path = tree / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.extractfile(member).read())
    print("Not in the source distribution, and replaced:")
    for name, stub in STUBS.items():
        path = tree / name
        if path.exists():
            raise SystemExit(f"{name} is in the source distribution of {version}: take it out of STUBS")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(HERE / "stubs" / stub, path)
        print(f"  {name}: {ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))}")
    shutil.copytree(HERE / "models", tree / "tests" / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in {path.parent for path in (tree / "tests").rglob("*.py")} | {tree / "tests"}:
        (folder / "__init__.py").touch()
    (tree / "src").mkdir()
    (tree / "src" / "transformers").symlink_to(installed)
    summary = tree / "tiny_models" / "reports" / "tiny_model_summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps(TINY_MODELS))
    markers = set()
    for path in (tree / "tests").rglob("*.py"):
        markers |= set(re.findall(r"pytest\.mark\.(\w+)", path.read_text(encoding="utf-8")))
    markers |= set(re.findall(r"pytest\.mark\.(\w+)", (installed / "testing_utils.py").read_text(encoding="utf-8")))
    lines = [
        f"    {marker}: of the library" for marker in sorted(markers - {"parametrize", "skipif", "skip", "xfail"})
    ]
    (tree / "pytest.ini").write_text("\n".join(["[pytest]", "markers =", *lines, ""]))
    return tree


def run(tree: Path, model: str, pytest_arguments: list[str]) -> list[dict]:
    """Runs the testers of one model: one entry a test, as outcomes.py writes them."""
    results = BUILD / f"outcomes_{model}.json"
    results.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "CONFORMANCE_OUTCOMES": str(results),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_TINY_MODEL_PATH": str(tree / "tiny_models"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", "pytest.ini", "-p", "outcomes", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--disable-warnings", f"tests/models/{model}", *pytest_arguments]
    start = time.monotonic()
    print(f"\n== {model}", flush=True)
    subprocess.run(command, cwd=tree, env=environment)
    if not results.exists():
        raise SystemExit(f"pytest did not get to the end of tests/models/{model}")
    print(f"{model}: {time.monotonic() - start:.0f} s")
    return json.loads(results.read_text(encoding="utf-8"))


def make_table(results: list[dict]) -> str:
    """passed / failed / skipped for each mixin (rows) and model (columns)."""
    counts = Counter((result["mixin"], COLUMNS[result["class"]], result["outcome"]) for result in results)
    columns = [column for column in dict.fromkeys(COLUMNS.values()) if any(key[1] == column for key in counts)]
    mixins = list(dict.fromkeys(result["mixin"] for result in results))
    rows = []
    for mixin in [*mixins, None]:
        cells = []
        for column in columns:
            cell = [
                sum(n for (m, c, o), n in counts.items() if mixin in (m, None) and (c, o) == (column, outcome))
                for outcome in ("passed", "failed", "skipped")
            ]
            cells.append(" / ".join(map(str, cell)) if any(cell) else "-")
        rows.append([mixin or "all", *cells])
    lines = [["passed / failed / skipped", *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def explain_skips(results: list[dict]) -> tuple[str, list[str]]:
    """Our skips grouped by the written reason, and those that have none."""
    groups, unexplained = Counter(), []
    for result in results:
        column = COLUMNS[result["class"]]
        if column not in OUR_COLUMNS:
            continue
        skipped = result["outcome"] == "skipped"
        for message in [result["reason"]] if skipped else result["skipped_parts"]:
            line = f"{result['test']}: {message}"
            reason = next((reason for reason, pattern in REASONS.items() if re.search(pattern, line)), None)
            if reason is None:
                unexplained.append(f"{result['class']}::{line}")
            groups[reason, column] += skipped
    lines = [["skipped because", *OUR_COLUMNS], ["---"] * (1 + len(OUR_COLUMNS))]
    for reason in REASONS:
        numbers = [groups[reason, column] for column in OUR_COLUMNS]
        if any(numbers):
            lines.append([reason, *map(str, numbers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines), unexplained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="run two models of the library as well")
    parser.add_argument("pytest_arguments", nargs="*", help="after `--`: arguments of pytest")
    arguments = parser.parse_args()

    version = importlib.metadata.version("transformers")
    BUILD.mkdir(parents=True, exist_ok=True)
    tree = unpack(version)
    models = [*OUR_MODELS, "git", "blip_2"] if arguments.compare else OUR_MODELS
    results = [result for model in models for result in run(tree, model, arguments.pytest_arguments)]

    table = make_table(results)
    skips, unexplained = explain_skips(results)
    report = f"transformers {version}\n\n{table}\n\n{skips}\n"
    (BUILD / "report.md").write_text(report, encoding="utf-8")
    print(f"\n{report}")
    ours = [result for result in results if COLUMNS[result["class"]] in OUR_COLUMNS]
    if arguments.compare:
        theirs = {(r["mixin"], r["test"]) for r in results if r not in ours and r["outcome"] == "skipped"}
        alone = sorted(
            {r["test"] for r in ours if r["outcome"] == "skipped" and (r["mixin"], r["test"]) not in theirs}
        )
        print(f"Skipped by Prismer alone: {', '.join(alone) or 'none'}")
    for skip in unexplained:
        print(f"skips.py has no reason for {skip}")
    failed = [result for result in ours if result["outcome"] == "failed"]
    for result in failed:
        print(f"failed: {result['class']}::{result['test']}")
    return 1 if failed or unexplained or not ours else 0


if __name__ == "__main__":
    sys.exit(main())
