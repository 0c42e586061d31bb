"""
Links that contain a session: image, questions, switches and edits. All of it is after the `#`, which browsers do not
send when they open a page, so the server stores nothing.
"""

import base64
import io
import json
import zlib
from typing import Any

import edits
from checks import Refused, as_text, is_too_deep, parse_json
from images import from_base64
from PIL import Image
from reader import MAX_LETTERS, Reader
from sessions import Session, check_modes


LONG_SIDE = 384  # pixels of the image in a link
MAX_LINK = 200_000  # letters
MAX_QUESTIONS = 8


def to_link(session: Session) -> str:
    """Returns the part of the link after the `#`."""
    content: dict[str, Any] = {"v": 1}
    if session.source is not None:
        content["example"] = session.source
    else:
        image = session.image.copy()
        image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, "WEBP", quality=85, method=6)
        content["image"] = base64.b64encode(file.getvalue()).decode()
    content["questions"] = [text for text, _ in session.turns if text is not None][-MAX_QUESTIONS:]
    content["modes"] = {name: mode for name, mode in session.modes.items() if mode != "seen"}
    content["edits"] = {name: session.edits[name] for name, mode in session.modes.items() if mode == "edited"}
    packed = zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def from_link(link: str, reader: Reader) -> dict[str, Any]:
    """
    Returns `{"image": PIL image or None, "example": name or None, "questions": …, "modes": …, "edits": …}`, checked.

    Raises:
        Refused: if the link is damaged.
    """
    if len(link) > MAX_LINK:
        raise Refused("This link is too long; the Space makes no such links.")
    try:
        packed = base64.urlsafe_b64decode(link + "=" * (-len(link) % 4))
        content = parse_json(zlib.decompressobj().decompress(packed, 4 * MAX_LINK))
    except (ValueError, zlib.error):
        content = None
    if not isinstance(content, dict) or is_too_deep(content):
        raise Refused("This link is damaged, so the session in it cannot be restored.")
    kinds = {"questions": list, "modes": dict, "edits": dict}
    wrong = next((key for key, kind in kinds.items() if not isinstance(content.get(key), kind)), None)
    if wrong is not None:
        raise Refused(f"This link is damaged: its {wrong} cannot be read.")
    questions = [as_text(each, "question in this link", MAX_LETTERS) for each in content["questions"]]
    found = {name: edit for name, edit in content["edits"].items() if name in reader.specs}
    found = {name: edits.check_edit(edit, reader.specs[name]) for name, edit in found.items()}
    modes = check_modes(content["modes"], reader.specs)
    modes = {name: mode for name, mode in modes.items() if mode != "edited" or name in found}
    example = content.get("example")
    if example is not None:
        as_text(example, "example in this link", MAX_LETTERS)
    image = None if example is not None else from_base64(content.get("image"))
    return {
        "image": image,
        "example": example,
        "questions": questions[:MAX_QUESTIONS],
        "modes": modes,
        "edits": found,
    }
