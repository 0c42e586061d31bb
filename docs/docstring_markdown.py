"""
From docstrings as transformers writes them to Markdown, as an extension of griffe, which reads the sources for
mkdocstrings: ``Args:`` and its like become definition lists, and ``[`Name`]`` a link to where an API page has it.
"""

import re
import textwrap
from pathlib import Path

import griffe


API_PAGES = Path(__file__).resolve().parent / "api"
LISTED = {"Args": "Arguments", "Arguments": "Arguments", "Attributes": "Attributes", "Raises": "Raises"}
PLAIN = {"Returns": "Returns", "Yields": "Yields", "Example": "Example", "Examples": "Examples"}
SECTION = re.compile(rf"({'|'.join([*LISTED, *PLAIN])}):")
ENTRY = re.compile(r"(?P<names>[^(:]+?)(?: \((?P<type>.*?)\))?(?::(?: (?P<text>.*))?)?")
CROSS_REFERENCE = re.compile(r"\[`~?(?P<name>[\w.]+)`\](?![(\[])")


def public_names() -> dict[str, str]:
    """From the name of everything that an API page has to its full path: ``::: modeling_prismer.PrismerConfig``."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(API_PAGES.glob("*.md")))
    return {path.rpartition(".")[2]: path for path in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)}


def to_markdown(docstring: str, paths: dict[str, str]) -> str:
    """
    Args:
        docstring: as transformers writes them, without indentation.
        paths: what [`public_names`] gives; a cross-reference to another name becomes code.
    """

    def link(match: re.Match) -> str:
        name, _, member = match["name"].partition(".")
        path = ".".join(filter(None, (paths.get(name), member)))
        return f"[`{match['name']}`][{path}]" if name in paths else f"`{match['name']}`"

    lines = CROSS_REFERENCE.sub(link, docstring).splitlines()
    markdown: list[str] = []
    while lines:
        line = lines.pop(0)
        section = SECTION.fullmatch(line)
        if section is None:
            markdown.append(line)
            continue
        body: list[str] = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0))
        body = textwrap.dedent("\n".join(body)).splitlines()
        title = section[1]
        markdown += ["", f"**{(LISTED | PLAIN)[title]}**", ""]
        markdown += _definitions(body, code=title == "Raises") if title in LISTED else body
        markdown.append("")
    # an interactive session is another language to the highlighter
    return re.sub(r"```python(?=\n>>>)", "```pycon", "\n".join(markdown))


def _definitions(lines: list[str], code: bool) -> list[str]:
    """Entries such as ``name (`str`, *optional*): what it is``, with deeper lines that go on, as a definition list."""
    entries: list[list[str]] = []
    for line in lines:
        if line.startswith(" ") or not line:
            entries[-1].append(line)
        elif entries and len(entries[-1]) == 1 and entries[-1][0].endswith(","):
            entries[-1][0] += " " + line  # names on two lines
        else:
            entries.append([line])
    markdown = []
    for first, *rest in entries:
        entry = ENTRY.fullmatch(first)
        identifier = r"[A-Za-z]\w*" if code or re.fullmatch(r"\*{0,2}\w+(, \w+)*", entry["names"]) else r"\b\w+_\w+\b"
        names = re.sub(identifier, r"`\g<0>`", entry["names"])
        text = "\n".join([entry["text"] or "", textwrap.dedent("\n".join(rest))]).strip()
        markdown += [names + (f" ({entry['type']})" if entry["type"] else "")]
        markdown += [":   " + (text.replace("\n", "\n    ") or "\N{NO-BREAK SPACE}"), ""]
    return markdown


class TransformersDocstrings(griffe.Extension):
    """Makes Markdown of every docstring; mkdocstrings is told to take it as it is (`docstring_style: null`)."""

    def __init__(self) -> None:
        self.paths = public_names()

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value, self.paths)
