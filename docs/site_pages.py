"""
What the site has besides docs/ (a hook of mkdocs): pages made of Markdown that lies elsewhere in the repository, the
options of the command line, links that work on GitHub as well as here, and the package in the shape in which it is
installed, for mkdocstrings to read.
"""

import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"modeling_prismer": "", "processing": "processing", "conversion": "conversion"}  # place in the package
PAGES = {  # a file of the repository: its page
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "modeling_prismer/checkpoints/prismer-scenes/README.md": "prismer-scenes.md",
    "modeling_prismer/checkpoints/prismer-easy-vqa/README.md": "prismer-easy-vqa.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(((?!\w+:|#)[^)#\s]+)((?:#[^)]*)?)\)")


@event_priority(100)  # before mkdocstrings looks for the package
def on_config(config):
    package = ROOT / "build" / "docs_source" / "modeling_prismer"
    shutil.rmtree(package, ignore_errors=True)
    for source, place in FOLDERS.items():
        for path in (ROOT / source).rglob("*.py"):
            copy = package / place / path.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        config.watch.append(str(ROOT / source))
    return config


def on_files(files, config):
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "api/command_line.md", content=command_line()))
    return files


def command_line() -> str:
    """What `prismer --help` and the help of its commands say, as a page."""
    # the file, not the module: without torch, which the package would import
    command = [sys.executable, "-m", "typer", str(ROOT / "modeling_prismer" / "cli.py"), "utils", "docs"]
    command += ["--name", "prismer", "--title", "Command line"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def on_page_markdown(markdown, page, config, files):
    """Links between files of the repository become links between pages; one to a file that is no page becomes text."""
    pages = {page: source for source, page in PAGES.items()}
    source = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def relink(match):
        image, text, target, anchor = match.groups()
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (ROOT / place).exists():
            return match[0]  # mkdocs reports it
        uri = PAGES.get(place, place.removeprefix("docs/"))
        if place not in PAGES and not (place.startswith("docs/") and files.get_file_from_path(uri)):
            return text
        return f"{image}[{text}]({posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)  # code stays as it is
    return "".join(part if part.startswith("```") else LINK.sub(relink, part) for part in parts)
