"""Chooses for each image which experts run, before any of them does, from its texts and the frozen encoder."""

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils.hub import cached_file


WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class RouterPrice:
    """
    What a price of time leads to, measured on images that the router was not trained on.

    Args:
        price (`float`): the score that a second of the experts must gain.
        milliseconds (`float`): the mean time of the experts for an image with one text.
        score (`float`): the mean score.
    """

    price: float
    milliseconds: float
    score: float


@dataclass
class RouterConfig:
    """
    Args:
        subsets (`list[list[str]]`): the subsets of experts to choose from.
        seconds (`list[float]`): the time of the experts of each subset, for an image.
        image_size (`int`): features of an image; 0 if the router reads the text alone.
        buckets (`int`, *optional*, defaults to 2048): number of embeddings that the words of texts share.
        hidden_size (`int`, *optional*, defaults to 64): width of the network.
        prices (`list[RouterPrice]`): the time and the score that prices lead to, the lowest price first.
        default_price (`float`): the price without a budget.
    """

    subsets: list[list[str]]
    seconds: list[float]
    image_size: int
    buckets: int = 2048
    hidden_size: int = 64
    prices: list[RouterPrice] = field(default_factory=list)
    default_price: float = 0.0

    def __post_init__(self) -> None:
        if not self.subsets or len(self.subsets) != len(self.seconds):
            raise ValueError(f"the router has {len(self.subsets)} subsets of experts and {len(self.seconds)} times")
        self.prices = [RouterPrice(**own) if isinstance(own, Mapping) else own for own in self.prices]

    def price_for(self, budget_ms: float | None) -> float:
        """
        The price with the best score among those that keep the mean time within a budget, as measured; of equal ones
        the one of the least time. It is infinite if there is none: no expert runs.

        Raises:
            ValueError: if `budget_ms` is negative.
        """
        if budget_ms is None:
            return self.default_price
        if not budget_ms >= 0:
            raise ValueError(f"budget_ms is {budget_ms}; at least 0 is needed")
        affordable = [own for own in self.prices if own.milliseconds <= budget_ms]
        if not affordable:
            return float("inf")
        return max(affordable, key=lambda own: (own.score, -own.milliseconds, -own.price)).price


