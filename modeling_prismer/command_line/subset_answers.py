"""Measures a checkpoint with subsets of its experts: the experts run once, the network once for each subset."""

import json
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from modeling_prismer import DataCollatorForPrismer, DataCollatorForPrismerLM
from modeling_prismer.expert_spec import read_specs
from modeling_prismer.expert_worth import ExpertCost, Subset, SubsetPlan
from modeling_prismer.processing.data import images_of
from modeling_prismer.processing.experts import ExpertSuite
from modeling_prismer.processing.image_loading import load_image
from modeling_prismer.processing.labels import LabelStore, label_images, label_source
from modeling_prismer.processing.labels.shards import open_shard, shard_files
from modeling_prismer.processing.many_images.key_index import as_text
from modeling_prismer.processing.processing_prismer_lm import DEFAULT_PROMPTS

from .arguments import weight_fingerprint
from .checkpoints import PrismerLMReader, Reader
from .results import ResultFiles, read_rows


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second one does not see waiting
NUM_RANKED = 32  # candidates that are scored in full, unless the task says how many


# ---- costs of experts ----


class PeakMemory:
    """
    Measures the growth of memory within a `with` block.

    Attributes:
        bytes (`int`, *optional*):
            On CUDA the growth of the memory that torch allocated. On Linux the growth of the process's resident
            memory. `None` on other systems.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
            self.before = _resident_memory("VmRSS")
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before
        elif sys.platform == "linux":
            self.bytes = _resident_memory("VmHWM") - self.before


def _resident_memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure_costs(
    names: Sequence[str], suite: ExpertSuite, images: Sequence[Image.Image], batch_size: int, clock: str = "wall"
) -> dict[str, ExpertCost]:
    """
    Runs each expert alone over some images, after one batch that loads it and shows its memory. Call it before these
    experts run for the first time.

    Args:
        names (`Sequence[str]`): the experts. Those that are not in the suite have no known time.
        suite ([`ExpertSuite`]): the experts that run.
        images (`Sequence[PIL.Image.Image]`): one or more.
        batch_size (`int`): the number of images that run together.
        clock (`str`, *optional*, defaults to `"wall"`): `"wall"` or `"cpu"`.

    Returns:
        `dict[str, ExpertCost]`: by expert; the seconds are the median over the batches.
    """
    batches = [list(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
    labels: list[list[dict[str, Any]]] = [[{} for _ in batch] for batch in batches]
    costs: dict[str, ExpertCost] = {}
    now = CLOCKS[clock]

    def measure(name: str) -> None:
        if name in costs:
            return
        needs = tuple(other for other in (*suite[name].needs, *suite[name].uses) if other in suite)
        for other in needs:  # its labels are then known
            measure(other)
        alone = suite.only(name)
        with PeakMemory(suite[name].device) as memory:
            alone(batches[0], labels[0])
        seconds = []
        for batch, known in zip(batches, labels):
            start = now()
            found = alone(batch, known)
            seconds.append((now() - start) / len(batch))
            for own, new in zip(known, found):
                own.update(new)
        costs[name] = ExpertCost(statistics.median(seconds), memory.bytes, needs)

    for name in names:
        if name in suite:
            measure(name)
        else:
            costs[name] = ExpertCost(math.nan)
    return costs


# ---- labels ----


def distinct_images(rows: Dataset) -> Dataset:
    """The columns `image_id` and `image` of rows, each image once."""
    images = images_of(rows)
    first = np.unique(np.asarray(images["image_id"][:]), return_index=True)[1]
    return images.select(np.sort(first))


def first_images(rows: Dataset, number: int) -> list[Image.Image]:
    """The first images of rows, opened."""
    images = distinct_images(rows)
    return [load_image(row["image"], name=row["image_id"]) for row in images.select(range(min(number, len(images))))]


def find_labels(reader: Reader, rows: Dataset, given: Path | None, output: Path, batch_size: int) -> LabelStore:
    """
    The labels of all images of rows.

    Args:
        reader ([`Reader`]): the checkpoint, whose experts run unless labels are given.
        rows (`Dataset`): the data.
        given (`Path`, *optional*): a store with these labels.
        output (`Path`): the store to write or continue.
        batch_size (`int`): the number of images that run together.

    Raises:
        ValueError: if an expert cannot run and no labels are given.
    """
    if given is not None:
        return LabelStore(given)
    names = [spec.name for spec in reader.specs]
    if lacking := [name for name in names if name not in reader.suite]:
        raise ValueError(
            f"{reader.checkpoint.name} was saved without its experts {', '.join(lacking)}, so they cannot run; give a "
            "store of their labels, --labels, or leave them out with --experts"
        )
    label_images(distinct_images(rows), reader.suite, output, key_column="image_id", batch_size=batch_size)
    return LabelStore(output)


def label_bytes(store: LabelStore, expert: str) -> float:
    """The mean size in bytes of a stored label of an expert, compressed as in the store's files."""
    size = 0
    for path in shard_files(store.folder):
        with open_shard(path) as file:
            for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
                columns = map(group.column, range(group.num_columns))
                size += sum(
                    column.total_compressed_size
                    for column in columns
                    if column.path_in_schema.partition(".")[0] == expert
                )
    return size / max(1, len(store))


