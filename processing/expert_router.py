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
        image_size (`int`, *optional*, defaults to 0): features of an image; 0 if the router reads the text alone.
        buckets (`int`, *optional*, defaults to 2048): number of features that the words of texts share.
        prices (`list[RouterPrice]`): the time and the score that prices lead to.
        default_price (`float`): the price without a budget.
    """

    subsets: list[list[str]]
    seconds: list[float]
    image_size: int = 0
    buckets: int = 2048
    prices: list[RouterPrice] = field(default_factory=list)
    default_price: float = 0.0

    def __post_init__(self) -> None:
        if not self.subsets or len(self.subsets) != len(self.seconds):
            raise ValueError(f"the router has {len(self.subsets)} subsets of experts and {len(self.seconds)} times")
        self.prices = [RouterPrice(**own) if isinstance(own, Mapping) else own for own in self.prices]

    @property
    def experts(self) -> list[str]:
        """The experts to choose from."""
        return list(dict.fromkeys(name for subset in self.subsets for name in subset))

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


class ExpertRouter:
    """
    Chooses the experts for images and texts. `training_examples/train_router.py` trains it on what `prismer worth`
    measures. It is saved next to a checkpoint, in `router.json` and `router.safetensors`.

    It predicts the score of the network without experts and the gain of each expert, as linear functions of the words
    of the text and of the image's features from the frozen encoder. A constant for each subset is added, because gains
    do not simply add up. It takes the subset whose score, minus the time of its experts times a price, is the highest.
    Several texts about one image add up.

    Args:
        config ([`RouterConfig`]): the subsets and their times.
        weights (`dict[str, torch.Tensor]`, *optional*):
            `words` (buckets, 1 + experts), `image` (image_size, 1 + experts), `constants` (subsets,), and `mean` and
            `std` (image_size,) of the image's features. Zero by default.

    Attributes:
        encoder (*optional*):
            The Prismer or PrismerLM whose frozen encoder sees the images. It is not saved with the router.

    Example:

    ```python
    >>> from modeling_prismer.processing.expert_router import ExpertRouter, RouterConfig

    >>> router = ExpertRouter(RouterConfig(subsets=[[], ["ocr"]], seconds=[0.0, 0.1]))
    >>> router.weights["constants"] += torch.tensor([0.3, 0.9])
    >>> router.choose([["What does the sign say?"]], price=1.0)
    [['ocr']]
    >>> router.choose([["What does the sign say?"]], price=10.0)  # 0.6 is not worth a tenth of a second
    [[]]
    ```
    """

    CONFIG_FILE, WEIGHTS_FILE = "router.json", "router.safetensors"

    def __init__(self, config: RouterConfig, weights: dict[str, torch.Tensor] | None = None):
        self.config = config
        columns = 1 + len(config.experts)
        shapes: dict[str, tuple[int, ...]] = {
            "words": (config.buckets, columns),
            "image": (config.image_size, columns),
        }
        shapes |= {"constants": (len(config.subsets),), "mean": (config.image_size,), "std": (config.image_size,)}
        self.weights = {name: torch.zeros(shape) for name, shape in shapes.items()} if weights is None else weights
        found = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        if found != shapes:
            raise ValueError(f"the weights have the shapes {found}; {shapes} are needed")
        self.encoder: Any = None

    def words_of(self, text: str) -> list[int]:
        """The buckets of the words of a text. Punctuation, upper case and repetitions do not count."""
        words = dict.fromkeys(WORD.findall(text.lower()))
        return sorted({zlib.crc32(word.encode(errors="replace")) % self.config.buckets for word in words})

    @property
    def members(self) -> torch.Tensor:
        """Which experts each subset has, after a first column of ones: (subsets, 1 + experts)."""
        experts = self.config.experts
        return torch.tensor([[1.0, *(float(name in own) for name in experts)] for own in self.config.subsets])

    def predict(self, texts: Sequence[str], images: torch.Tensor | None = None) -> torch.Tensor:
        """
        Predicts the scores of the network.

        Args:
            texts (`Sequence[str]`): the texts.
            images (`torch.FloatTensor` of shape `(texts, image_size)`, *optional*): the features of their images.

        Returns:
            `torch.FloatTensor` of shape `(texts, subsets)`.
        """
        weights = self.weights
        gains = torch.stack([weights["words"][self.words_of(text)].sum(0) for text in texts])  # (texts, 1 + experts)
        if images is not None:
            gains = gains + ((images - weights["mean"]) / weights["std"].clamp(min=1e-6)) @ weights["image"]
        return gains @ self.members.T + weights["constants"]

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
        owners = torch.tensor([image for image, own in enumerate(texts) for _ in own], dtype=torch.long)
        scores = torch.zeros(len(texts), len(self.config.subsets))
        if len(owners):
            found = self.predict([text for own in texts for text in own], None if images is None else images[owners])
            scores = scores.index_add(0, owners, found)
        return [self.config.subsets[row] for row in best_rows(scores, self.config.seconds, price).tolist()]

    # ---- saving and loading ----

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes both files into a folder."""
        for name, write in (
            (self.WEIGHTS_FILE, lambda path: save_file(self.weights, path)),
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
            config = RouterConfig(**json.loads(Path(files[0]).read_text(encoding="utf-8")))
            return cls(config, load_file(files[1]))
        except (SafetensorError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"the router of {checkpoint} is damaged: {error}") from error


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
