"""What the page remembers of each visitor, in memory alone, until they leave."""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import edits
from PIL import Image
from reader import Encoding, Reader


MODES = ("seen", "off", "noise", "edited")
MAX_TURNS = 40


@dataclass
class Session:
    """A picture, what its experts saw, what the visitor made of that, and what was asked."""

    picture: Image.Image | None = None
    source: str | None = None  # the name of an example
    seen: dict[str, Any] = field(default_factory=dict)
    modes: dict[str, str] = field(default_factory=dict)
    edits: dict[str, dict] = field(default_factory=dict)
    turns: list[tuple[str, str | None, str]] = field(default_factory=list)  # task, question, answer
    notes: dict[str, tuple[str, bool]] = field(default_factory=dict)  # how long each expert took, whether it failed
    encodings: OrderedDict = field(default_factory=OrderedDict)
    used: float = field(default_factory=time.monotonic)
    stopped: bool = False  # the visitor has pressed Stop
    forgotten: bool = False

    def take(self, picture: Image.Image | None, source: str | None = None) -> None:
        """A new picture: everything about the one before is forgotten."""
        self.__init__(picture=picture, source=source)  # type: ignore[misc]

    @property
    def changed(self) -> bool:
        return any(mode != "seen" for mode in self.modes.values())

    def set_mode(self, name: str, mode: str) -> None:
        if mode not in MODES or name not in self.seen or (mode == "edited" and name not in self.edits):
            raise ValueError(f"{name} cannot be {mode!r}")
        self.modes[name] = mode

    def label(self, name: str, reader: Reader) -> Any:
        """The label of an expert as the visitor wants it; `None` if it is off, or failed."""
        mode, label = self.modes.get(name, "seen"), self.seen.get(name)
        description, size = reader.descriptions[name], self.picture.size
        if mode == "noise":
            return edits.noise(description, size, reader.encode_words)
        if mode == "edited":
            return edits.apply_edit(label, self.edits[name], description, size, reader.encode_words)
        return label if mode == "seen" else None

    def encoding(self, version: str, reader: Reader) -> Encoding:
        """
        Encoded once for each version: `"seen"` (what the experts saw), `"yours"` (as the visitor changed it) or
        `"none"` (the picture alone).
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
            self.encodings[key] = reader.encode(self.picture, labels)
            while len(self.encodings) > 6:
                self.encodings.popitem(last=False)
        self.encodings.move_to_end(key)
        return self.encodings[key]


class Sessions:
    """
    Sessions by the browser's key. One that rests longer than `idle` seconds is forgotten, and of more than `most` the
    one that has rested longest.
    """

    def __init__(self, idle: float = 1800, most: int = 200, clock: Callable[[], float] = time.monotonic):
        self.idle, self.most, self.clock = idle, most, clock
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = RLock()

    def __len__(self) -> int:
        return len(self._sessions)

    def __getitem__(self, key: str) -> Session:
        with self._lock:
            self.sweep()
            session = self._sessions.setdefault(key, Session())
            session.used = self.clock()
            self._sessions.move_to_end(key)
            while len(self._sessions) > self.most:
                self._sessions.popitem(last=False)
            return session

    def forget(self, key: str) -> None:
        with self._lock:
            session = self._sessions.pop(key, None)
            if session is not None:
                session.forgotten = True

    def sweep(self) -> None:
        with self._lock:
            for key in [key for key, session in self._sessions.items() if self.clock() - session.used > self.idle]:
                del self._sessions[key]


def check_modes(modes: Any, names: Mapping[str, Any]) -> dict[str, str]:
    """Those of the modes that are known experts and known modes."""
    modes = modes if isinstance(modes, Mapping) else {}
    return {name: mode for name, mode in modes.items() if name in names and mode in MODES}
