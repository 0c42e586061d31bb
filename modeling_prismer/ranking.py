"""Ranking of given answers or labels for images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .cache import CACHE_NAME, repeat_cache
from .configuration_prismer import PrismerConfig
from .loss import sample_losses


@dataclass
class PrismerRankingOutput(ModelOutput):
    """
    What [`PrismerForConditionalGeneration.rank_candidates`] returns.

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, k)`):
            Mean log-probability of each candidate's tokens (label-smoothed), best first.
        indices (`torch.LongTensor` of shape `(batch_size, k)`):
            Which candidates these are.

    Example:

    ```python
    >>> inputs = processor(images=image, text="What shape is in the image?")
    >>> ranking = model.rank_candidates(**processor.prepare_candidates(["circle", "triangle"]), k=2, **inputs)
    >>> ranking.scores.shape, ranking.indices.tolist()
    (torch.Size([1, 2]), [[1, 0]])
    ```
    """

    scores: torch.FloatTensor | None = None
    indices: torch.LongTensor | None = None


class RankingMixin:
    """Gives a model with a language modelling head `rank_candidates` and `classify`."""

    if TYPE_CHECKING:
        config: PrismerConfig
        model: nn.Module
        lm_head: nn.Module
        device: torch.device

    def logits_and_outputs(
        self, select: Callable[[torch.Tensor], torch.Tensor], **inputs: Any
    ) -> tuple[torch.Tensor, ModelOutput]:
        """Runs the model and its head, at the positions that `select` takes out of `(rows, length, …)`."""
        outputs = self.model(**inputs, use_cache=True, return_dict=True)
        return self.lm_head(select(outputs.last_hidden_state)), outputs

    def after_prompt(self, outputs: ModelOutput, repeats: int) -> dict[str, Any]:
        """The inputs with which every row of a prompt is continued `repeats` times."""
        return {CACHE_NAME: repeat_cache(getattr(outputs, CACHE_NAME), repeats, self.config.text_config)}

    @torch.no_grad()
    def rank_candidates(
        self,
        candidate_ids: torch.Tensor,
        candidate_mask: torch.Tensor,
        k: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_outputs: ModelOutput | None = None,
        chunk_size: int = 128,
        **image_inputs: Any,
    ) -> PrismerRankingOutput:
        r"""
        Ranks given answers (or class names) for each image, as the paper does for VQA (k=16) and classification
        (k=32): the `k` candidates whose first token is most probable are scored by the mean log-probability of their
        tokens. The prompt is run once, and all candidates share its cache.

        Args:
            candidate_ids (`torch.LongTensor` of shape `(num_candidates, length)`):
                The candidates, each closed by `</s>`, padded on the right; `processor.prepare_candidates` makes them.
            candidate_mask (`torch.Tensor` of shape `(num_candidates, length)`):
                0 for padding.
            k (`int`):
                How many candidates to score for each row; more than there are is taken as all.
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
                The prompts, padded on either side.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*):
                0 for padding; left out, what is not `pad_token_id` counts.
            encoder_outputs (`ModelOutput`, *optional*):
                Images encoded before; else the image inputs of [`PrismerModel.forward`] are given.
            chunk_size (`int`, *optional*, defaults to 128):
                How many candidates are run at a time (over all rows), which bounds the memory.

        Returns:
            [`PrismerRankingOutput`] with `scores` and `indices` of shape `(batch_size, k)`, best first.

        Raises:
            ValueError: if `k` or `chunk_size` is below 1, if there are no candidates, or they have not one mask entry
                for each token, or are not padded on the right; if a candidate or a prompt is empty.

        Example:

        ```python
        >>> inputs = processor(images=image, text="What shape is in the image?")
        >>> candidates = processor.prepare_candidates(["circle", "rectangle", "triangle"])
        >>> model.rank_candidates(**candidates, k=2, **inputs).indices[:, 0].tolist()
        [2]
        ```
        """
        if k < 1 or chunk_size < 1:
            raise ValueError(f"k={k}, chunk_size={chunk_size}; both must be at least 1")
        candidate_mask = candidate_mask.bool()
        if (
            candidate_ids.shape != candidate_mask.shape
            or candidate_ids.ndim != 2
            or not candidate_ids.numel()
            or not candidate_mask[:, 0].all()
            or (candidate_mask[:, 1:] & ~candidate_mask[:, :-1]).any()
        ):
            raise ValueError(
                f"candidate_ids {tuple(candidate_ids.shape)} and candidate_mask {tuple(candidate_mask.shape)} must "
                "both be (num_candidates, length), at least one, padded on the right, and no candidate empty"
            )
        rows, prompt_length = input_ids.shape
        k = min(k, candidate_ids.shape[0])
        candidate_ids, candidate_mask = candidate_ids.to(input_ids.device), candidate_mask.to(input_ids.device)
        if attention_mask is None:
            attention_mask = input_ids.ne(self.config.pad_token_id)
        attention_mask = attention_mask.long()
        if not attention_mask.any(dim=-1).all():
            raise ValueError("a row of input_ids is all padding; a prompt has at least one token")

        last = (attention_mask * torch.arange(prompt_length, device=input_ids.device)).argmax(dim=-1)
        if encoder_outputs is not None:
            image_inputs["encoder_outputs"] = encoder_outputs
        first_logits, prompt = self.logits_and_outputs(
            lambda states: states[torch.arange(rows, device=states.device), last.to(states.device)],
            input_ids=input_ids,
            attention_mask=attention_mask,
            **image_inputs,
        )
        first_logits = first_logits.to(input_ids.device)
        first_probs = first_logits.float().softmax(dim=-1)
        # (rows, k); of equally probable ones, such as those with the same first token, the first
        chosen = first_probs[:, candidate_ids[:, 0]].sort(dim=-1, descending=True, stable=True).indices[:, :k]

        scores = []
        for indices in chosen.split(max(1, chunk_size // rows), dim=1):
            each = indices.shape[1]  # candidates of each row in this chunk
            ids, mask = candidate_ids[indices.flatten()], candidate_mask[indices.flatten()]
            lengths = mask.sum(dim=-1)
            ids, mask = ids[:, : lengths.max()], mask[:, : lengths.max()]  # (rows * each, length)
            losses = sample_losses(
                first_logits.repeat_interleave(each, dim=0)[:, None], ids[:, :1], self.config.label_smoothing
            )
            if ids.shape[1] > 1:
                learned = mask[:, 1:]
                logits, _ = self.logits_and_outputs(
                    lambda states, learned=learned: states[learned.to(states.device)],
                    input_ids=ids[:, :-1],
                    attention_mask=torch.cat([attention_mask.repeat_interleave(each, dim=0), mask[:, :-1]], dim=1),
                    **self.after_prompt(prompt, each),
                )
                logits = logits.to(input_ids.device)  # (number of tokens, vocab)
                token_losses = sample_losses(
                    logits[:, None], ids[:, 1:][mask[:, 1:]][:, None], self.config.label_smoothing
                )
                losses = losses + torch.zeros_like(mask[:, 1:], dtype=losses.dtype).masked_scatter(
                    mask[:, 1:], token_losses
                ).sum(dim=-1)
            scores.append((-losses / lengths).view(rows, each))
        scores, order = torch.cat(scores, dim=1).sort(dim=-1, descending=True, stable=True)
        return PrismerRankingOutput(scores=scores, indices=chosen.gather(1, order))

    def classify(
        self, processor: Any, images: Any, labels: list[str], text: str | list[str] | None = None, **kwargs: Any
    ) -> list[list[dict[str, Any]]]:
        r"""
        Ranks labels of your own for pictures: zero-shot classification in one call. The experts see the pictures, and
        each label's score is the mean log-probability of its tokens after the prompt; see `rank_candidates`.

        Args:
            processor ([`PrismerProcessor`]):
                Of the same checkpoint.
            images:
                One or many pictures: paths, URLs, PIL images, arrays, tensors.
            labels (`list[str]`):
                The labels to choose from.
            text (`str` or `list[str]`, *optional*):
                The question, or the beginning of the sentence that a label ends; left out, the prompt of the
                checkpoint's task. A checkpoint for questions needs one.
            kwargs:
                Passed on to the processor, such as `expert_labels` or `task`.

        Returns:
            `list[list[dict]]`: for each picture (or each question) `{"label": …, "score": …}` of every label, best
            first.

        Raises:
            ValueError: as the processor does, and if there are no labels, or an empty one.

        Example:

        ```python
        >>> ranking = model.classify(processor, image, ["circle", "triangle"], text="What shape is in the image?")
        >>> [choice["label"] for choice in ranking[0]]
        ['triangle', 'circle']
        ```
        """
        inputs = processor(images=images, text=text, return_tensors="pt", **kwargs).to(self.device)
        task = kwargs.get("task") or processor.task_for(text)
        candidates = processor.prepare_candidates(labels, task=task).to(self.device)
        ranking = self.rank_candidates(**candidates, k=len(labels), **inputs)
        return processor.post_process_ranking(ranking, labels)
