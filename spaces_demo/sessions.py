"""Sessions: the page keeps each visitor's image, labels, edits and questions in memory until they leave."""

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import edits
import numpy as np
import torch
from checks import Refused
from lm_reader import Look
from PIL import Image
from reader import Encoding, Reader


MODES = ("seen", "off", "noise", "edited")
MAX_TURNS = 40
MAX_SESSIONS = 200
MAX_SESSION_BYTES = 1024**3  # of all sessions together


@dataclass
class Session:
    """An image, the labels of its experts, the visitor's changes to them, and the questions with their answers."""

    image: Image.Image | None = None
    source: str | None = None  # the name of an example
    upload: str | None = None  # the file that the page shows
    seen: dict[str, Any] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    edits: dict[str, dict] = field(default_factory=dict)
    made: dict[str, tuple[dict, Any]] = field(default_factory=dict)  # each edit with the label that it made
    turns: list[tuple[str | None, str]] = field(default_factory=list)  # question, or None for a caption; answer
    notes: dict[str, tuple[str, bool]] = field(default_factory=dict)  # time of each expert, and whether it failed
    encodings: OrderedDict = field(default_factory=OrderedDict)
    used: float = field(default_factory=time.monotonic)
    shown_size: tuple[int, int] | None = None  # width and height of the image on the page, which may be larger
    other: str | None = None  # the name of a checkpoint to compare with
    compared: dict[str, "Session"] = field(default_factory=dict)  # what that checkpoint's experts found
    stopped: bool = False  # the visitor pressed Stop
    forgotten: bool = False

    def take(self, image: Image.Image | None, source: str | None = None, upload: str | None = None) -> None:
        """Starts again with a new image. Everything about the previous one is forgotten."""
        self.__init__(image=image, source=source, upload=upload, other=self.other)  # type: ignore[misc]

    @property
    def nbytes(self) -> int:
        return size_of(vars(self))

    @property
    def changed(self) -> bool:
        return any(mode != "seen" for mode in self.modes.values())

    def set_mode(self, name: str, mode: str) -> None:
        if mode not in MODES or name not in self.seen or (mode == "edited" and name not in self.edits):
            accepted = [each for each in MODES if each != "edited" or name in self.edits]
            raise Refused(f"{name}: this must be one of {', '.join(accepted)}.")
        self.modes[name] = mode

    def label(self, name: str, reader: Reader) -> Any:
        """Returns an expert's label with the visitor's changes, or `None` if the expert is off or failed."""
        mode, label = self.modes.get(name, "seen"), self.seen.get(name)
        spec, size = reader.specs[name], self.image.size
        if mode == "noise":
            return edits.noise(spec, size, reader.encode_words)
        if mode == "edited":
            edit, made = self.edits[name], self.made.get(name)
            if made is None or made[0] is not edit:  # large edits take seconds; each card and answer needs the label
                made = (edit, edits.apply_edit(label, edit, spec, size, reader.encode_words))
                self.made[name] = made
            return made[1]
        return label if mode == "seen" else None

    def encoding(self, version: str, reader: Reader) -> Encoding:
        """
        Encodes the image once for each version of the labels: `"seen"` (the experts' output), `"yours"` (with the
        visitor's changes) or `"none"` (no experts).
        """
        modes = {name: self.modes.get(name, "seen") for name in self.seen}
        modes = {name: {"seen": "seen", "none": "off"}.get(version, mode) for name, mode in modes.items()}
        key = str(
            sorted((name, mode, self.edits.get(name) if mode == "edited" else 0) for name, mode in modes.items())
        )
        if key not in self.encodings:
            labels = {name: None if mode == "off" else self.seen[name] for name, mode in modes.items()}
            if version == "yours":
                labels = {name: self.label(name, reader) for name in modes}
            self.encodings[key] = reader.encode(self.image, labels)
            while len(self.encodings) > 6:
                self.encodings.popitem(last=False)
        self.encodings.move_to_end(key)
        return self.encodings[key]


class Sessions:
    """
    Sessions by the browser's key. A session is forgotten if it is not used for `idle` seconds. If there are more than
    `most` sessions, or if they need more than `most_bytes`, the least recently used ones are forgotten.
    """

    def __init__(
        self,
        idle: float = 1800,
        most: int = MAX_SESSIONS,
        clock: Callable[[], float] = time.monotonic,
        most_bytes: int = MAX_SESSION_BYTES,
    ):
        self.idle, self.most, self.clock, self.most_bytes = idle, most, clock, most_bytes
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._sessions)

    def __getitem__(self, key: str) -> Session:
        with self._lock:
            self.sweep()
            session = self._sessions.setdefault(key, Session())
            session.used = self.clock()
            self._sessions.move_to_end(key)
            self.weigh(key)
            return session

    def weigh(self, key: str) -> None:
        """Measures a session, which may have grown, and forgets others if there are too many or too large ones."""
        with self._lock:
            if key in self._sessions:
                self._sizes[key] = self._sessions[key].nbytes
            while len(self._sessions) > self.most or (
                len(self._sessions) > 1 and sum(self._sizes.values()) > self.most_bytes
            ):
                self._drop(next(iter(self._sessions)))

    def uploads(self) -> set[str]:
        """Returns the files that the pages of all visitors show."""
        with self._lock:
            return {session.upload for session in self._sessions.values() if session.upload}

    def forget(self, key: str) -> None:
        with self._lock:
            if key in self._sessions:
                self._drop(key).forgotten = True

    def sweep(self) -> None:
        with self._lock:
            for key in [key for key, session in self._sessions.items() if self.clock() - session.used > self.idle]:
                self._drop(key)

    def _drop(self, key: str) -> Session:
        self._sizes.pop(key, None)
        return self._sessions.pop(key)


def size_of(value: Any) -> int:
    """Returns the bytes of a value: exact for images, arrays and tensors, and estimated for lists and objects."""
    if isinstance(value, Image.Image):
        return value.width * value.height * len(value.getbands())
    if isinstance(value, np.ndarray | torch.Tensor):
        return int(value.nbytes)
    if isinstance(value, Encoding | Session | Look):
        return size_of(vars(value))
    if isinstance(value, Mapping):
        return 64 + sum(64 + size_of(each) for each in list(value.values()))
    if isinstance(value, list | tuple):
        return 64 + sum(8 + size_of(each) for each in value)
    return sys.getsizeof(value)


def check_modes(modes: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """Returns the entries of `modes` with known experts and known modes."""
    modes = modes if isinstance(modes, Mapping) else {}
    return {name: mode for name, mode in modes.items() if name in names and mode in MODES}
