"""Features of words, with which the map of an expert for text is painted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from .base import FrozenModel, read_weights
from .text_encoder import TextEncoder


class WordFeatures(FrozenModel):
    """
    A frozen encoder of words. A subclass has a `type`, its name in JSON, and implements `encode`.

    Attributes:
        channels (`int`): length of a word's vector.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_prismer.processing.experts import WordFeatures

    >>> class Lengths(WordFeatures):
    ...     channels = 1
    ...
    ...     def encode(self, words):
    ...         return np.array([[len(word)] for word in words])

    >>> Lengths()(["stop", "left"]).tolist()
    [[4.0], [4.0]]
    ```
    """

    registry: ClassVar[dict[str, type["WordFeatures"]]] = {}

    channels: int = 64

    def encode(self, words: list[str]) -> np.ndarray:
        """Encodes at least one word to (words, channels) float. The model is loaded and inference mode is on."""
        raise NotImplementedError(f"{type(self).__name__} has no method `encode`")

    @torch.inference_mode()
    def __call__(self, words: Sequence[str]) -> np.ndarray:
        """
        Args:
            words (`Sequence[str]`): any number of words.

        Returns:
            `np.ndarray` of shape `(words, channels)`, float32.
        """
        if not words:
            return np.zeros((0, self.channels), np.float32)
        self.load()
        features = np.asarray(self.encode(list(words)), np.float32)
        if features.shape != (len(words), self.channels):
            raise ValueError(
                f"word features of shape {features.shape} for {len(words)} words; "
                f"needed is ({len(words)}, {self.channels})"
            )
        return features


class HashedNgrams(WordFeatures):
    """
    Hashed letters of a word. The counts of its 2- to 4-grams, with word boundaries, are added to or subtracted from 64
    numbers, chosen by the hash of the n-gram, and scaled to length 1. Similar spellings get similar features.

    The features are the same on every machine and need no download and no weights. They carry no meaning, so a network
    trained with them cannot be used with [`ClipTextFeatures`], and vice versa.

    Features: float32 (words, 64). Weights: none.

    Args:
        channels (`int`, *optional*, defaults to 64): length of a word's vector.
        ngram_range (`tuple[int, int]`, *optional*, defaults to `(2, 4)`): shortest and longest n-gram.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import HashedNgrams

    >>> one, other, alike = HashedNgrams()(["stop", "left", "stops"])
    >>> bool(one @ alike > one @ other)
    True
    ```
    """

    type = "hashed_ngrams"
    license = "none needed: no weights"
    source = "sklearn.feature_extraction.text.HashingVectorizer"

    def __init__(self, channels: int = 64, ngram_range: tuple[int, int] = (2, 4)):
        self.channels = channels
        self.ngram_range = tuple(ngram_range)

    def load_model(self) -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(
            analyzer="char_wb",
            ngram_range=self.ngram_range,
            n_features=self.channels,
            norm="l2",
            dtype=np.float32,
        )

    def encode(self, words: list[str]) -> np.ndarray:
        return self.model.transform(words).toarray()


class ClipTextFeatures(WordFeatures):
    """
    CLIP's text embedding of a word, reduced to 64 numbers by a principal component analysis. With the published
    analysis these are the features of the published checkpoints.

    Features: float32 (words, 64). Weights: the text part of CLIP ViT-L/14, 123.7 million parameters, 495 MB, MIT
    licence; the analysis adds 0.2 MB.

    Args:
        pca (`str`):
            A safetensors file with `mean` (embedding) and `components` (64, embedding), such as
            [`ClipTextFeatures.fit_pca`] writes.
        model_name (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a CLIP model with its tokenizer.

    Example:

    ```python
    >>> from modeling_prismer.processing.experts import ClipTextFeatures, RapidOcrText

    >>> expert = RapidOcrText(ClipTextFeatures(pca="clip_pca.safetensors"))  # both loaded when they first run
    >>> expert.description
    {'name': 'ocr', 'kind': 'label', 'channels': 64}
    ```
    """

    type = "clip_text"
    license = "mit"
    size_in_bytes = 494_601_216
    source = "transformers.CLIPTextModelWithProjection"
    file_settings = ("pca", "model_name")

    def __init__(self, pca: str, model_name: str = "openai/clip-vit-large-patch14"):
        self.pca = str(pca)
        self.model_name = self.model_id = str(model_name)

    def load_model(self) -> torch.nn.Module:
        analysis = read_weights(self.pca)
        for name in ("mean", "components"):
            if name not in analysis:
                raise ValueError(f"{self.pca} has no tensor '{name}'; it has {', '.join(analysis)}")
        self._encoder: Any = TextEncoder(self.model_name)
        shape = tuple(analysis["components"].shape)
        if shape != (self.channels, self._encoder.width):
            raise ValueError(
                f"the components in {self.pca} are {shape}; needed is ({self.channels}, {self._encoder.width})"
            )
        self._mean, self._components = analysis["mean"].float(), analysis["components"].float()
        return self._encoder.model

    def encode(self, words: list[str]) -> np.ndarray:
        return ((self._encoder(words) - self._mean) @ self._components.T).numpy()

    def unload(self) -> None:
        super().unload()
        self._encoder = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "_encoder"}

    @classmethod
    def fit_pca(
        cls, texts: Sequence[str], path: str | Path, model_name: str = "openai/clip-vit-large-patch14"
    ) -> "ClipTextFeatures":
        """
        Fits the principal component analysis to the CLIP embeddings of `texts` and writes it to `path`.

        Args:
            texts (`Sequence[str]`): at least as many different texts as components; thousands are better.
            path (`str` or `Path`): the safetensors file to write.
            model_name (`str`, *optional*): Hub id or folder of a CLIP model with its tokenizer.

        Returns:
            [`ClipTextFeatures`] with this analysis.
        """
        from safetensors.torch import save_file
        from sklearn.decomposition import PCA

        if len(set(texts)) < cls.channels:
            raise ValueError(
                f"{len(set(texts))} different texts; an analysis needs at least {cls.channels}. For fewer, use one "
                "that was fitted to other texts (pca)"
            )
        embeddings = TextEncoder(model_name)(list(texts))
        analysis = PCA(n_components=cls.channels, svd_solver="full").fit(embeddings.numpy())
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {
                "mean": torch.from_numpy(analysis.mean_.astype(np.float32)),
                "components": torch.from_numpy(np.ascontiguousarray(analysis.components_, np.float32)),
            },
            path,
        )
        return cls(str(path), model_name)
