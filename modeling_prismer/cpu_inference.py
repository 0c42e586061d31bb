"""
Faster inference in float32 on a CPU. [`optimize_for_cpu`] replaces the classes of some modules by those in this file.
They have the same weights and return the same values. The network does not depend on this file.
"""

from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .layers import PrismerAttention, PrismerMLP, PrismerQuickGELU


ModelType = TypeVar("ModelType", bound=PreTrainedModel)

# The linear layer of oneDNN, which torch.compile uses on a CPU; `None` if torch was built without oneDNN or MKL.
_onednn_linear: Any = None
if torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available():
    _onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _is_plain_inference(hidden_states: torch.Tensor) -> bool:
    return (
        hidden_states.device.type == "cpu"
        and hidden_states.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _are_linear(*modules: nn.Module) -> bool:
    """Whether the modules are plain linear layers, so that their weights can be used without calling them."""
    return all(
        type(module) is CpuLinear and "forward" not in vars(module) and type(module.weight) is nn.Parameter
        for module in modules
    )


class _UndoneByTraining(nn.Module):
    """Restores the original class of the module when it is trained."""

    def train(self, mode: bool = True) -> "_UndoneByTraining":
        if not mode:
            return super().train(mode)
        self.__class__ = type(self).__bases__[1]
        return self.train(mode)


class CpuLinear(_UndoneByTraining, nn.Linear):
    """
    A linear layer that uses oneDNN. torch uses MKL, which is slow for few rows, as when decoding a caption. On AMD
    processors, MKL is slower for any number of rows.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        is_quantised = type(self.weight) is not nn.Parameter
        if is_quantised or _onednn_linear is None or not _is_plain_inference(input):
            return super().forward(input)
        return _onednn_linear(input, self.weight, self.bias, "none", [], "")


class CpuMLP(_UndoneByTraining, PrismerMLP):
    """Computes long rows one by one, so that activations stay in the CPU cache, and fuses QuickGELU with fc1."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if _is_plain_inference(hidden_states) and len(hidden_states) > 1 and hidden_states.shape[1] >= 256:
            return torch.cat([self.forward_rows(row) for row in hidden_states.split(1)])
        return self.forward_rows(hidden_states)

    def forward_rows(self, hidden_states: torch.Tensor) -> torch.Tensor:
        is_quick_gelu = type(self.activation) is PrismerQuickGELU
        if _onednn_linear is None or not is_quick_gelu or not _is_plain_inference(hidden_states):
            return super().forward(hidden_states)
        if not _are_linear(self.fc1, self.fc2):
            return super().forward(hidden_states)
        # swish of oneDNN is `x · sigmoid(x)`, so the factor of QuickGELU is applied to the input and the output
        inner = _onednn_linear(hidden_states * 1.702, self.fc1.weight, self.fc1.bias * 1.702, "swish", [], "")
        output = _onednn_linear(inner, self.fc2.weight, None, "none", [], "")
        return torch.add(self.fc2.bias, output, alpha=1 / 1.702, out=output)


class CpuAttention(_UndoneByTraining, PrismerAttention):
    """Attention that does not compute keys and values if few queries attend to many states."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        keys_values: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if (
            keys_values is None
            and states is not None
            and self.config._attn_implementation == "sdpa"
            and _is_plain_inference(states)
            and _are_linear(self.k_proj, self.v_proj)
            and hidden_states.shape[:2].numel() // states.shape[0] < self.head_dim
        ):
            return self.attend_without_keys(hidden_states, states, attention_mask), None
        return super().forward(hidden_states, attention_mask, keys_values, cache, states, **kwargs)

    def attend_without_keys(
        self, hidden_states: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Attention of few queries to many states, without computing keys and values of all states. With
        `k = W_k s + b_k`, the score `q·k` is `(W_kᵀ q)·s + q·b_k`, and the weighted sum of values is `W_v` times that
        of states. DeepSeek-V2 absorbs projections in the same way (arXiv 2405.04434, 2.1.2).

        Args:
            hidden_states (`torch.FloatTensor` of shape `(rows, length, hidden_size)`)
            states (`torch.FloatTensor` of shape `(images, num_states, key_value_size)`)
            attention_mask (`torch.Tensor` of shape `(images, 1, queries, num_states)`, *optional*): for `sdpa`.

        Returns:
            `torch.FloatTensor` of shape `(rows, length, hidden_size)`.
        """
        query = (self.q_proj(hidden_states) * self.scaling).view(states.shape[0], -1, self.config.hidden_size)
        query = self.split_heads(query)  # (images, heads, queries, head_dim)
        heads, queries = query.shape[1:3]
        key_weight, key_bias, value_weight, value_bias = (
            weight.unflatten(0, (heads, -1))
            for projection in (self.k_proj, self.v_proj)
            for weight in (projection.weight, projection.bias)
        )
        bias = torch.einsum("bhqd,hd->bhq", query, key_bias).flatten(1)[..., None]
        query = torch.einsum("bhqd,hdc->bhqc", query, key_weight).flatten(1, 2)
        scores = torch.baddbmm(bias, query, states.transpose(1, 2))  # (images, heads * queries, num_states)
        if attention_mask is not None:
            scores = scores.unflatten(1, (heads, queries))
            if attention_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attention_mask, -torch.inf).flatten(1, 2)
            else:
                scores = (scores + attention_mask).flatten(1, 2)
        weights = F.dropout(F.softmax(scores, dim=-1), p=self.dropout, training=self.training)
        output = torch.einsum("bhqc,hdc->bqhd", (weights @ states).unflatten(1, (heads, queries)), value_weight)
        total = weights.sum(dim=-1).unflatten(1, (heads, queries)).transpose(1, 2)[..., None]  # dropout changes it
        return self.out_proj((output + total * value_bias).reshape(hidden_states.shape))


_FASTER = {nn.Linear: CpuLinear, PrismerMLP: CpuMLP, PrismerAttention: CpuAttention}


def optimize_for_cpu(model: ModelType) -> ModelType:
    """
    Makes inference in float32 on a CPU faster. Results stay equal up to rounding. `model.train()` undoes it.

    While it is active, forward hooks on modules inside an MLP or an attention may not be called.

    Args:
        model ([`PrismerForConditionalGeneration`] or [`PrismerModel`]):
            The model, in float32 on a CPU. It is set to evaluation mode.

    Returns:
        The same model.

    Raises:
        ValueError: if a floating point weight is not float32 on a CPU.

    Example:

    ```python
    >>> from modeling_prismer import optimize_for_cpu

    >>> model = optimize_for_cpu(model.float())
    >>> generated = model.generate(**processor(images=image, text="What color is the shape?"))
    ```
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or (parameter.is_floating_point() and parameter.dtype != torch.float32):
            raise ValueError(
                f"{name} is {parameter.dtype} on {parameter.device}; optimize_for_cpu needs float32 on a CPU"
            )
    model.eval()
    for module in model.modules():
        if type(module) in _FASTER:
            module.__class__ = _FASTER[type(module)]
    return model
