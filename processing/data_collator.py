"""Makes batches for Prismer from the rows of a data set."""

import hashlib
import math
import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .expert_labels import check_expert_labels, read_experts
from .image_loading import load_image
from .processing_prismer import PrismerProcessor


TEXT_COLUMNS = ("text", "suffix", "weight", "task")


class DataCollatorForPrismer:
    """
    Makes a batch from rows. It opens the images, reads their labels from a label store or runs the experts, augments
    each image with its maps, and calls the processor.

    Augmentation, expert dropout and the choice of texts are random. They depend on `seed`, `epoch` and the row only,
    so the number of data loader workers and processes does not change them, nor does a resumed training.

    A row has these columns:

    | column | type | meaning |
    | --- | --- | --- |
    | `image` | any input of [`load_image`] | the image, such as a path, a PIL image, or `{"bytes": …, "path": …}` |
    | `image_id` | `str` | the key in the label store; not needed for live experts |
    | `text` | `str`, *optional* | the question or prompt, by default the prompt of the processor's task |
    | `suffix` | `str`, *optional* | the caption, answer or class to learn |
    | `weight` | `float`, *optional* | the weight of the loss, returned as `sample_weight` |
    | `task` | `str`, *optional* | the task of the text, by default the processor's task |

    `text`, `suffix`, `weight` and `task` can be lists of several texts about one image. The network then encodes the
    image once for all of them. `texts_per_image` draws some of them.

    With [`Trainer`](https://huggingface.co/docs/transformers/main_classes/trainer), set `remove_unused_columns=False`,
    because the columns belong to the collator, not to the model. Live experts on a GPU need
    `dataloader_num_workers=0`.

    Args:
        processor ([`PrismerProcessor`]): The processor. Its [`Task`] decides about the form of the texts.
        labels_for (`Callable`, *optional*):
            A function from a list of image ids to `expert_labels`, such as one from [`label_source`]. Without it, or
            if it returns `None`, the processor's experts run on the images before their augmentation.
        augmentation (`Callable`, *optional*):
            A function that changes an image and its labels, such as [`JointAugmentation`].
        expert_dropout (`float`, *optional*, defaults to 0.0):
            The probability with which each expert is masked out of each sample. It teaches the model to work without
            some of the experts.
        texts_per_image (`int`, *optional*):
            The number of texts to draw from rows whose `text` or `suffix` is a list. Texts are repeated only if there
            are too few.
        with_suffix (`bool`, *optional*, defaults to `True`):
            Whether to use `suffix` and return `labels`. Pass `False` for generation.
        experts (`list[str]`, *optional*): The names of the experts to use, by default all; `[]` means none.
        seed (`int`, *optional*, defaults to 0): The seed of all random choices.

    Attributes:
        epoch (`int`): The epoch, which changes the random choices. Workers of a data loader see a change at once.

    Example:

    ```python
    >>> from modeling_prismer import DataCollatorForPrismer
    >>> from modeling_prismer.processing import JointAugmentation
    >>> from modeling_prismer.processing.labels import label_images, label_source

    >>> experts = processor.image_processor.experts
    >>> report = label_images("modeling_prismer/assets", processor.experts, "labels", progress=False)
    >>> collator = DataCollatorForPrismer(
    ...     processor,
    ...     labels_for=label_source("labels", experts),
    ...     augmentation=JointAugmentation(experts, size=(64, 64)),
    ... )
    >>> row = {"image": image, "image_id": "shape.png", "text": "What color is the shape?", "suffix": "teal"}
    >>> sorted(collator([row, row]))
    ['attention_mask', 'edge_values', 'expert_mask', 'input_ids', 'labels', 'ocr_features', 'ocr_ids', 'pixel_values']
    ```
    """

    def __init__(
        self,
        processor: PrismerProcessor,
        labels_for: Callable[[list[Any]], list[dict[str, Any]] | None] | None = None,
        augmentation: Callable[..., tuple[Any, dict[str, Any]]] | None = None,
        expert_dropout: float = 0.0,
        texts_per_image: int | None = None,
        with_suffix: bool = True,
        experts: list[str] | None = None,
        seed: int = 0,
    ):
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"expert_dropout is {expert_dropout}; it must be at least 0 and below 1")
        if texts_per_image is not None and texts_per_image < 1:
            raise ValueError(f"texts_per_image is {texts_per_image}; it must be at least 1, or None for all")
        self.processor = processor
        self.labels_for = labels_for
        self.augmentation = augmentation
        self.expert_dropout = expert_dropout
        self.texts_per_image = texts_per_image
        self.with_suffix = with_suffix
        self.experts = experts
        self.seed = seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __call__(self, rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (`list[dict]`): The rows, all with the same columns; see above.

        Returns:
            `dict[str, torch.Tensor]`: the inputs of [`PrismerForConditionalGeneration.forward`]; see
            [`PrismerProcessor.__call__`] for their shapes.

        Raises:
            ValueError: if an image cannot be read, a label is wrong or has NaN, a weight is negative or not a number,
                or only some rows have a column. The message names the row's `image_id`.
        """
        return self._collate([dict(row) for row in rows])

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        for column in ("image_id", *TEXT_COLUMNS):
            number = sum(row.get(column) is not None for row in rows)
            if number not in (0, len(rows)):
                raise ValueError(f"{number} of {len(rows)} rows have '{column}'; all or none of a batch must")
        images, labels, keep = self._open(rows)
        texts: dict[str, Any] = {"text": _column(rows, "text"), "task": _column(rows, "task")}
        if self.with_suffix:
            texts["suffix"] = _column(rows, "suffix")
        inputs = dict(self.processor(images, expert_labels=labels, experts=self.experts, return_tensors="pt", **texts))
        if "expert_mask" in inputs:
            inputs["expert_mask"] &= keep
        if self.with_suffix and rows[0].get("weight") is not None:
            weights = [weight for i, row in enumerate(rows) for weight in _weights(row, i)]
            inputs["sample_weight"] = torch.tensor(weights, dtype=torch.float32)
        return inputs

    def _open(self, rows: list[dict[str, Any]]) -> tuple[list[Any], list[Any], torch.Tensor]:
        """
        The images and labels of rows, augmented, and which experts are kept: `(rows, number of experts)`. Draws texts.
        """
        for row in rows:
            if "image" not in row:
                raise ValueError(
                    f"a row has no 'image'; its columns are: {', '.join(map(str, row)) or 'none'}. With Trainer, set "
                    "remove_unused_columns=False, because Trainer drops columns that the model does not name"
                )
        images = [load_image(row["image"], name=row.get("image_id")) for row in rows]
        labels = self._labels(rows, images)
        experts = read_experts(self.processor.image_processor.experts)
        keep = torch.ones(len(rows), len(experts), dtype=torch.bool)
        for i, row in enumerate(rows):
            check_expert_labels(labels[i] or {}, experts, _name_of(row, i))
            with self._randomness_of(row, images[i], i):
                if self.texts_per_image is not None:
                    self._draw_texts(row, self.texts_per_image)
                if self.augmentation is not None:
                    images[i], labels[i] = self.augmentation(images[i], labels[i])
                if self.expert_dropout:
                    keep[i] = torch.rand(keep.shape[1]) >= self.expert_dropout
        return images, labels, keep

    def _labels(self, rows: list[dict[str, Any]], images: list[Any]) -> list[dict[str, Any]]:
        labels = None
        if self.labels_for is not None:
            labels = self.labels_for([row.get("image_id") for row in rows])
        if labels is None:  # before the augmentation, so that the experts see whole images
            labels = self.processor.run_experts(images, experts=self.experts)
        return list(labels)

    def _draw_texts(self, row: dict[str, Any], texts_per_image: int) -> None:
        lists = {column: row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), list)}
        if not lists:
            return
        number = len(next(iter(lists.values())))
        rounds = -(-texts_per_image // number)
        drawn = torch.cat([torch.randperm(number) for _ in range(rounds)])[:texts_per_image].tolist()
        row.update({column: [values[i] for i in drawn] for column, values in lists.items()})

    @contextmanager
    def _randomness_of(self, row: Mapping[str, Any], image: Any, place: int) -> Iterator[None]:
        """Seeds torch's CPU generator from the row, and restores the generator's state afterwards."""
        identity = [row.get(column) for column in ("image_id", "text", "suffix")]
        if identity[0] is None:  # the image itself, and its place in the batch in case it occurs twice
            identity += [hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest(), place]
        digest = hashlib.blake2b(repr((self.seed, self.epoch, *identity)).encode(), digest_size=7).digest()
        state = torch.default_generator.get_state()
        # torch.manual_seed would also seed the GPUs
        torch.default_generator.manual_seed(int.from_bytes(digest, "big"))
        try:
            yield
        finally:
            torch.default_generator.set_state(state)


def _column(rows: list[dict[str, Any]], name: str) -> list[Any] | None:
    return None if rows[0].get(name) is None else [row[name] for row in rows]


def _name_of(row: dict[str, Any], place: int) -> str:
    return f"sample {place}" if row.get("image_id") is None else f"'{row['image_id']}'"


def _weights(row: dict[str, Any], place: int) -> list[float]:
    weights = row["weight"] if isinstance(row["weight"], list) else [row["weight"]]
    for weight in weights:
        if not isinstance(weight, numbers.Real) or not 0 <= float(weight) < math.inf:
            raise ValueError(f"weight of {_name_of(row, place)} is {weight!r}; a number of at least 0 is needed")
    return [float(weight) for weight in weights]
