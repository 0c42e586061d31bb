"""Reads stored labels: by key, as a data set, or as the labels of a training."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...expert_spec import ExpertSpec, read_specs
from ..many_images.key_index import KeyIndex, key_digests
from .encoding import decode_labels
from .manifest import read_manifest
from .shards import naming_the_shard, open_shard, read_columns, read_key_digests, shard_files


class LabelStore(Mapping):
    """
    The labels that [`label_images`] has written into a folder, by the keys of the images.

    Files are mapped into memory. Opening a store reads all keys and takes 24 bytes per image. A look-up reads a group
    of 32 rows. Labels that are written later are not seen. A store can be pickled and used in the workers of a data
    loader.

    Args:
        folder (`str` or `Path`): the store.

    Attributes:
        manifest (`dict`): describes how the labels were made; see [`make_manifest`].
        descriptions (`list[dict]`): the experts' entries as in `PrismerConfig.experts`.

    Raises:
        FileNotFoundError: if the folder is not a label store.
        DamagedShardError: if a shard cannot be read. The message names it, and the command that repairs the store.
        ValueError: if the manifest is damaged.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import LabelStore, label_images

    >>> report = label_images("modeling_prismer/assets", processor.experts, "my_labels", progress=False)
    >>> store = LabelStore("my_labels")
    >>> store["shape.png"]["edge"].shape
    (64, 64)
    >>> inputs = processor(image, "Is it red?", expert_labels=store.labels_for(["shape.png"]))
    ```
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.descriptions: list[dict[str, Any]] = list(self.manifest["descriptions"].values())
        self._specs = read_specs(self.descriptions)
        self._files = shard_files(folder)
        digests = read_key_digests(self._files)
        self._ends = np.cumsum([len(part) for part in digests], dtype=np.int64)
        self._index = KeyIndex(np.concatenate([key_digests([]), *digests]))
        self._make_caches()

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[str]:
        """Yields the keys in the order in which they were written."""
        wanted = self._index.rows()
        for number, end in enumerate(self._ends):
            start = self._ends[number - 1] if number else 0
            rows = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)] - start
            if len(rows):
                yield from read_columns(self._files[number], ["key"])["key"].take(pa.array(rows)).to_pylist()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._index.find([key])[0] >= 0

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.labels_for([key])[0]

    def __repr__(self) -> str:
        names = ", ".join(spec.name for spec in self._specs)
        return f"LabelStore({str(self.folder)!r}): {len(self)} images; {names}"

    def labels_for(self, keys: Iterable[str], experts: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """
        The labels of images, for `expert_labels` of the processor.

        Args:
            keys (`Iterable[str]`): any number of keys, in any order.
            experts (`Iterable[str]`, *optional*): names of experts; by default all.

        Returns:
            `list[dict]`: for each key, a dict from the name of each expert to its label. Maps have the size of the
            image, (H, W), or of `map_size` if it was set:

            - dense: uint8 (H, W), or (H, W, C) for several channels;
            - label: `{"ids": uint8 (H, W)}`, 255 = background. If the ids are instances, with `classes` (`list[int]`).
              If they are words, with `words` (`list[str]`) and `features` (float32 (words, channels));
            - `None` if the label is missing. An image that could not be opened has no labels.

        Raises:
            KeyError: if keys are missing. The message names the first one and their number.
            DamagedShardError: if a label cannot be read.
        """
        keys = list(keys)
        names = None if experts is None else set(experts)
        specs = [spec for spec in self._specs if names is None or spec.name in names]
        rows = self._index.find(keys)
        if len(keys) and rows.min() < 0:
            lacking = [key for key, row in zip(keys, rows) if row < 0]
            raise KeyError(f"the label store {self.folder} has no '{lacking[0]}' ({len(lacking)} of {len(keys)} keys)")
        return [self._labels(int(row), specs) for row in rows]

    @property
    def errors(self) -> dict[str, str]:
        """The errors by key, of images that could not be opened and of experts that failed."""
        errors: dict[str, str] = {}
        for path in self._files:
            table = read_columns(path, ["key", "error"])
            table = table.filter(pc.is_valid(table["error"]))
            errors.update(zip(table["key"].to_pylist(), table["error"].to_pylist()))
        return errors

    def encoded_rows(self) -> Iterator[dict[str, Any]]:
        """
        Yields the rows as they are stored, in the order of [`LabelStore.__iter__`]: `key`, `error`, and the columns of
        [`encode_labels`]. Maps are the bytes of PNG files.

        Raises:
            DamagedShardError: if a shard cannot be read.
        """
        wanted = self._index.rows()
        columns = ["key", "error", *(spec.name for spec in self._specs)]
        start = 0
        for path, end in zip(self._files, self._ends):
            rows = set(wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, end)].tolist())
            with open_shard(path, columns) as file:
                for group in range(file.num_row_groups):
                    with naming_the_shard(path):
                        read = file.read_row_group(group, columns, use_threads=False).to_pylist()
                    yield from (row for number, row in enumerate(read, start) if number in rows)
                    start += len(read)

    # ---- as data sets ----

    def as_dataset(self, **kwargs: Any) -> datasets.Dataset:
        """
        All rows as a `datasets.Dataset` with the columns `key`, `error` and one per expert; see [`label_features`].
        The first call makes an Arrow copy in the cache of `datasets`.

        Args:
            kwargs: arguments of `datasets.Dataset.from_parquet`: `cache_dir`, `num_proc`, `streaming`, …
        """
        return datasets.Dataset.from_parquet([str(path) for path in self._files], **kwargs)

    def attach(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        key_column: str = "key",
        column: str = "expert_labels",
    ) -> datasets.Dataset | datasets.IterableDataset:
        """
        Adds the labels to a data set. Nothing is copied; labels are looked up when a row is read.

        Args:
            dataset (`datasets.Dataset` or `datasets.IterableDataset`): rows with keys of this store.
            key_column (`str`, *optional*, defaults to `"key"`): the column with the keys.
            column (`str`, *optional*, defaults to `"expert_labels"`): the new column, see [`LabelStore.labels_for`].

        Returns:
            The same kind of data set with the new column. The column is absent if you read other columns without the
            keys.

        Raises:
            ValueError: if there is no column `key_column`.
        """
        if dataset.column_names is not None and key_column not in dataset.column_names:
            raise ValueError(f"there is no column '{key_column}'; there are {', '.join(dataset.column_names)}")

        def add(batch: dict[str, list]) -> dict[str, list]:
            if key_column not in batch:
                return batch if inner is None else inner(batch)
            labels = self.labels_for([str(key) for key in batch[key_column]])
            return {**(batch if inner is None else inner(batch)), column: labels}

        inner = None
        if isinstance(dataset, datasets.IterableDataset):
            return dataset.map(add, batched=True, batch_size=8)
        if dataset.format["type"] == "custom":
            inner = dataset.format["format_kwargs"]["transform"]
        return dataset.with_transform(add)

    # ---- rows ----

    def _make_caches(self) -> None:
        self._lock = threading.Lock()
        self._open = lru_cache(128)(self._open_file)
        # rows are often read in order
        self._read_group = lru_cache(4)(self._read_row_group)

    def _open_file(self, number: int) -> tuple[pq.ParquetFile, np.ndarray]:
        """A shard, and the row at which each of its row groups ends."""
        columns = ["key", *(spec.name for spec in self._specs)]
        file = open_shard(self._files[number], columns, memory_map=True)
        groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        return file, np.cumsum(groups)

    def _read_row_group(self, number: int, group: int) -> pa.Table:
        # one thread, because a worker of a data loader does not inherit the others
        return self._open(number)[0].read_row_group(group, use_threads=False)

    def _labels(self, row: int, specs: list[ExpertSpec]) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, row, side="right"))
        row -= int(self._ends[number - 1]) if number else 0
        with naming_the_shard(self._files[number]):
            with self._lock:
                ends = self._open(number)[1]
                group = int(np.searchsorted(ends, row, side="right"))
                table = self._read_group(number, group)
            row -= int(ends[group - 1]) if group else 0
            return decode_labels({name: table[name][row] for name in table.column_names}, specs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_open", "_read_group")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_caches()


def label_source(
    labels: "str | Path | LabelStore", experts: list[dict[str, Any]] | None = None
) -> Callable[[Iterable[str]], list[dict[str, Any]] | None]:
    """
    Makes the function that looks up the labels of a training or an evaluation.

    Args:
        labels (`str`, `Path` or [`LabelStore`]): `"live"` to run the experts of the processor, or a store.
        experts (`list[dict]`, *optional*):
            The entries of the configured experts. The store must have each of them, with the same description. Its
            other experts are left out.

    Returns:
        `Callable`: takes the keys of images and returns `expert_labels` for the processor, or `None` for `"live"`.

    Raises:
        FileNotFoundError: if the folder is not a label store.
        ValueError: if an expert is missing from the store or has another description there, or the store is damaged.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import label_images, label_source

    >>> report = label_images("modeling_prismer/assets", processor.experts, "my_labels", progress=False)
    >>> labels_for = label_source("my_labels", processor.image_processor.experts)  # or "live"
    >>> inputs = processor(image, "Is it red?", expert_labels=labels_for(["shape.png"]))
    ```
    """
    if isinstance(labels, str) and labels == "live":
        return _live
    store = labels if isinstance(labels, LabelStore) else LabelStore(labels)
    stored = {spec.name: spec for spec in read_specs(store.descriptions)}
    wanted = None if experts is None else read_specs(experts)
    for spec in wanted or ():
        there = stored.get(spec.name)
        if there is None:
            raise ValueError(f"the label store {store.folder} has no expert '{spec.name}'; it has {', '.join(stored)}")
        if field := spec.difference(there):
            raise ValueError(
                f"the expert '{spec.name}' of the label store {store.folder} has {field}={getattr(there, field)!r}; "
                f"the configured one has {getattr(spec, field)!r}"
            )
    return _Stored(store, None if wanted is None else [spec.name for spec in wanted])


def _live(keys: Iterable[str]) -> None:
    return None


class _Stored:
    """A function that can be pickled, for the workers of a data loader."""

    def __init__(self, store: LabelStore, experts: list[str] | None):
        self.store, self.experts = store, experts

    def __call__(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        return self.store.labels_for(keys, self.experts)
