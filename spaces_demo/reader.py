"""Runs a checkpoint for the page: its experts one by one, and answers with probabilities and attention."""

import logging
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any

import torch
from checks import Refused, as_text
from hardware import on_gpu
from PIL import Image
from transformers import StoppingCriteria
from transformers.utils import logging as transformers_logging

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, optimize_for_cpu
from modeling_prismer.expert_spec import read_specs
from modeling_prismer.familiarity import Familiarity, image_features
from modeling_prismer.processing.experts import look_of
from modeling_prismer.processing.tasks import Task, find_task


logger = logging.getLogger(__name__)
MAX_WORDS, MAX_LETTERS = 30, 300  # limits of a question
MAX_LABELS, MAX_LABEL_LETTERS = 50, 3000  # limits of all labels together
NUM_BEAMS, NUM_OTHERS = 5, 4  # alternatives to an answer: searched and shown
MAX_SECONDS = 60.0  # time to wait for the next word


@dataclass
class Seen:
    """The output of an expert for an image. If it failed, `label` is `None` and `failed` is true."""

    name: str
    label: Any
    seconds: float
    failed: bool = False


@dataclass
class Encoding:
    """
    An image and its experts' labels, encoded.

    `states` is (1, patches + latents, width), or what a language model needs. `sources` has, for each expert, the
    share that each latent took from each place of its map, (latents, height, width). `distance` is the distance from
    the training images.
    """

    states: Any
    sources: dict[str, torch.Tensor] = field(default_factory=dict)
    distance: float | None = None


@dataclass
class Said:
    """
    An answer of the model: its probability, the mean probability of its words, the alternatives with their
    probabilities, and the attention on the image (height, width) and on each expert's map. All attention sums to 1,
    together with the part that belongs to no place. There is no attention for a PrismerLM.
    """

    text: str
    probability: float
    per_word: float
    others: list[tuple[str, float]] = field(default_factory=list)
    looked: torch.Tensor | None = None
    looked_at_experts: dict[str, torch.Tensor] = field(default_factory=dict)


