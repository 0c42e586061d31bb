"""Models that write by `generate`: their answers, and the probabilities of given answers."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm
from transformers import BatchFeature, LogitsProcessor, LogitsProcessorList

from .models import Model, Query


T = TypeVar("T")


def batches(items: Sequence[T], size: int, what: str) -> Iterator[Sequence[T]]:
    for start in tqdm(range(0, len(items), size), desc=what, leave=False):
        yield items[start : start + size]


class Forced(LogitsProcessor):
    """
    Makes `generate` write given tokens. Its raw logits are then those of the tokens, in any architecture, with its own
    positions and masks.

    Args:
        tokens (`list[list[int]]`): the tokens of each row.
        padding (`int`): the token of rows that have ended.
    """

    def __init__(self, tokens: list[list[int]], padding: int):
        self.tokens = tokens
        self.padding = padding
        self.step = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = [own[self.step] if self.step < len(own) else self.padding for own in self.tokens]
        self.step += 1
        places = torch.tensor(forced, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, places, 0.0)


class GenerativeModel(Model):
    """A model of transformers that writes."""

    tokenizer: Any
    separator: str = ""  # between a prompt and its answer
    max_batch_size: int | None = None

    @abstractmethod
    def prepare(self, queries: Sequence[Query]) -> BatchFeature:
        """The inputs of `generate`, padded on the left."""

    @property
    def batch_size(self) -> int:
        return self.max_batch_size or self.args.batch_size

    def generate(self, inputs: BatchFeature, **settings: Any) -> Any:
        with torch.inference_mode():
            return self.network.generate(
                **inputs.to(self.network.device, self.network.dtype), do_sample=False, **settings
            )

    def answer(self, queries: Sequence[Query], max_new_tokens: int) -> list[str]:
        texts: list[str] = []
        for batch in batches(queries, self.batch_size, "generating"):
            inputs = self.prepare(batch)
            generated = self.generate(inputs, max_new_tokens=max_new_tokens, num_beams=self.args.num_beams or 1)
            generated = without_prompt(generated, inputs["input_ids"])
            texts += self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [(text.strip().splitlines() or [""])[0].strip() for text in texts]

    def rank(self, queries: Sequence[Query], candidates: Sequence[str]) -> np.ndarray:
        """The mean log-probability of each candidate's tokens, with the tokenizer's end of a text."""
        tokens = [self.candidate_tokens(candidate) for candidate in candidates]
        scores = np.empty((len(queries), len(candidates)))
        for batch in batches(list(product(range(len(queries)), range(len(tokens)))), self.batch_size, "ranking"):
            own = [tokens[column] for _, column in batch]
            inputs = self.prepare([queries[row] for row, _ in batch])
            settings = {"max_new_tokens": max(map(len, own)), "num_beams": 1, "output_logits": True}
            forced = Forced(own, self.padding)
            output = self.generate(
                inputs, logits_processor=LogitsProcessorList([forced]), return_dict_in_generate=True, **settings
            )
            logs = torch.stack(output.logits, dim=1).float().log_softmax(dim=-1)  # (rows, steps, vocabulary)
            for number, (place, ids) in enumerate(zip(batch, own)):
                steps = torch.arange(len(ids), device=logs.device)
                scores[place] = logs[number, steps, torch.tensor(ids, device=logs.device)].mean().item()
        return scores

    @property
    def padding(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def candidate_tokens(self, candidate: str) -> list[int]:
        ids = self.tokenizer(f"{self.separator}{candidate}", add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids if end is None else [*ids, end]


def without_prompt(generated: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """The generated tokens. Some architectures return them after the prompt, others alone."""
    length = input_ids.shape[1]
    if generated.shape[1] >= length and torch.equal(generated[:, :length], input_ids.to(generated.device)):
        return generated[:, length:]
    return generated
