"""Every public name is on a page of the API reference, with a docstring and an example that runs."""

import ast
import copy
import doctest
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from transformers.testing_utils import HfDocTestParser

import modeling_prismer
from modeling_prismer.processing import PrismerImageProcessorTorchvision
from modeling_prismer.processing.labels import LabelEngine


REPOSITORY = Path(__file__).resolve().parent.parent
API = REPOSITORY / "docs" / "api"
ON_API_PAGES = [path for page in sorted(API.glob("*.md")) for path in re.findall(r"(?m)^::: (\S+)$", page.read_text())]
PACKAGES = [f"modeling_prismer{name}" for name in ("", ".processing", ".processing.experts", ".processing.labels")]
PACKAGES.append("modeling_prismer.conversion")
# examples that continue in the folder of another example
FOLLOWING = {"modeling_prismer.conversion.export_onnx.export_onnx": "modeling_prismer.conversion.OnnxPrismer"}


def public_objects(package: str) -> dict:
    module = importlib.import_module(package)
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    objects = {f"{package}.{name}": getattr(module, name) for name in names}
    return {path: value for path, value in objects.items() if not inspect.ismodule(value)}


def look_up(path: str):
    package, _, name = path.rpartition(".")
    return getattr(importlib.import_module(package), name)


def is_constant(value) -> bool:
    return not (inspect.isclass(value) or inspect.isfunction(value))


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_on_one_api_page(package):
    documented = [look_up(path) for path in ON_API_PAGES]
    for path, value in public_objects(package).items():
        times = ON_API_PAGES.count(path) if is_constant(value) else sum(value is other for other in documented)
        assert times == 1, f"{path} is {times} times on the pages of docs/api"


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The names that the first lines of the reference define: `path`, `processor`, `model` and `image`."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "modeling_prismer").symlink_to(REPOSITORY / "modeling_prismer")
    (block,) = re.findall(r"```python\n(.*?)```", (API / "index.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(block, names)
        names["image"].load()
    return names


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder with the shipped images. Names that an example registers are removed again."""
    (tmp_path / "modeling_prismer").symlink_to(REPOSITORY / "modeling_prismer")
    monkeypatch.chdir(tmp_path)
    for cls in (*vars(modeling_prismer).values(), PrismerImageProcessorTorchvision):
        if hasattr(cls, "_auto_class"):
            monkeypatch.setattr(cls, "_auto_class", cls._auto_class)
    with mock.patch.dict(modeling_prismer.TASKS), mock.patch.dict(LabelEngine.registry):
        yield


def run_examples(path: str, given: dict) -> None:
    documented = look_up(path)
    # an inherited docstring is not enough
    assert vars(documented).get("__doc__") or inspect.isfunction(documented) and documented.__doc__, path
    tests = doctest.DocTestFinder(parser=HfDocTestParser(), exclude_empty=True).find(documented, path, globs=given)
    tests = [test for test in tests if test.examples]
    assert tests, f"{path} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        test.globs["model"] = copy.deepcopy(given["model"])  # some examples change it
        report: list[str] = []
        assert runner.run(test, out=report.append).failed == 0, "".join(report)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "path", [path for path in ON_API_PAGES if not is_constant(look_up(path)) and path not in FOLLOWING.values()]
)
def test_docstring_has_an_example_that_runs(path, given, folder):
    if path.endswith("export_onnx"):
        pytest.importorskip("onnxscript")
    run_examples(path, given)
    if path in FOLLOWING:
        run_examples(FOLLOWING[path], given)


def messages_of_the_sources() -> list[str]:
    """All strings of the packages and the recipes, with `…` in place of inserted values."""

    def text_of(node) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""

    folders = ("modeling_prismer", "processing", "conversion", "training_examples")
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    return [re.sub("…+", "…", text) for node in nodes if (text := text_of(node))]


def test_troubleshooting_quotes_real_messages():
    page = (API.parent / "troubleshooting.md").read_text()
    symptoms = re.findall(r"(?m)^\| ([^|]+) \| [^|]+ \| [^|]+ \|$", page)
    quoted = [message for symptom in symptoms for message in re.findall("`([^`]+)`", symptom) if " " in message]
    messages = messages_of_the_sources()
    assert len(quoted) >= 40
    assert [quote for quote in quoted if not any(quote.rstrip(" …") in message for message in messages)] == []


def test_memory_page_shows_the_figures_of_its_code(capsys):
    page = (API.parent / "memory.md").read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    counted = capsys.readouterr().out.splitlines()
    assert len(counted) == 24
    assert [row for row in counted if row not in page.splitlines()] == []


def test_search_works_in_pages_opened_as_files(tmp_path):
    """Builds one page with the settings of the site."""
    pytest.importorskip("material", reason="mkdocs-material comes with the extra `docs`")
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or pytest.skip("no chromium is installed")
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    settings["plugins"] = [plugin for plugin in settings["plugins"] if isinstance(plugin, str)]
    for name in ("hooks", "nav", "docs_dir", "site_dir"):
        del settings[name]
    shutil.copytree(REPOSITORY / "docs" / "javascripts", tmp_path / "docs" / "javascripts")
    (tmp_path / "docs" / "index.md").write_text("# Experts\n\nA resampler reads their maps.\n")
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", str(tmp_path / "mkdocs.yml")]
    subprocess.run(command, check=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        fetched: list[str] = []
        page.on("request", lambda request: fetched.append(request.url))
        page.goto((tmp_path / "site" / "index.html").as_uri())
        page.locator(".md-search__input").click()
        page.locator(".md-search__input").press_sequentially("resampler")
        page.locator(".md-search-result__item").first.wait_for()
        browser.close()
    assert [url for url in fetched if not url.startswith("file:")] == []
