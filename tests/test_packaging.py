"""The wheel and the sdist install the complete package `modeling_prismer` and nothing else."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parent.parent
# folder of the repository: folder in the wheel
FOLDERS = {
    "modeling_prismer": "modeling_prismer",
    "processing": "modeling_prismer/processing",
    "conversion": "modeling_prismer/conversion",
}
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel): the sdist built from a copy of the source, the wheel from the sdist."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=NOT_SHIPPED)
    for path in REPOSITORY.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    output = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source)
    (sdist,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean_bin(built, tmp_path_factory):
    """The commands of an environment with the wheel, the libraries of this environment, and no editable install."""
    folder = tmp_path_factory.mktemp("clean") / "env"
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1])
    site_packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # a folder in a .pth file comes after site-packages, and its own .pth files are not read
    libraries = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site_packages / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return scripts


@pytest.fixture
def folder_with_foreign_processing(tmp_path):
    (tmp_path / "processing").mkdir()
    (tmp_path / "processing" / "__init__.py").write_text("raise RuntimeError('the foreign processing was imported')\n")
    return tmp_path


def run(*command, cwd=None):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    finished = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def shipped_files():
    """Every file of the three folders, by its name in the wheel."""
    for folder, place in FOLDERS.items():
        for directory, _, names in os.walk(REPOSITORY / folder):
            relative = Path(directory).relative_to(REPOSITORY / folder)
            if "__pycache__" in relative.parts:
                continue
            yield from ((place / relative / name).as_posix() for name in names if not name.startswith("."))


def test_wheel_and_sdist_have_one_top_level_name(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
        (metadata,) = (name for name in top if name.endswith(".dist-info"))
        assert top - {metadata} == {"modeling_prismer"}
        assert f"{metadata}/licenses/LICENSE" in archive.namelist()
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.cfg", "pyproject.toml", "LICENSE"} <= names
    assert not any(name.startswith("tests/") for name in names)


def test_wheel_has_every_file_of_the_three_folders(built):
    expected = set(shipped_files())
    assert {"modeling_prismer/__init__.py", "modeling_prismer/processing/experts/__init__.py"} <= expected
    assert "modeling_prismer/py.typed" in expected
    with zipfile.ZipFile(built[1]) as archive:
        assert expected - set(archive.namelist()) == set()


def test_public_names_import_next_to_a_foreign_processing(clean_bin, folder_with_foreign_processing):
    script = """
import importlib, pathlib, pkgutil, sys

import modeling_prismer, modeling_prismer.processing, modeling_prismer.processing.experts, modeling_prismer.conversion

prefix = pathlib.Path(sys.prefix).resolve()
assert modeling_prismer.__all__
for name in modeling_prismer.__all__:
    getattr(modeling_prismer, name)
for module in pkgutil.walk_packages(modeling_prismer.__path__, "modeling_prismer."):
    try:
        file = pathlib.Path(importlib.import_module(module.name).__file__).resolve()
    except ModuleNotFoundError as error:
        assert error.name == "lmms_eval", error  # the extra `eval` is not part of `dev`
        continue
    assert prefix in file.parents, f"{module.name} came from {file}"
assert "processing" not in sys.modules
try:
    import processing
except RuntimeError:
    print("all imported")
"""
    output = run(clean_bin / "python", "-c", script, cwd=folder_with_foreign_processing)
    assert output.strip().endswith("all imported")


def test_command_runs_next_to_a_foreign_processing(clean_bin, folder_with_foreign_processing):
    output = run(clean_bin / "prismer", "--help", cwd=folder_with_foreign_processing)
    for command in ("ask", "experts", "convert"):
        assert command in output
