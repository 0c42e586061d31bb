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
    Output of [`PrismerForConditionalGeneration.rank_candidates`].

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, k)`):
            Mean log-probability of each candidate's tokens (label-smoothed), best first.
        indices (`torch.LongTensor` of shape `(batch_size, k)`):
            The candidate of each score.

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
        """Runs the model, and its head at the positions that `select` takes from `(rows, length, hidden_size)`."""
        outputs = self.model(**inputs, use_cache=True, return_dict=True)
        return self.lm_head(select(outputs.last_hidden_state)), outputs

    def after_prompt(self, outputs: ModelOutput, repeats: int) -> dict[str, Any]:
        """The inputs that continue every row of a prompt `repeats` times."""
        return {CACHE_NAME: repeat_cache(getattr(outputs, CACHE_NAME), repeats, self.config.text_config)}

    def check_candidates(
        self,
        candidate_ids: torch.Tensor,
        candidate_mask: torch.Tensor,
        k: int,
        attention_mask: torch.Tensor,
        chunk_size: int,
    ) -> None:
        """Arguments as in `rank_candidates`, which says what is an error."""
        if k < 1 or chunk_size < 1:
            raise ValueError(f"k={k}, chunk_size={chunk_size}; both must be at least 1")
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
        if not attention_mask.any(dim=-1).all():
            raise ValueError("a row of input_ids is all padding; a prompt has at least one token")

    def score_candidates(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        repeats: int,
        first_logits: torch.Tensor,
        attention_mask: torch.Tensor,
        prompt: ModelOutput,
    ) -> torch.Tensor:
        """
        The mean log-probability of each candidate's tokens: `(rows * repeats,)`.

        Args:
            ids, mask (`torch.Tensor` of shape `(rows * repeats, length)`): candidates of the same row are adjacent.
            repeats (`int`): candidates of each row.
            first_logits (`torch.FloatTensor` of shape `(rows, vocab_size)`): the scores of the first tokens.
            attention_mask (`torch.Tensor` of shape `(rows, prompt_length)`): that of the prompts.
            prompt (`ModelOutput`): the model's output for the prompts.
        """
        smoothing, scored = self.config.label_smoothing, mask[:, 1:]
        losses = sample_losses(first_logits.repeat_interleave(repeats, dim=0)[:, None], ids[:, :1], smoothing)
        if ids.shape[1] > 1:
            logits, _ = self.logits_and_outputs(
                lambda states: states[scored.to(states.device)],
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([attention_mask.repeat_interleave(repeats, dim=0), mask[:, :-1]], dim=1),
                **self.after_prompt(prompt, repeats),
            )
            logits = logits.to(ids.device)  # (number of tokens, vocab_size)
            token_losses = sample_losses(logits[:, None], ids[:, 1:][scored][:, None], smoothing)
            zeros = torch.zeros_like(scored, dtype=losses.dtype)
            losses = losses + zeros.masked_scatter(scored, token_losses).sum(dim=-1)
        return -losses / mask.sum(dim=-1)

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
        Ranks given answers or class names for each image, as the paper does for VQA (k=16) and classification (k=32).
        The `k` candidates with the most probable first token are scored by the mean log-probability of their tokens.
        The prompt runs once, and all candidates share its cache.

        Args:
            candidate_ids (`torch.LongTensor` of shape `(num_candidates, length)`):
                The candidates from `processor.prepare_candidates`. Each ends with `</s>` and is padded on the right.
            candidate_mask (`torch.Tensor` of shape `(num_candidates, length)`):
                0 for padding.
            k (`int`):
                Number of candidates to score for each row, at most all.
            input_ids (`torch.LongTensor` of shape `(batch_size, prompt_length)`):
                The prompts, padded on either side.
            attention_mask (`torch.Tensor` of shape `(batch_size, prompt_length)`, *optional*):
                0 for padding. By default, `pad_token_id` is padding.
            encoder_outputs (`ModelOutput`, *optional*):
                Encoded images, in place of the image inputs of [`PrismerModel.forward`].
            chunk_size (`int`, *optional*, defaults to 128):
                Number of candidates that run together, over all rows. It limits the memory.
            image_inputs:
                The image inputs of [`PrismerModel.forward`].

        Returns:
            [`PrismerRankingOutput`] with `scores` and `indices` of shape `(batch_size, k)`, best first.

        Raises:
            ValueError: if `k` or `chunk_size` is below 1, if there are no candidates, if `candidate_mask` does not fit
                them or is not 0 on the right only, or if a candidate or a prompt is empty.

        Example:

        ```python
        >>> inputs = processor(images=image, text="What shape is in the image?")
        >>> candidates = processor.prepare_candidates(["circle", "rectangle", "triangle"])
        >>> model.rank_candidates(**candidates, k=2, **inputs).indices[:, 0].tolist()
        [2]
        ```
        """
        if attention_mask is None:
            pad_token_id = self.config.get_text_config(decoder=True).pad_token_id
            attention_mask = torch.ones_like(input_ids) if pad_token_id is None else input_ids.ne(pad_token_id)
        attention_mask, candidate_mask = attention_mask.long(), candidate_mask.bool()
        self.check_candidates(candidate_ids, candidate_mask, k, attention_mask, chunk_size)
        rows, prompt_length = input_ids.shape
        k = min(k, candidate_ids.shape[0])
        candidate_ids, candidate_mask = candidate_ids.to(input_ids.device), candidate_mask.to(input_ids.device)
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
        # (rows, k); a stable sort keeps the order of candidates with the same first token
        chosen = first_probs[:, candidate_ids[:, 0]].sort(dim=-1, descending=True, stable=True).indices[:, :k]

        scores = []
        for indices in chosen.split(max(1, chunk_size // rows), dim=1):
            each = indices.shape[1]  # candidates of each row in this chunk
            ids, mask = candidate_ids[indices.flatten()], candidate_mask[indices.flatten()]  # (rows * each, length)
            longest = mask.sum(dim=-1).max()
            chunk_scores = self.score_candidates(
                ids[:, :longest], mask[:, :longest], each, first_logits, attention_mask, prompt
            )
            scores.append(chunk_scores.view(rows, each))
        scores, order = torch.cat(scores, dim=1).sort(dim=-1, descending=True, stable=True)
        return PrismerRankingOutput(scores=scores, indices=chosen.gather(1, order))

    def classify(
        self, processor: Any, images: Any, labels: list[str], text: str | list[str] | None = None, **kwargs: Any
    ) -> list[list[dict[str, Any]]]:
        r"""
        Ranks your own labels for images: zero-shot classification in one call. The experts run on the images. The
        score of a label is the mean log-probability of its tokens after the prompt; see `rank_candidates`.

        Args:
            processor ([`PrismerProcessor`]):
                The processor of the same checkpoint.
            images:
                One or many images: paths, URLs, PIL images, arrays, tensors.
            labels (`list[str]`):
                The labels to choose from.
            text (`str` or `list[str]`, *optional*):
                The question, or the beginning of the sentence that a label ends. By default the prompt of the
                checkpoint's task; a checkpoint for questions needs a text.
            kwargs:
                Arguments of the processor, such as `expert_labels` or `task`.

        Returns:
            `list[list[dict]]`: for each image or question, `{"label": …, "score": …}` of every label, best first.

        Raises:
            ValueError: if the processor refuses an input, or if there are no labels, or an empty one.

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