class Reader:
    """
    A Prismer. [`LanguageReader`] is the same for a PrismerLM.

    Args:
        path (`str`): a checkpoint: a folder or a Hub id.
        device (`str`, *optional*): by default a GPU, if there is one.
        kwargs: further arguments of a subclass.
    """

    _attention: dict[str, Any] = {"output_attentions": True}  # arguments of `forward` that return the attention

    def __init__(self, path: str, device: str | None = None, **kwargs: Any):
        transformers_logging.disable_progress_bar()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.name = Path(path).name
        self._load(path, **kwargs)
        self.specs = {spec.name: spec for spec in read_specs(self.processor.image_processor.experts)}
        generated = [task for task in self._tasks() if not task.is_ranked]
        self.question_task = next((task for task in generated if task.prompt is None), None)
        self.caption_task = next((task for task in generated if task.prompt is not None), None)
        self.ranking_task = self.question_task or self._tasks()[0]
        self._lock = Lock()  # hooks belong to the network, so calls with hooks must not overlap
        self._experts_on_gpu = on_gpu(self._run_expert)
        self._encode_on_gpu = on_gpu(self._encode)
        self._say_on_gpu = on_gpu(self._say)
        self._explain_on_gpu = on_gpu(self._explain)
        self._rank_on_gpu = on_gpu(self._rank)

    def _load(self, path: str) -> None:
        self.processor = PrismerProcessor.from_pretrained(path, expert_device=self.device)
        # eager attention returns the attention weights
        dtype = torch.float32 if self.device == "cpu" else "auto"
        self.model = PrismerForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation="eager")
        self.model.to(self.device).eval()
        if dtype == torch.float32:
            optimize_for_cpu(self.model)
        self.familiarity = Familiarity.from_pretrained(path)

    def _tasks(self) -> list[Task]:
        return [find_task(name) for name in self.processor.tasks or [self.processor.task]]

    # ---- experts ----

    @property
    def live(self) -> Any:
        return self.processor.experts or {}

    def title(self, name: str) -> str:
        return look_of(name).title

    def class_names(self, name: str) -> list[str]:
        """Returns the names of an expert's classes. A class without a name gets a number."""
        number = self.specs[name].num_classes or 0
        names = getattr(self.live, "class_names", {}).get(name) or self.specs[name].class_names or ()
        names = [names.get(i) for i in range(number)] if isinstance(names, Mapping) else list(names)
        return [names[i] if i < len(names) and names[i] else f"class {i}" for i in range(number)]

    def encode_words(self, words: list[str]) -> Any:
        expert = next((self.live[name] for name in self.live if hasattr(self.live[name], "word_features")), None)
        if expert is None:
            raise Refused("Words cannot be edited: this checkpoint has no live expert for text.")
        return expert.word_features(words)

    def look(self, image: Image.Image, names: Collection[str] | None = None) -> Iterator[Seen]:
        """Runs the experts on an image, one after the other. `names` selects some of them; the default is all."""
        known: dict[str, Any] = {}
        for name in self.specs:
            if names is not None and name not in names:
                continue
            start = time.perf_counter()
            try:
                label = self._experts_on_gpu(name, image, known) if name in self.live else None
                failed = label is None
            except Exception:  # the page shows this expert as failed, and the others run
                logger.exception("the expert %s failed", name)
                label, failed = None, True
            known[name] = label
            yield Seen(name, label, time.perf_counter() - start, failed)

    def _run_expert(self, name: str, image: Image.Image, known: dict[str, Any]) -> Any:
        usable = {other: label for other, label in known.items() if label is not None}
        return self.live.only(name)([image], [usable])[0][name]

    def warm_up(self) -> None:
        """Loads all experts and runs the network once, so that the first visitor does not wait."""
        image = Image.new("RGB", (64, 64), "gray")
        encoding = self.encode(image, {seen.name: seen.label for seen in self.look(image)})
        for task, text in ((self.caption_task, None), (self.question_task, "What is it?")):
            if task is not None:
                self.explain(encoding, text)

    # ---- the network ----

    def encode(self, image: Image.Image, labels: Mapping[str, Any]) -> Encoding:
        """Encodes an image with its experts' labels. An expert with the label `None` is missing."""
        return self._encode_on_gpu(image, {name: labels.get(name) for name in self.specs})

    @torch.inference_mode()
    def _encode(self, image: Image.Image, labels: dict[str, Any]) -> Encoding:
        inputs = self.processor.image_processor(image, expert_labels=labels).to(self.device)
        vision = self.model.model.vision_model
        layers = vision.resampler.layers if vision.resampler is not None else ()
        grids: dict[str, tuple[int, int]] = {}
        attentions: list[torch.Tensor] = []

        def note_grid(name: str, tokens: torch.Tensor) -> None:
            grids[name] = tuple(tokens.shape[2:])

        with self._lock:  # the hooks of another call would record this forward pass
            hooks = [
                stem.register_forward_hook(lambda _, __, tokens, name=name: note_grid(name, tokens))
                for name, stem in vision.expert_stems.items()
            ]
            hooks += [
                layer.latent_attn.register_forward_hook(lambda _, __, out: attentions.append(out[1].mean(1)[0]))
                for layer in layers
            ]
            try:
                encoded = self.model.get_image_features(**inputs, return_dict=True)
            finally:
                for hook in hooks:
                    hook.remove()
        distance = None
        if self.familiarity is not None:
            distance = self.familiarity.distance(image_features(self.model, encoded)).item()
        return Encoding(encoded.last_hidden_state.cpu(), _sources(attentions, grids), distance)

    @property
    def usual_distance(self) -> float | None:
        return None if self.familiarity is None else self.familiarity.limit

    def task_of(self, text: str | None) -> Task:
        """Returns the task of a question, or that of captions if there is no text."""
        task = self.caption_task if text is None else self.question_task
        if task is None:
            raise Refused(f"This checkpoint cannot {'write captions' if text is None else 'answer questions'}.")
        return task

    def prompt(self, task: Task, text: str | None = None) -> dict[str, torch.Tensor]:
        """
        Returns the tokens of a question, or of the beginning of a caption.

        Raises:
            Refused: if there is no question, or it is longer than the limits.
        """
        text = as_text("" if text is None else text, "question", 2 * MAX_LETTERS).strip() or None
        if task.prompt is None:
            if text is None or not any(letter.isalnum() for letter in text):
                raise Refused("Please type a question first.")
            length = self._tokens(task, text, truncation=False)["input_ids"].shape[1]
            if len(text.split()) > MAX_WORDS or len(text) > MAX_LETTERS or length > task.max_prompt_tokens:
                raise Refused(
                    f"This question is too long ({len(text.split())} words). The model reads up to {MAX_WORDS} short "
                    "words. Please shorten it."
                )
        return self._tokens(task, text)

    def _tokens(self, task: Task, text: str | None, **settings: Any) -> dict[str, torch.Tensor]:
        blank = Image.new("RGB", (8, 8))  # only the text is needed
        inputs = self.processor(blank, text, experts=[], task=task.name, **settings)
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def _inputs(self, encoding: Encoding, task: Task, text: str | None) -> dict[str, Any]:
        """The inputs of `generate`: tokens of the text, and the encoded image."""
        return {**self.prompt(task, text), "encoder_outputs": (encoding.states,)}

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs on the device of the network."""
        placed = {name: tensor.to(self.device) for name, tensor in inputs.items() if isinstance(tensor, torch.Tensor)}
        return {**placed, "encoder_outputs": (inputs["encoder_outputs"][0].to(self.device),)}

    def _text(self, row: list[int], task: Task) -> str:
        return self.processor.post_process_generation([row], task=task.name)[0]

    def say(self, encoding: Encoding, text: str | None = None) -> Iterator[str]:
        """
        Yields the answer to a question, or a caption, as it grows. With several beams, it yields the best text so far.
        Closing the iterator stops the network.
        """
        task = self.task_of(text)
        for row in self._say_on_gpu(self._inputs(encoding, task, text)):
            yield self._text(row, task)

    def _say(self, inputs: dict[str, Any]) -> Iterator[list[int]]:
        """Yields the tokens so far after each step, and at last those of the result."""
        length = inputs["input_ids"].shape[1]
        watch = _Watch()
        problems: list[Exception] = []

        def generate() -> None:
            try:
                settings = {**self._settings, "stopping_criteria": [watch]}
                generated = self.model.generate(**self._placed(inputs), **settings)
                watch.rows.put(generated[0])
            except Exception as error:  # raised below, in the thread of the reader
                problems.append(error)
            watch.rows.put(None)

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            while (row := watch.rows.get(timeout=MAX_SECONDS)) is not None:
                yield row[length:].tolist()
        finally:
            watch.stopped.set()
            thread.join()
        if problems:
            raise problems[0]

    def explain(self, encoding: Encoding, text: str | None = None) -> Said:
        """Returns the answer to a question, or a caption, with its probability, alternatives and attention."""
        task = self.task_of(text)
        rows, probabilities, cross = self._explain_on_gpu(self._inputs(encoding, task, text))
        texts = [self._text(row, task) for row in rows]
        ranked: dict[str, float] = {}
        for each, probability in zip(texts, probabilities):
            ranked[each] = ranked.get(each, 0.0) + probability
        text_said = texts[0]
        others = sorted(((each, p) for each, p in ranked.items() if each != text_said), key=lambda pair: -pair[1])
        per_word = probabilities[0] ** (1 / max(1, len(rows[0])))
        said = Said(text_said, ranked[text_said], per_word, others[:NUM_OTHERS])
        if cross is not None:
            said.looked, said.looked_at_experts = self._looked(cross, encoding.sources)
        return said

    def _looked(
        self, cross: torch.Tensor, sources: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The attention on the image and on each expert's map, from that on the tokens (patches + latents)."""
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        looked, latents = cross[: side**2].reshape(side, side), cross[side**2 :]
        return looked, {name: torch.einsum("l,lhw->hw", latents, source) for name, source in sources.items()}

    @property
    def _settings(self) -> dict[str, Any]:
        """Those of the checkpoint, without sampling: the page explains the answer that it showed."""
        return {"do_sample": False}

    @torch.inference_mode()
    def _explain(self, inputs: dict[str, Any]) -> tuple[list[list[int]], list[float], torch.Tensor | None]:
        """Returns continuations, the answer first, with probabilities, and the answer's attention (tokens,)."""
        inputs = self._placed(inputs)
        length, ends = inputs["input_ids"].shape[1], self._ends
        answer = self.model.generate(**inputs, **self._settings)
        others = self.model.generate(
            **inputs, **{**self._settings, "num_beams": NUM_BEAMS, "num_return_sequences": NUM_BEAMS}
        )
        rows: list[list[int]] = []
        for row in [*answer[:, length:].tolist(), *others[:, length:].tolist()]:
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            if row[: end + 1] not in rows:
                rows.append(row[: end + 1])
        longest = max(map(len, rows))
        padding = self.processor.tokenizer.pad_token_id
        padded = torch.tensor([row + [padding] * (longest - len(row)) for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self.device)
        texts = {
            "input_ids": torch.cat([inputs["input_ids"].repeat(len(rows), 1), padded], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"].repeat(len(rows), 1), mask], dim=1),
        }
        outputs = self.model(**{**inputs, **texts}, **self._attention)
        log_probabilities = outputs.logits[:, length - 1 : -1].float().log_softmax(-1)
        of_tokens = log_probabilities.gather(2, padded[..., None])[..., 0] * mask
        # the positions at which the words were chosen, without the end of the text
        chosen = slice(length - 1, length - 1 + max(1, len(rows[0]) - (rows[0][-1] in ends)))
        return rows, of_tokens.double().sum(1).exp().tolist(), self._cross_attention(outputs, chosen)

    @property
    def _ends(self) -> set[int]:
        """The tokens that end a text."""
        ends = self.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])

    def _cross_attention(self, outputs: Any, chosen: slice) -> torch.Tensor | None:
        """The mean attention of the chosen positions of the first row, (tokens,)."""
        return (
            torch.stack([layer[0, :, chosen].float().mean((0, 1)) for layer in outputs.cross_attentions]).mean(0).cpu()
        )

    def rank(self, encoding: Encoding, labels: list[str], text: str | None = None) -> list[dict[str, Any]]:
        """
        Ranks labels and returns `{"label", "score", "share"}` of each, best first. `score` is the mean log-probability
        of the label's tokens. The shares are a softmax of the scores and sum to 1.
        """
        task = self.ranking_task
        inputs = self._inputs(encoding, task, text)
        candidates = dict(self.processor.prepare_candidates(labels, task=self._form_of_labels(task, inputs)))
        scores, indices = self._rank_on_gpu(inputs, candidates)
        shares = torch.tensor(scores).softmax(0).tolist()
        return [
            {"label": labels[index], "score": score, "share": share}
            for index, score, share in zip(indices, scores, shares)
        ]

    def _form_of_labels(self, task: Task, inputs: dict[str, Any]) -> str:
        """How labels follow the prompt: the `task` of `prepare_candidates`."""
        return task.name

    def _rank(self, inputs: dict[str, Any], candidates: dict[str, torch.Tensor]) -> tuple[list[float], list[int]]:
        candidates = {name: tensor.to(self.device) for name, tensor in candidates.items()}
        k = len(candidates["candidate_ids"])
        ranking = self.model.rank_candidates(**self._placed(inputs), **candidates, k=k)
        return ranking.scores[0].float().tolist(), ranking.indices[0].tolist()


