"""Collects the faulty rows of a data set and reports them together."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath


logger = logging.getLogger(__name__)

SHOWN = 10  # rows that a report lists; it only counts the others


class BadRecord(Exception):
    """A record cannot be used, for the reason in the message."""


class MissingFile(BadRecord):
    """The image file of a record is missing or empty."""


@dataclass
class Faults:
    """
    The faults of one data set.

    Args:
        source (`str`): Name of the data set in the report.
        total (`int`): Number of rows checked.
    """

    source: str
    total: int
    lines: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    only_files_are_missing: bool = True

    def add(self, where: str, problem: BadRecord) -> None:
        self.lines.append(f"{where}: {problem}")
        self.only_files_are_missing &= isinstance(problem, MissingFile)

    def __str__(self) -> str:
        more = [f"… and {len(self.lines) - SHOWN} more"] if len(self.lines) > SHOWN else []
        report = [f"{self.source}: {len(self.lines)} of {self.total} rows cannot be used", *self.lines[:SHOWN], *more]
        # a file name can have bytes that are not UTF-8
        return "\n  ".join(report + self.hints).encode(errors="backslashreplace").decode()

    def report(self, skip: bool) -> None:
        """Reports the faults, if there are any: as a warning if `skip`, otherwise as an error."""
        if not self.lines:
            return
        if skip:
            logger.warning("%s\n  These rows are left out.", self)
            return
        error = FileNotFoundError if self.only_files_are_missing else ValueError
        raise error(f"{self}\n  Mend these rows, or leave them out: bad_rows='skip' (--bad_rows skip)")


def place_of_record(file: str | None, number: int | None, source: str) -> str:
    """The name of a record in a report: `captions.csv, row 7`."""
    name = file or PurePath(source).name
    return name if number is None else f"{name}, row {number}"


def checked(text: str, what: str) -> str:
    """
    Raises:
        BadRecord: The text cannot be encoded as UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if "\udc80" <= text[error.start] <= "\udcff":
            remedy = "save the file as UTF-8, for example by `iconv -f latin1 -t utf-8`"
            raise BadRecord(f"the {what} {text[:40]!r} is not in UTF-8; {remedy}") from None
        raise BadRecord(f"the {what} {text[:40]!r} has half a character (a lone surrogate)") from None
    return text


def raise_together(problems: Sequence[Exception]) -> None:
    """Raises the errors of several data sets as one error."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        kind = FileNotFoundError if all(isinstance(one, FileNotFoundError) for one in problems) else ValueError
        raise kind("\n".join(map(str, problems)))
