"""Finds the rows of keys by hashes, so that many millions of keys fit in memory."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np


def as_text(name: str) -> str:
    """
    Makes a name storable. Names on a disk, in a tar or in JSON may contain bytes that are not text; they become
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
    The 128-bit hashes of keys.

    Args:
        keys (`Iterable[str]`): any number of keys.

    Returns:
        `np.ndarray` of shape `(keys,)`: strings of 16 bytes.
    """
    # "S16" drops zeros at the end; equal hashes stay equal and different ones stay different
    return np.array([blake2b(as_text(key).encode(), digest_size=16).digest() for key in keys], dtype="S16")


class KeyIndex:
    """
    Finds the rows of keys. Takes 24 bytes per key.

    Args:
        digests (`np.ndarray` of shape `(rows,)`): from [`key_digests`]. If several are equal, the first row counts.
    """

    def __init__(self, digests: np.ndarray):
        self._digests, self._rows = np.unique(digests, return_index=True)

    def __len__(self) -> int:
        return len(self._digests)

    def rows(self) -> np.ndarray:
        """The first row of each different key, ascending: (different keys,) int64."""
        return np.sort(self._rows)

    def find(self, keys: Iterable[str]) -> np.ndarray:
        """
        Finds keys.

        Args:
            keys (`Iterable[str]`): any number of keys.

        Returns:
            `np.ndarray` of shape `(keys,)`, int64: the row of each key, -1 if it is unknown.
        """
        digests = key_digests(keys)
        if not len(self):
            return np.full(len(digests), -1)
        places = np.minimum(np.searchsorted(self._digests, digests), len(self) - 1)
        return np.where(self._digests[places] == digests, self._rows[places], -1)