class RouterNetwork(nn.Module):
    """Predicts the score of each subset of experts from the words of a text and the features of its image."""

    def __init__(self, config: RouterConfig):
        super().__init__()
        width = config.hidden_size
        self.words = nn.EmbeddingBag(config.buckets, width, mode="mean")
        nn.init.normal_(self.words.weight, std=0.02)  # words that were not in the training say little
        self.image = nn.Linear(config.image_size, width) if config.image_size else None
        self.layers = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.scores = nn.Linear(width, len(config.subsets))
        self.register_buffer("image_mean", torch.zeros(config.image_size))
        self.register_buffer("image_std", torch.ones(config.image_size))

    def forward(self, words: list[torch.Tensor], images: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            words (`list[torch.LongTensor]`): for each text the buckets of its words.
            images (`torch.FloatTensor` of shape `(texts, image_size)`, *optional*): the features of its image.

        Returns:
            `torch.FloatTensor` of shape `(texts, subsets)`: the predicted scores.
        """
        lengths = torch.tensor([0, *map(len, words[:-1])])
        hidden_states = self.words(torch.cat(words), lengths.cumsum(0))
        if self.image is not None:
            hidden_states = hidden_states + self.image((images - self.image_mean) / self.image_std)
        return self.scores(self.layers(hidden_states))


class ExpertRouter:
    """
    Chooses the experts for images and texts. `training_examples/train_router.py` trains it on what `prismer worth`
    measures. It is saved next to a checkpoint, in `router.json` and `router.safetensors`.

    For each subset of experts it predicts the score of the network. It takes the subset whose score, minus the time of
    its experts times a price, is the highest. Several texts about one image add up.

    Args:
        config ([`RouterConfig`]): the subsets and their times.

    Attributes:
        network ([`RouterNetwork`]): the trained part.
        encoder (*optional*):
            The Prismer or PrismerLM whose frozen encoder sees the images. It is not saved with the router.

    Example:

    ```python
    >>> from modeling_prismer.processing.expert_router import ExpertRouter, RouterConfig

    >>> router = ExpertRouter(RouterConfig(subsets=[[], ["ocr"]], seconds=[0.0, 0.1], image_size=0))
    >>> router.choose([["What does the sign say?"]], price=float("inf"))  # no time for experts
    [[]]
    ```
    """

    CONFIG_FILE, WEIGHTS_FILE = "router.json", "router.safetensors"

    def __init__(self, config: RouterConfig):
        self.config = config
        self.network = RouterNetwork(config).eval()
        self.encoder: Any = None

    @property
    def experts(self) -> list[str]:
        """The experts that it chooses from."""
        return list(dict.fromkeys(name for subset in self.config.subsets for name in subset))

    def words_of(self, text: str) -> torch.Tensor:
        """The buckets of the words and of the pairs of words of a text: `(number,)`. Punctuation does not count."""
        words = WORD.findall(text.lower())
        found = ["", *words, *(f"{first} {second}" for first, second in zip(words, words[1:]))]
        return torch.tensor([zlib.crc32(each.encode(errors="replace")) % self.config.buckets for each in found])

    @torch.no_grad()
    def image_features(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """
        The features of images, from the encoder without experts: the mean of its tokens, `(images, image_size)`.
        `None` if the router reads texts alone.

        Args:
            inputs (`dict[str, torch.Tensor]`): image inputs of the encoder, with `expert_mask`.

        Raises:
            ValueError: if there is no encoder.
        """
        if not self.config.image_size:
            return None
        if self.encoder is None:
            raise ValueError(
                "the router sees images through the network's frozen encoder; set processor.router.encoder = model"
            )
        inputs = {name: tensor.to(self.encoder.device) for name, tensor in inputs.items()}
        return summarize_images(self.encoder, inputs)

    @torch.no_grad()
    def choose(
        self, texts: Sequence[Sequence[str]], images: torch.Tensor | None = None, price: float | None = None
    ) -> list[list[str]]:
        """
        Chooses the experts for each image.

        Args:
            texts (`Sequence[Sequence[str]]`): for each image its texts.
            images (`torch.FloatTensor` of shape `(images, image_size)`, *optional*): the features of the images.
            price (`float`, *optional*): see [`RouterPrice`]; by default that of the configuration.

        Returns:
            `list[list[str]]`: the experts for each image.
        """
        price = self.config.default_price if price is None else price
        owners = torch.tensor([image for image, own in enumerate(texts) for _ in own])
        words = [self.words_of(text) for own in texts for text in own]
        scores = torch.zeros(len(texts), len(self.config.subsets))
        if words and price < float("inf"):
            found = self.network(words, None if images is None else images.float().cpu()[owners])
            scores = scores.index_add(0, owners, found)
        return [self.config.subsets[row] for row in best_rows(scores, self.config.seconds, price).tolist()]

    # ---- saving and loading ----

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes both files into a folder."""
        for name, write in (
            (self.WEIGHTS_FILE, lambda path: save_file(self.network.state_dict(), path)),
            (self.CONFIG_FILE, lambda path: path.write_text(json.dumps(asdict(self.config), indent=2) + "\n")),
        ):
            temporary = Path(folder, f".{name}.unfinished")
            write(temporary)
            temporary.replace(Path(folder, name))

    @classmethod
    def from_pretrained(cls, checkpoint: str | os.PathLike, **kwargs: Any) -> "ExpertRouter | None":
        """
        Loads the router of a checkpoint, a folder or a Hub id. Returns `None` if it has none.

        Args:
            checkpoint (`str` or `os.PathLike`): a folder or a Hub id.
            kwargs: for the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.

        Raises:
            ValueError: if a file is missing or damaged.
        """
        optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        files = [cached_file(checkpoint, name, **optional, **kwargs) for name in (cls.CONFIG_FILE, cls.WEIGHTS_FILE)]
        if files[0] is None:
            return None
        try:
            if files[1] is None:
                raise ValueError(f"{cls.WEIGHTS_FILE} is missing")
            router = cls(RouterConfig(**json.loads(Path(files[0]).read_text(encoding="utf-8"))))
            router.network.load_state_dict(load_file(files[1]))
        except (SafetensorError, RuntimeError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"the router of {checkpoint} is damaged: {error}") from error
        return router


def best_rows(scores: torch.Tensor, seconds: Sequence[float], price: float) -> torch.Tensor:
    """
    The subset with the best score at a price; of equal ones the fastest.

    Args:
        scores (`torch.FloatTensor` of shape `(images, subsets)`): the predicted scores.
        seconds (`Sequence[float]`): the time of each subset.
        price (`float`): of a second. With an infinite price, the fastest subset is taken.
    """
    times = torch.tensor(seconds, dtype=scores.dtype)
    order = times.argsort(stable=True)  # argmax takes the first of equal ones
    if price == float("inf"):
        return order[:1].expand(len(scores))
    return order[(scores - price * times)[:, order].argmax(dim=1)]


def summarize_images(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    The mean of the encoder's tokens for each image, `(images, width)` float32 on the CPU.

    Args:
        model: a Prismer or a PrismerLM with vision encoders.
        inputs (`dict[str, torch.Tensor]`): its image inputs.
    """
    return model.get_image_features(**inputs, return_dict=True).last_hidden_state.float().mean(1).cpu()
