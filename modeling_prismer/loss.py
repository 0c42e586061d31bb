"""The loss of a sample: cross-entropy with label smoothing, summed over its tokens."""

import torch
from torch.nn import functional as F


def sample_losses(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """
    Cross-entropy with label smoothing, summed over the tokens of each sample.

    Args:
        logits (`torch.FloatTensor` of shape `(batch_size, length, vocab_size)`)
        labels (`torch.LongTensor` of shape `(batch_size, length)`): the token that each position should predict. -100
            is ignored.

    Returns:
        `torch.FloatTensor` of shape `(batch_size,)`, in float32.
    """
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        labels.to(logits.device).flatten(),
        ignore_index=-100,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return losses.view(labels.shape).sum(dim=-1)
