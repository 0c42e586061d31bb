"""
The baseline of SMART-101: an image encoder and BERT, and a head for each puzzle that predicts the value of the answer.

| part | network |
| --- | --- |
| image | ResNet, pooled; or frozen vision encoders, whose patch features lie side by side in channels on one grid |
| image head | an MLP for each puzzle, of width 128; the mean over patches |
| question | frozen BERT, a GRU in both directions of width 256, its mean, 128 features |
| fusion | an MLP of two layers |
| answer head | an MLP for each puzzle, or an LSTM of ten steps for sequences |

Each channel of the patch features is brought to mean 0 and variance 1, because those of frozen encoders may
hardly differ between images.

With shared heads (PS), all puzzles have the same ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils import ModelOutput

from modeling_prismer import PrismerImageProcessor
from modeling_prismer.image_features import is_trained, num_channels, patch_features, pixel_names, resize_grid
from modeling_prismer.lm_backbones import load_encoders
from modeling_prismer.processing.encoder_settings import read_encoder_settings

from .answers import MAX_LENGTH


NOT_LEARNED = -100
SHARED = "shared"


class SmartReasonerConfig(PreTrainedConfig):
    """
    Args:
        vision_configs (`list[dict]`): configurations of the image encoders.
        language_config (`dict`): configuration of the language encoder.
        image_settings (`list[dict]`): size, mean and standard deviation of each encoder's images.
        classes (`dict[str, int]`): for each head, the number of values; `"shared"` is that of all puzzles.
        sequences (`list[str]`): the heads for sequences.
        width (`int`): features of image, question and fusion.
        question_width (`int`): width of the GRU, in each direction.
    """

    model_type = "smart_reasoner"

    def __init__(
        self,
        vision_configs: list[dict[str, Any]] | None = None,
        language_config: dict[str, Any] | None = None,
        image_settings: list[dict[str, Any]] | None = None,
        classes: dict[str, int] | None = None,
        sequences: list[str] | None = None,
        width: int = 128,
        question_width: int = 256,
        **kwargs: Any,
    ):
        self.vision_configs = vision_configs or []
        self.language_config = language_config or {}
        self.image_settings = image_settings or []
        self.classes = classes or {}
        self.sequences = sequences or []
        self.width = width
        self.question_width = question_width
        super().__init__(**kwargs)


@dataclass
class SmartReasonerOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*): cross-entropy, a mean over instances.
        values (`torch.LongTensor` of shape `(batch_size, 10)`): predicted values; −100 after a single integer.
    """

    loss: torch.FloatTensor | None = None
    values: torch.LongTensor | None = None


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:]):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class SequenceHead(nn.Module):
    """An LSTM that gets the same features at each of ten steps."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.output = nn.Linear(width, classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(batch, width)` to `(batch, 10, classes)`."""
        states, _ = self.lstm(features[:, None].expand(-1, MAX_LENGTH, -1))
        return self.output(states)


