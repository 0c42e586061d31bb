"""Which keys are known, and in which row: by hashes, so that many millions of keys fit in memory."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np


def as_text(name: str) -> str:
    """
    A name that can be stored. Names on a disk, in a tar or in JSON may contain bytes that are not text: they become
    `\\xff`.
    """
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        pass
    try:
        raw = name.encode(errors="surrogateescape")  # bytes, as Python reads them from a disk
    except UnicodeEncodeError:
        raw = name.encode(errors="surrogatepass")
    return raw.decode(errors="backslashreplace")


def key_digests(keys: Iterable[str]) -> np.ndarray:
    """
    128-bit hashes of keys, by which they are compared.

    Args:
        keys (`Iterable[str]`): any number.

    Returns:
        `np.ndarray` of shape `(keys,)`, of 16-byte strings.
    """
    # "S16" drops zeros at the end, alike for all: equal hashes stay equal, different ones different
    return np.array([blake2b(as_text(key).encode(), digest_size=16).digest() for key in keys], dtype="S16")


class KeyIndex:
    """
    Finds the rows of keys. It takes 24 bytes a key.

    Args:
        digests (`np.ndarray` of shape `(rows,)`): from [`key_digests`]; of equal ones the first row counts.
    """

    def __init__(self, digests: np.ndarray):
        self._digests, self._rows = np.unique(digests, return_index=True)

    def __len__(self) -> int:
        return len(self._digests)

    def rows(self) -> np.ndarray:
        """The rows that count, in their order: (different keys,) int64."""
        return np.sort(self._rows)

    def find(self, keys: Iterable[str]) -> np.ndarray:
        """
        Args:
            keys (`Iterable[str]`): any number.

        Returns:
            `np.ndarray` of shape `(keys,)`, int64: the row of each key, -1 where it is not known.
        """
        digests = key_digests(keys)
        if not len(self):
            return np.full(len(digests), -1)
        places = np.minimum(np.searchsorted(self._digests, digests), len(self) - 1)
        return np.where(self._digests[places] == digests, self._rows[places], -1)
