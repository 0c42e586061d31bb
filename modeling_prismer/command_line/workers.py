"""What `prismer caption`, `ask`, `classify` and `experts` do with each image."""

import json
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from modeling_prismer.processing.experts import ExpertError
from modeling_prismer.processing.many_images.key_index import as_text
from modeling_prismer.processing.many_images.worker import ImageWorker
from modeling_prismer.processing.visualization import experts_panel, label_in_words

from .checkpoints import Checkpoint, ExpertsReader, Reader


if TYPE_CHECKING:
    import pyarrow

MAX_FAILURES_IN_A_ROW = 100  # of images that could be opened; then the network or the settings are at fault


class ResultWorker(ImageWorker):
    """
    A worker whose rows have the columns `key`, `error` and `json`, an object with all results of an image.

    Args:
        checkpoint ([`Checkpoint`]): experts and network. A pickled worker has not loaded them.
        same (`dict`): values that the objects of all images have, such as the question.

    Attributes:
        reader ([`ExpertsReader`]): the loaded checkpoint.
    """

    empty: dict[str, Any] = {}  # the results of an image that failed

    def __init__(self, checkpoint: Checkpoint, same: dict[str, Any]):
        super().__init__()
        self.checkpoint = checkpoint
        self.same = {"model": checkpoint.name, **same}
        self._reader: ExpertsReader | None = None
        self._failures_in_a_row = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reader": None}

    @property
    def reader(self) -> Any:
        if self._reader is None:
            self._reader = self.load()
        return self._reader

    def load(self) -> ExpertsReader:
        """Loads the checkpoint. Raises a `ValueError` if the settings do not fit it."""
        return self.checkpoint.load()

    @property
    def schema(self) -> "pyarrow.Schema":
        import pyarrow

        return pyarrow.schema({"key": pyarrow.string(), "error": pyarrow.string(), "json": pyarrow.string()})

    def describe(self, error: Exception) -> str:
        return str(error) or type(error).__name__

    def see_opened(self, images: list[Image.Image]) -> list[tuple[dict[str, Any], str | None]]:
        reader = self.reader
        start, loading_before = time.perf_counter(), reader.loading_seconds
        try:
            labels = self.run_experts(images)
            results = self.run(images, labels)
        except (ValueError, ExpertError) as error:
            if len(images) > 1:
                return [self.see_opened([image])[0] for image in images]
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise
            return [({}, str(error))]
        self._failures_in_a_row = 0
        seconds = time.perf_counter() - start - (reader.loading_seconds - loading_before)
        for result, own in zip(results, labels):
            result["experts"] = [name for name, label in own.items() if label is not None]
            result["seconds"] = round(seconds / len(images), 4)
        return [(result, None) for result in results]

    def run_experts(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        """The labels of each image."""
        return self.reader.run_experts(images)

    @abstractmethod
    def run(self, images: list[Image.Image], labels: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The results of each image. `labels` are those of the experts that ran."""

    def encode(self, key: str, result: dict[str, Any], error: str | None) -> dict[str, Any]:
        error = None if error is None else as_text(error)
        written = {"file": key, **self.empty, "experts": [], "seconds": None, **result, "error": error, **self.same}
        return {"key": key, "error": error, "json": json.dumps(written, ensure_ascii=False)}


class Generating(ResultWorker):
    """
    Captions images or answers questions about them.

    Args:
        checkpoint ([`Checkpoint`]): experts and network.
        task (`str`): `"caption"` or `"vqa"`.
        texts (`Sequence[str | None]`): the questions, or the beginning of the caption, about each image.
        num_beams (`int`, *optional*): by default that of the checkpoint's generation configuration.
        with_scores (`bool`, *optional*, defaults to `False`): whether to compute scores.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: str,
        texts: Sequence[str | None],
        num_beams: int | None = None,
        with_scores: bool = False,
    ):
        self.task, self.texts, self.num_beams, self.with_scores = task, list(texts), num_beams, with_scores
        name = "question" if task == "vqa" else "prompt"
        same: dict[str, Any] = {name: texts[0]} if len(texts) == 1 and texts[0] is not None else {}
        if len(texts) > 1:
            same = {"questions": self.texts}
        super().__init__(checkpoint, same)
        self.empty = {"text": None, "score": None} if len(texts) == 1 else {"answers": None}

    def load(self) -> Reader:
        reader = self.checkpoint.load()
        self.task = reader.find_task(self.task)
        reader.check_texts(self.texts, self.task)
        return reader

    def run_experts(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        return self.reader.run_experts(images, self.texts, self.task)

    @torch.inference_mode()
    def run(self, images: list[Image.Image], labels: list[dict[str, Any]]) -> list[dict[str, Any]]:
        reader = self.reader
        inputs = reader.prepare(images, self.texts, self.task, labels)
        prompt_length = inputs["input_ids"].shape[1]
        encoded, distances = reader.encode(dict(inputs))
        settings: dict[str, Any] = {} if self.num_beams is None else {"num_beams": self.num_beams}
        if self.with_scores:
            settings |= {"return_dict_in_generate": True, "output_logits": True}
        generated = reader.network.generate(**encoded, **settings)
        sequences = generated.sequences if self.with_scores else generated
        texts = reader.processor.post_process_generation(sequences, prompt_length, task=self.task)
        answers: list[dict[str, Any]] = [{"text": text} for text in texts]
        if self.with_scores:
            for answer, score in zip(answers, mean_log_probabilities(reader.network, generated, prompt_length)):
                answer["score"] = round(score, 4)
        each = len(self.texts)
        groups = [answers[row : row + each] for row in range(0, len(answers), each)]
        results = [group[0] if each == 1 else {"answers": group} for group in groups]
        return _with_familiarity(results, distances, reader.familiar_distance)


class Classifying(ResultWorker):
    """
    Ranks labels for images.

    Args:
        checkpoint ([`Checkpoint`]): experts and network.
        labels (`list[str]`): the labels.
        question (`str`, *optional*): the question that the labels answer.
    """

    def __init__(self, checkpoint: Checkpoint, labels: list[str], question: str | None):
        super().__init__(checkpoint, {} if question is None else {"question": question})
        self.labels, self.question = labels, question
        self.empty = {"text": None, "score": None, "labels": None}

    def load(self) -> Reader:
        reader = self.checkpoint.load()
        reader.prepare_candidates(self.labels, self.question)
        return reader

    def run_experts(self, images: list[Image.Image]) -> list[dict[str, Any]]:
        task = "caption" if self.question is None else "vqa"
        return self.reader.run_experts(images, [self.question], task)

    @torch.inference_mode()
    def run(self, images: list[Image.Image], labels: list[dict[str, Any]]) -> list[dict[str, Any]]:
        reader = self.reader
        candidates = reader.prepare_candidates(self.labels, self.question)
        inputs = reader.prepare_to_rank(images, self.question, labels)
        encoded, distances = reader.encode(dict(inputs))
        ranking = reader.network.rank_candidates(**candidates, k=len(self.labels), **encoded)
        results = []
        for row in reader.processor.post_process_ranking(ranking, self.labels):
            ranked = [{"label": each["label"], "score": round(each["score"], 4)} for each in row]
            results.append({"text": ranked[0]["label"], "score": ranked[0]["score"], "labels": ranked})
        return _with_familiarity(results, distances, reader.familiar_distance)


class Drawing(ResultWorker):
    """
    Writes the experts' output of each image in words, and draws it.

    Args:
        checkpoint ([`Checkpoint`]): the experts; the network is not loaded.
        folder (`Path`, *optional*): the folder for the drawings.
        is_one (`bool`): whether there is one image alone, whose drawing has a short name.
    """

    empty = {"found": None, "panel": None}

    def __init__(self, checkpoint: Checkpoint, folder: Path | None, is_one: bool):
        super().__init__(checkpoint, {})
        self.folder, self.is_one = folder, is_one

    def load(self) -> ExpertsReader:
        return self.checkpoint.load_experts()

    def run(self, images: list[Image.Image], labels: list[dict[str, Any]]) -> list[dict[str, Any]]:
        specs, class_names = self.reader.specs, self.reader.suite.class_names
        results = []
        for image, own in zip(images, labels):
            words = {spec.name: label_in_words(own.get(spec.name), spec, class_names.get(spec.name)) for spec in specs}
            result: dict[str, Any] = {"found": {name: found for name, found in words.items() if found is not None}}
            if self.folder is not None:
                drawn = {spec.name: own.get(spec.name) for spec in specs}
                result["panel"] = experts_panel(image, drawn, descriptions=specs, class_names=class_names)
            results.append(result)
        return results

    def encode(self, key: str, result: dict[str, Any], error: str | None) -> dict[str, Any]:
        if result.get("panel") is not None:
            try:
                result = {**result, "panel": str(self._save(key, result["panel"]))}
            except OSError as failure:
                result, error = {}, str(failure)
        return super().encode(key, result, error)

    def _save(self, key: str, panel: Image.Image) -> Path:
        assert self.folder is not None
        path = self.folder / (f"{Path(key).stem}_experts.png" if self.is_one else f"{_relative(key)}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.unfinished")
        try:
            panel.save(temporary, format="PNG")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path


def _relative(key: str) -> Path:
    """A key as a path below a folder. It may come from a stranger's tar."""
    parts = key.partition("://")[2] if "://" in key else key
    kept = [part.replace("\0", "_") for part in parts.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return Path(*kept) if kept else Path("image")


def _with_familiarity(
    results: list[dict[str, Any]], distances: list[float] | None, limit: float | None
) -> list[dict[str, Any]]:
    if distances is None or limit is None:
        return results
    return [{**result, "familiar": distance <= limit} for result, distance in zip(results, distances)]


def mean_log_probabilities(network: Any, generated: Any, prompt_length: int) -> list[float]:
    """The mean log-probability of the tokens that were generated in each row, with that of the end of the text."""
    values = network.compute_transition_scores(
        generated.sequences,
        tuple(logits.float() for logits in generated.logits),
        getattr(generated, "beam_indices", None),
        normalize_logits=True,
    )  # (rows, steps)
    tokens = generated.sequences[:, prompt_length : prompt_length + values.shape[1]]
    ends = network.generation_config.eos_token_id
    is_end = torch.isin(tokens, torch.tensor([ends] if isinstance(ends, int) else ends or [], device=tokens.device))
    is_text = (is_end.long().cumsum(1) - is_end.long()) == 0  # up to the first end
    return ((values * is_text).sum(1) / is_text.sum(1)).tolist()
