"""
`prismer check`: tests whether this installation reproduces the recorded outputs of the reference network.

assets/self_check has a small network with all six experts, its inputs and the recorded outputs. Each check runs a part
of the network on the given device and in the given dtype, and compares it with the recording.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers.utils import is_flash_attn_2_available, is_torch_flex_attn_available

from .modeling_prismer import PrismerForConditionalGeneration


RECORDING = Path(__file__).parent / "assets" / "self_check"
# The largest relative error that rounding explains. On a CPU the errors are up to 2e-6, 4e-3 and 3e-2.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


class NotAvailable(Exception):
    """A check cannot run on this machine, for the reason in the message."""


@dataclass
class CheckResult:
    """
    Args:
        name (`str`): name of the check.
        holds (`bool`, *optional*): whether the check passed; `None` if it cannot run on this machine.
        detail (`str`): the largest error and the tolerance, or the reason.
        seconds (`float`): duration of the check.
    """

    name: str
    holds: bool | None
    detail: str
    seconds: float


class SelfCheck:
    """
    The checks, each a method that returns its largest error or raises.

    Args:
        device (`str`): the device, such as `"cpu"` or `"cuda:0"`.
        dtype (`torch.dtype`): `torch.float32`, `torch.float16` or `torch.bfloat16`. Training runs on float32 weights,
            under autocast for the other two.

    Example:

    ```python
    >>> from modeling_prismer.self_check import SelfCheck

    >>> SelfCheck("cpu").encoder() < 1e-4
    True
    ```
    """

    def __init__(self, device: str, dtype: torch.dtype = torch.float32):
        if dtype not in TOLERANCES:
            raise ValueError(f"dtype is {dtype}; float32, float16 and bfloat16 are accepted")
        self.device, self.dtype, self.tolerance = torch.device(device), dtype, TOLERANCES[dtype]
        tensors = load_file(RECORDING / "recording.safetensors", device=str(self.device))
        self.recorded: dict[str, Any] = json.loads((RECORDING / "recording.json").read_text(encoding="utf-8"))
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, key = name.partition(".")
            groups.setdefault(group, {})[key] = tensor
        self.images, self.text, self.ranking_inputs, self.expected = (
            groups[group] for group in ("images", "text", "ranking", "expected")
        )
        self.model = self.load(dtype).eval()

    def load(self, dtype: torch.dtype) -> PrismerForConditionalGeneration:
        return PrismerForConditionalGeneration.from_pretrained(RECORDING, dtype=dtype).to(self.device)

    def run(self) -> Iterator[CheckResult]:
        """Runs all checks and yields their results one by one."""
        checks: dict[str, Callable[[], float]] = {
            "stems and painting": self.stems,
            "encoder": self.encoder,
            "encoder without an expert": self.encoder_without_an_expert,
            "logits and loss": self.loss,
            "gradients": self.gradients,
            "training step": self.training_step,
            "generation": self.generation,
            "ranking": self.ranking,
            "attention: eager": lambda: self.attention("eager"),
            "attention: sdpa": lambda: self.attention("sdpa"),
            "attention: flex_attention": lambda: self.attention("flex_attention"),
            "attention: flash_attention_2": lambda: self.attention("flash_attention_2"),
            "torch.compile": self.compiled,
        }
        for name, check in checks.items():
            start = time.perf_counter()
            try:
                with without_tf32():
                    error = check()
                holds, detail = error <= self.tolerance, f"error {error:.1e}, at most {self.tolerance:.0e}"
            except NotAvailable as reason:
                holds, detail = None, str(reason)
            except Exception as problem:  # the user must see every kind of error
                lines = str(problem).strip().splitlines()
                holds, detail = False, f"{type(problem).__name__}: {lines[0] if lines else ''}"
            yield CheckResult(name, holds, detail, time.perf_counter() - start)

    @torch.no_grad()
    def stems(self) -> float:
        seen: dict[str, torch.Tensor] = {}

        def record(name: str) -> Callable[..., None]:
            return lambda module, args, output: seen.update({name: output})

        stems = self.model.model.vision_model.expert_stems
        # the recording has each stem's output before the instance embedding
        hooks = [stem.projection.register_forward_hook(record(name)) for name, stem in stems.items()]
        try:
            self.model.get_image_features(**self.images)
        finally:
            for hook in hooks:
                hook.remove()
        return max(self.error(seen[name], f"stem_{name}") for name in stems)

    @torch.no_grad()
    def encoder(self) -> float:
        return self.error(self.model.get_image_features(**self.images).last_hidden_state, "encoder")

    @torch.no_grad()
    def encoder_without_an_expert(self) -> float:
        names = self.model.config.expert_names
        mask = torch.tensor([[name != "depth" for name in names]] * 3, device=self.device)
        images = {**self.images, "depth_values": torch.full_like(self.images["depth_values"], torch.nan)}
        encoded = self.model.get_image_features(**images, expert_mask=mask).last_hidden_state
        return self.error(encoded, "encoder_without_depth")

    @torch.no_grad()
    def loss(self) -> float:
        outputs = self.model(**self.text, **self.images)
        shown = self.text["attention_mask"].bool()
        logits = relative_error(outputs.logits[shown], self.expected["logits"][shown])
        return max(logits, self.error(outputs.loss_per_sample, "loss_per_sample"))

    def training_loss(self, model: PrismerForConditionalGeneration) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return model(**self.text, **self.images).loss

    def trainable_model(self) -> PrismerForConditionalGeneration:
        """The network in float32 and in training mode, without dropout, as in the recording."""
        model = self.load(torch.float32).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        return model

    def gradients(self) -> float:
        model = self.trainable_model()
        loss = self.training_loss(model)
        scale = 2.0**10 if self.dtype == torch.float16 else 1.0  # small gradients underflow in float16
        (loss * scale).backward()
        gradients = {name: parameter.grad / scale for name, parameter in model.named_parameters()}
        norms = torch.stack(
            [
                torch.cat([gradients[name].flatten() for name in names]).norm()
                for names in self.recorded["gradient_names"]
            ]
        )
        return max(self.error(norms, "gradient_norms"), self.error(loss[None], "train_loss"))

    def training_step(self) -> float:
        """Three steps of AdamW must lower the loss. Returns the error of the first loss."""
        model = self.trainable_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            loss = self.training_loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        if not losses[-1] < losses[0]:
            raise AssertionError(f"three steps of AdamW changed the loss from {losses[0]:.3f} to {losses[-1]:.3f}")
        return self.error(losses[0][None], "train_loss")

    @torch.no_grad()
    def generation(self) -> float:
        """
        In float32, the tokens must equal the recorded ones. In half precision, tokens with almost equal logits can
        differ. There, each greedy token must be the best one of an uncached forward pass, up to the returned error.
        """
        inputs = {"input_ids": self.ranking_inputs["prompt_ids"], "do_sample": False, **self.images}
        pad = self.model.config.pad_token_id
        if self.dtype == torch.float32:
            for name, settings in self.recorded["searches"].items():
                generated = self.model.generate(**inputs, **settings).tolist()
                for row, expected in zip(generated, self.recorded["generated"][name]):
                    row, expected = ([token for token in ids if token != pad] for ids in (row, expected))
                    if row != expected:
                        raise AssertionError(f"{name} generated {row}; recorded is {expected}")
            return 0.0
        generated = self.model.generate(**inputs, **self.recorded["searches"]["greedy"])
        mask = generated != pad
        logits = self.model(input_ids=generated, attention_mask=mask, **self.images).logits.float()
        start = inputs["input_ids"].shape[1]
        logits, chosen, shown = logits[:, start - 1 : -1], generated[:, start:, None], mask[:, start:]
        best = logits.amax(dim=-1)
        return ((best - logits.gather(-1, chosen)[..., 0]) / (1 + best.abs()))[shown].max().item()

    def ranking(self) -> float:
        inputs = {name: self.ranking_inputs[name] for name in ("input_ids", "attention_mask")}
        candidates = {name: self.ranking_inputs[name] for name in ("candidate_ids", "candidate_mask")}
        if self.dtype == torch.float32:
            indices = self.model.rank_candidates(**candidates, k=self.recorded["rank_k"], **inputs, **self.images)
            best = indices.indices[:, 0].tolist()
            if best != self.recorded["rank_best"]:
                raise AssertionError(f"the best candidates are {best}; recorded are {self.recorded['rank_best']}")
        every = self.model.rank_candidates(**candidates, k=len(candidates["candidate_ids"]), **inputs, **self.images)
        errors = []
        # The reference uses wrong positions for a padded question, so its second row is not compared.
        for row in (0, 2):
            scores = dict(zip(every.indices[row].tolist(), every.scores[row].tolist()))
            for candidate, score in self.recorded["rank_scores"][row].items():
                errors.append(abs(scores[int(candidate)] - score) / abs(score))
        return max(errors)

    def attention(self, implementation: str) -> float:
        if implementation == "flex_attention" and not (self.device.type == "cuda" and is_torch_flex_attn_available()):
            raise NotAvailable("needs a GPU and a torch with flex_attention")
        if implementation == "flash_attention_2":
            if self.device.type != "cuda" or not is_flash_attn_2_available():
                raise NotAvailable("needs a GPU and the package flash-attn")
            if self.dtype == torch.float32:
                raise NotAvailable("needs --dtype float16 or bfloat16")
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(implementation)
        try:
            return max(self.encoder(), self.encoder_without_an_expert(), self.loss(), self.generation())
        finally:
            self.model.set_attn_implementation(before)

    @torch.no_grad()
    def compiled(self) -> float:
        """Compiles the decoder as one graph and runs it on the encoded images."""
        encoded = self.model.get_image_features(**self.images)
        text = {name: self.text[name] for name in ("input_ids", "attention_mask")}
        forward = torch.compile(self.model.forward, fullgraph=True, dynamic=False)
        try:
            logits = forward(**text, encoder_outputs=encoded.last_hidden_state, use_cache=False).logits
        except torch._inductor.exc.InvalidCxxCompiler as error:
            raise NotAvailable("needs a C++ compiler") from error
        finally:
            torch.compiler.reset()
        shown = self.text["attention_mask"].bool()
        return relative_error(logits[shown], self.expected["logits"][shown])

    def error(self, actual: torch.Tensor, name: str) -> float:
        return relative_error(actual, self.expected[name])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`|actual - expected| / |expected|` with Euclidean norms; infinite if a value is not finite."""
    if actual.shape != expected.shape:
        raise AssertionError(f"the shape is {tuple(actual.shape)}; recorded is {tuple(expected.shape)}")
    error = ((actual.float() - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf


@contextmanager
def without_tf32() -> Iterator[None]:
    """Disables TensorFloat-32, which by default rounds the inputs of float32 convolutions on a GPU to 10 bits."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