# ---- answers ----


@dataclass
class AskedImage:
    """
    An image and all texts about it.

    Args:
        image_id (`str`): its name.
        rows (`list[int]`): the numbers of its rows in the data.
        texts (`list[str]`, *optional*): a text for each row, `None` for a task without texts.
    """

    image_id: str
    rows: list[int] = field(default_factory=list)
    texts: list[str] | None = None


def group_texts(rows: Dataset) -> list[AskedImage]:
    """The images of rows, with fewest texts first, so that those of a batch have almost equally many."""
    columns = rows.with_format(None)
    groups: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(columns["image_id"][:]):
        groups[name].append(number)
    texts = columns["text"][:] if "text" in columns.column_names else None
    images = [
        AskedImage(name, numbers, None if texts is None else [texts[number] for number in numbers])
        for name, numbers in groups.items()
    ]
    return sorted(images, key=lambda image: len(image.rows))


class SubsetAnswers:
    """
    The texts of a checkpoint for images, with each subset of experts. An image is encoded once for each subset, for
    all texts about it.

    Args:
        reader ([`Reader`]): the checkpoint.
        plan ([`SubsetPlan`]): the subsets.
        task (`str`): the task of the data, such as `"vqa"`.
        store ([`LabelStore`]): has the labels of all experts of the plan.
        candidates (`list[str]`, *optional*): the texts to choose from. Otherwise the network generates.
        generation (`dict`, *optional*): settings of `generate`, in place of those of the checkpoint.
        clock (`str`, *optional*, defaults to `"wall"`): how seconds are measured, `"wall"` or `"cpu"`.
    """

    def __init__(
        self,
        reader: Reader,
        plan: SubsetPlan,
        task: str,
        store: LabelStore,
        candidates: list[str] | None = None,
        generation: dict[str, Any] | None = None,
        clock: str = "wall",
    ):
        self.reader, self.plan, self.candidates, self.clock = reader, plan, candidates, clock
        self.store = store
        self.task = reader.find_task(task)
        self.generation = {"do_sample": False, **(generation or {})}
        self.is_lm = isinstance(reader, PrismerLMReader)
        if self.is_lm and task not in DEFAULT_PROMPTS:
            raise ValueError(f"--task is {task!r}; a PrismerLM takes {' and '.join(DEFAULT_PROMPTS)}")
        labels_for = label_source(store, [spec.to_dict() for spec in reader.specs])
        settings: dict[str, Any] = {"labels_for": labels_for, "with_suffix": False}
        self.collator: Any
        if self.is_lm:
            as_chat = reader.processor.chat_template is not None
            self.collator = DataCollatorForPrismerLM(reader.processor, as_chat=as_chat, **settings)
        else:
            self.collator = DataCollatorForPrismer(reader.processor, **settings)
        self.specs = {spec.name: spec for spec in read_specs(reader.processor.image_processor.experts)}
        self.ranked: Any = None
        if candidates is not None and self.is_lm:
            self.ranked = reader.prepare_candidates(candidates, "" if task == "vqa" else None)
        elif candidates is not None:
            ranked = reader.processor.prepare_candidates(candidates, task=self.task)
            self.ranked = ranked.to(reader.checkpoint.device)

    def run(self, rows: Dataset, path: Path, batch_size: int) -> tuple[list[list[str]], list[float]]:
        """
        Answers all rows with each subset, and writes a line of JSON for each image. Images that have one are skipped.

        Args:
            rows (`Dataset`): the data, with images that are not decoded.
            path (`Path`): the file, made or continued.
            batch_size (`int`): the number of images that run together.

        Returns:
            For each subset the texts for all rows, and the seconds for each image (the median over the images).

        Raises:
            ValueError: if the file has answers of another checkpoint or of other weights, with other labels or another
                precision, to other texts, or with other settings.
        """
        checkpoint = self.reader.checkpoint
        weights = [weight_fingerprint(model) for model in (checkpoint.path, checkpoint.language) if model is not None]
        images = {as_text(image.image_id): image for image in group_texts(rows)}
        subsets = [self.plan.name_of(subset) for subset in self.plan.subsets]
        settings = {**self.generation, "candidates": self.candidates, "clock": self.clock}
        same: dict[str, Any] = {"model": checkpoint.name, "task": self.task, "weights": weights}
        same |= {"language": checkpoint.language, "dtype": str(self.reader.dtype)}
        same |= {"labels": str(self.store.folder.resolve())}
        same |= {"subsets": subsets, "settings": settings}
        with ResultFiles(path, same) as results:
            is_done = results.done.find(images) >= 0
            waiting = [image for image, done in zip(images.values(), is_done) if not done]
            with tqdm(total=len(images), initial=sum(is_done), desc="answers", unit="image") as progress:
                for start in range(0, len(waiting), batch_size):
                    batch = waiting[start : start + batch_size]
                    if start == 0:  # warms up
                        self.answer(batch[:1], rows)
                    answers, seconds = self.answer(batch, rows)
                    for image, own in zip(batch, answers):
                        row = {"file": as_text(image.image_id), "texts": image.texts, "answers": own}
                        results.write(json.dumps({**row, "seconds": seconds, **same}, ensure_ascii=False))
                    progress.update(len(batch))
        texts = [[""] * len(rows) for _ in subsets]
        all_seconds = []
        for row in read_rows(path):
            answered = images.get(row["file"])
            if answered is None or row["texts"] != answered.texts:
                raise ValueError(f"{path} has answers to other texts about {row['file']!r}; choose another --out")
            all_seconds.append(row["seconds"])
            for own, answers in zip(texts, row["answers"]):
                for number, answer in zip(answered.rows, answers):
                    own[number] = answer
        return texts, np.median(all_seconds, axis=0).tolist()

    @torch.inference_mode()
    def answer(self, images: Sequence[AskedImage], rows: Dataset) -> tuple[list[list[list[str]]], list[float]]:
        """
        Args:
            images (`Sequence[AskedImage]`): a batch.
            rows (`Dataset`): the data.

        Returns:
            For each image and each subset its texts, and for each subset the seconds for each image.
        """
        most = max(len(image.rows) for image in images)
        batch = [self._row(image, rows[image.rows[0]], most) for image in images]
        given: list[list[list[str]]] = [[] for _ in images]
        seconds, now = [], CLOCKS[self.clock]
        for inputs in self._inputs_of_subsets(batch):
            start = now()
            texts = self._texts(inputs)  # on the CPU, so the device has finished
            seconds.append((now() - start) / len(images))
            for place, image in enumerate(images):
                given[place].append(texts[place * most : place * most + len(image.rows)])
        return given, seconds

    def _row(self, image: AskedImage, row: dict[str, Any], most: int) -> dict[str, Any]:
        """A row of the collator. Each image needs the same number of texts, so they are repeated."""
        texts: Any = image.texts
        if self.is_lm:
            prompt_for = self.reader.processor.prompt_for
            texts = [prompt_for(self.task, text.strip()) for text in texts] if texts else [prompt_for(self.task)]
        asked = {"image": row["image"], "image_id": image.image_id}
        if texts is not None:
            asked["text"] = (texts * most)[:most]
        if not self.is_lm:
            asked["task"] = [self.task] * most
        return asked

    def _inputs_of_subsets(self, batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The network's inputs for each subset."""
        if self.is_lm and self.reader.processor.experts_as != "tokens":  # words of experts are in the prompt
            for subset in self.plan.subsets:
                self.collator.experts = self.plan.ordered(subset)
                yield self._on_device(self.collator(batch))
            return
        self.collator.experts = list(self.plan.experts)
        inputs = self._on_device(self.collator(batch))
        for subset in self.plan.subsets:
            yield self.with_experts(inputs, subset)

    def _on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(self.reader.checkpoint.device) for name, tensor in inputs.items()}

    def with_experts(self, inputs: dict[str, torch.Tensor], subset: Subset) -> dict[str, torch.Tensor]:
        """The inputs without the experts that are not in a subset."""
        absent = [name for name in self.specs if name not in subset]
        kept = inputs
        if "pixel_values" in inputs:  # else the experts' tensors alone say how many images there are
            is_owned = {name: any(self.specs[own].owns(name) for own in absent) for name in inputs}
            kept = {name: tensor for name, tensor in inputs.items() if not is_owned[name]}
        is_present = torch.tensor([name in subset for name in self.specs], device=inputs["expert_mask"].device)
        return {**kept, "expert_mask": inputs["expert_mask"] & is_present}

    def _texts(self, inputs: dict[str, torch.Tensor]) -> list[str]:
        network, processor = self.reader.network, self.reader.processor
        if self.candidates is not None:
            k = min(NUM_RANKED, len(self.candidates))
            ranking = network.rank_candidates(**self.ranked, k=k, **inputs)
            return [self.candidates[number] for number in ranking.indices[:, 0].tolist()]
        generated = network.generate(**inputs, **self.generation)
        texts = processor.post_process_generation(generated, inputs["input_ids"].shape[1], task=self.task)
        return [(text.splitlines() or [""])[0].strip() for text in texts]