class SmartReasoner(PreTrainedModel):
    """
    The network.

    Args:
        config ([`SmartReasonerConfig`]): the configuration.
        encoders, language: loaded backbones, in place of untrained ones.
    """

    config_class = SmartReasonerConfig
    main_input_name = "pixel_values"

    def __init__(
        self,
        config: SmartReasonerConfig,
        encoders: list[PreTrainedModel] | None = None,
        language: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        for backbone in (*(encoders or ()), *([language] if language else ())):
            for module in backbone.modules():
                module._is_hf_initialized = True  # or loaded weights would be drawn again
        if encoders is None:
            encoders = [_untrained(settings) for settings in config.vision_configs]
        self.encoders = nn.ModuleList(encoders)
        self.language = _untrained(config.language_config) if language is None else language
        width = config.width
        channels = sum(_channels(encoder) for encoder in self.encoders)
        self.norms = nn.ModuleList(
            [
                nn.Identity() if _is_convolutional(encoder) else nn.BatchNorm1d(_channels(encoder), affine=False)
                for encoder in self.encoders
            ]
        )
        self.image_heads = nn.ModuleDict({name: mlp(channels, width, width) for name in config.classes})
        self.question_gru = nn.GRU(
            self.language.config.hidden_size, config.question_width, batch_first=True, bidirectional=True
        )
        self.question_output = nn.Linear(2 * config.question_width, width)
        self.fusion = nn.Sequential(mlp(2 * width, width, width), nn.ReLU())
        self.answer_heads = nn.ModuleDict(
            {
                name: SequenceHead(width, number) if name in config.sequences else mlp(width, width, width, number)
                for name, number in config.classes.items()
            }
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Layers keep the weights that torch gives them, which suit narrow networks."""

    @classmethod
    def from_backbones(
        cls,
        vision: list[str],
        language: str,
        classes: dict[str, int],
        sequences: list[str],
        image_size: int | None = None,
    ) -> "SmartReasoner":
        """
        Makes a reasoner on backbones from the Hub or from folders.

        Args:
            vision (`list[str]`): one or several image encoders.
            language (`str`): a BERT.
            classes (`dict[str, int]`), sequences (`list[str]`): as in [`SmartReasonerConfig`].
            image_size (`int`, *optional*): side of the images, by default that of each encoder.
        """
        encoders, text = load_encoders(vision), AutoModel.from_pretrained(language)
        settings = []
        for source, encoder in zip(vision, encoders):
            found = read_encoder_settings(source, encoder.config)
            settings.append(found | ({"size": {"height": image_size, "width": image_size}} if image_size else {}))
        config = SmartReasonerConfig(
            [encoder.config.to_dict() for encoder in encoders], text.config.to_dict(), settings, classes, sequences
        )
        return cls(config, encoders, text)

    def freeze_backbones(self, vision: bool, language: bool) -> None:
        self.encoders.requires_grad_(not vision)
        self.language.requires_grad_(not language)

    def train(self, mode: bool = True) -> "SmartReasoner":
        """Frozen backbones stay in evaluation mode: no dropout, and their BatchNorm statistics do not change."""
        super().train(mode)
        for backbone in (*self.encoders, self.language):
            backbone.train(mode and is_trained(backbone))
        return self

    def encode_images(self, pixels: list[torch.Tensor]) -> torch.Tensor:
        """Features of the encoders side by side: `(batch, patches, channels)`."""
        features = []
        for encoder, norm, own in zip(self.encoders, self.norms, pixels):
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(encoder)):
                if _is_convolutional(encoder):
                    found = encoder(own).pooler_output.flatten(1)[:, None]
                else:
                    found = patch_features(encoder, own)
            features.append(norm(found.transpose(1, 2)).transpose(1, 2))
        side = max(int(own.shape[1] ** 0.5) for own in features)
        return torch.cat([resize_grid(own, (side, side)) for own in features], dim=-1)

    def encode_questions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(batch, width)`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained(self.language)):
            words = self.language(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        lengths = attention_mask.sum(dim=1)
        packed = pack_padded_sequence(words, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.question_gru(packed)[0], batch_first=True)  # zeros after the end
        return self.question_output(states.sum(dim=1) / lengths[:, None])

    def _groups(self, puzzles: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The heads that a batch needs, with the places of their instances."""
        if SHARED in self.config.classes:
            yield SHARED, torch.arange(len(puzzles), device=puzzles.device)
            return
        for number in puzzles.unique().tolist():
            if str(number) not in self.config.classes:
                raise ValueError(f"the reasoner has no head for puzzle {number}, which it was not trained for")
            yield str(number), (puzzles == number).nonzero().flatten()

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        puzzles: torch.Tensor,
        labels: torch.Tensor | None = None,
        **more_pixels: torch.Tensor,
    ) -> SmartReasonerOutput:
        """
        Args:
            pixel_values (`torch.FloatTensor` of shape `(batch, 3, height, width)`):
                Images for the first encoder. Those for the next ones are called `pixel_values_1`, …
            input_ids, attention_mask (`torch.LongTensor` of shape `(batch, length)`): questions.
            puzzles (`torch.LongTensor` of shape `(batch,)`): numbers of the puzzles.
            labels (`torch.LongTensor` of shape `(batch, 10)`, *optional*): values, −100 after a single integer.
        """
        names = pixel_names(len(self.encoders))[1:]
        images = self.encode_images([pixel_values, *(more_pixels[name] for name in names)])
        questions = self.encode_questions(input_ids, attention_mask)
        values = torch.full((len(puzzles), MAX_LENGTH), NOT_LEARNED, device=puzzles.device)
        losses = []
        for name, places in self._groups(puzzles):
            seen = F.relu(self.image_heads[name](images[places])).mean(dim=1)
            logits = self.answer_heads[name](self.fusion(torch.cat([seen, questions[places]], dim=-1)))
            if logits.ndim == 2:
                logits = logits[:, None]
            values[places, : logits.shape[1]] = logits.argmax(dim=-1)
            if labels is not None:
                own = labels[places, : logits.shape[1]]
                # a head has no class for a value that is negative, or larger than those of the training
                own = own.masked_fill((own < 0) | (own >= logits.shape[-1]), NOT_LEARNED)
                loss = F.cross_entropy(logits.transpose(1, 2), own, ignore_index=NOT_LEARNED, reduction="none")
                losses.append(loss.mean(dim=1).sum())
        return SmartReasonerOutput(torch.stack(losses).sum() / len(puzzles) if losses else None, values)


def _untrained(settings: dict[str, Any]) -> PreTrainedModel:
    return AutoModel.from_config(AutoConfig.for_model(**settings))


def _is_convolutional(encoder: PreTrainedModel) -> bool:
    return hasattr(encoder.config, "hidden_sizes")


def _channels(encoder: PreTrainedModel) -> int:
    return encoder.config.hidden_sizes[-1] if _is_convolutional(encoder) else num_channels(encoder)


class ReasonerCollator:
    """
    Makes batches for a [`SmartReasoner`] from rows of [`load_smart`].

    Args:
        config ([`SmartReasonerConfig`]): has the settings of the images.
        tokenizer (`PreTrainedTokenizerBase`): that of the language encoder.
        max_length (`int`): limit of tokens in a question.
    """

    def __init__(self, config: SmartReasonerConfig, tokenizer: PreTrainedTokenizerBase, max_length: int = 110):
        self.image_processors = [PrismerImageProcessor(**settings) for settings in config.image_settings]
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert("RGB") for row in rows]
        texts = self.tokenizer(
            [row["text"] for row in rows],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        labels = [row["value"] + [NOT_LEARNED] * (MAX_LENGTH - len(row["value"])) for row in rows]
        batch = {
            name: processor(images, return_tensors="pt")["pixel_values"]
            for name, processor in zip(pixel_names(len(self.image_processors)), self.image_processors)
        }
        return batch | {
            "input_ids": texts["input_ids"],
            "attention_mask": texts["attention_mask"],
            "puzzles": torch.tensor([row["puzzle"] for row in rows]),
            "labels": torch.tensor(labels),
        }


class ReasonerTrainer(Trainer):
    """A Trainer for a [`SmartReasoner`], which measures S_acc."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, compute_metrics=exact_values, **kwargs)

    def create_model_card(self, **kwargs: Any) -> None:
        """A reasoner is for measurements and gets no card."""


def exact_values(prediction: Any) -> dict[str, float]:
    return {"s_acc": float(np.mean((prediction.predictions == prediction.label_ids).all(axis=1)))}