def parse_labels(text: str) -> list[str]:
    """
    Splits labels at commas and new lines, and removes duplicates.

    Raises:
        Refused: if there are fewer than two labels, too many, or one that is too long.
    """
    text = as_text(text, "labels", MAX_LABEL_LETTERS)
    labels = list(dict.fromkeys(label.strip() for label in text.replace("\n", ",").split(",") if label.strip()))
    if len(labels) < 2:
        raise Refused("Please type at least two labels, separated by commas.")
    if len(labels) > MAX_LABELS:
        raise Refused(f"These are {len(labels)} labels; the limit is {MAX_LABELS}.")
    long = next((label for label in labels if len(label) > 60), None)
    if long is not None:
        raise Refused(f"The label “{long[:30]}…” is too long; the limit is 60 letters.")
    return labels


class _Watch(StoppingCriteria):
    """Hands over the best row of each step, and ends the generation when `stopped` is set."""

    def __init__(self) -> None:
        self.rows: Queue[torch.Tensor | None] = Queue()
        self.stopped = Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.rows.put(input_ids[0])
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)


def _sources(attentions: list[torch.Tensor], grids: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """
    Computes how much each latent holds of each place of each expert's map, from the resampler's attention
    (latents, tokens + latents) of each layer. It uses attention rollout (Abnar and Zuidema, 2020): half of a layer's
    output is its input.
    """
    if not attentions or not grids:
        return {}
    num_tokens = sum(height * width for height, width in grids.values())
    held = torch.zeros(len(attentions[0]), num_tokens)
    for attention in attentions:
        attention = attention.float().cpu()
        held = 0.5 * held + 0.5 * (attention[:, :num_tokens] + attention[:, num_tokens:] @ held)
    parts = held.split([height * width for height, width in grids.values()], dim=1)
    return {name: part.unflatten(1, grid) for (name, grid), part in zip(grids.items(), parts)}
