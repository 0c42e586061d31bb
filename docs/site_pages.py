"""
A hook of mkdocs that adds pages which docs/ does not have as Markdown: files from elsewhere in the repository, the
notebook of examples and the options of the command line. It also copies the package as it is installed, for
mkdocstrings to read, and makes links work on GitHub as well as on the site.
"""

import base64
import json
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
    page, images = notebook("examples")
    files.append(File.generated(config, "examples.md", content=page))
    for name, content in images.items():
        files.append(File.generated(config, name, content=content))
    return files


def notebook(name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs as Markdown, and its images by their names."""
    images = {}
    parts = []
    for cell in json.loads((ROOT / "docs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", [])})
            kind = next((kind for kind in data if kind.startswith("image/")), None)
            if kind is None:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
                continue
            image = f"images/{name}_{len(images) + 1}.{kind.removeprefix('image/')}"
            images[image] = base64.b64decode("".join(data[kind]))
            parts.append(f"![Output]({image})")
    parts.insert(1, f"You can [download this page as a notebook]({name}.ipynb).")
    return "\n\n".join(parts), images


# typer's command line, for a package whose `__init__` is left out: it would import torch
_TYPER = """
import sys, types
package = types.ModuleType("modeling_prismer")
package.__path__ = [sys.argv.pop(1)]
sys.modules["modeling_prismer"] = package
from typer.cli import main
main()
"""


def command_line() -> str:
    """What `prismer --help` and the help of its commands say, as a page."""
    command = [sys.executable, "-c", _TYPER, str(ROOT / "modeling_prismer"), "modeling_prismer.cli", "utils", "docs"]
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
