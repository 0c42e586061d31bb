"""The checkpoints of the page: the one that it shows, and those to compare it with."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from checks import Refused
from lm_reader import LanguageReader
from reader import Reader
from transformers import PreTrainedConfig

from modeling_prismer.pretrained import DEFAULT_CHECKPOINT, find_checkpoint, shipped_checkpoints


class Readers:
    """
    Checkpoints by name. The first is loaded at once, the others when they are first used.

    Args:
        models (`Sequence[str]`, *optional*):
            Names of shipped checkpoints, folders or Hub ids, of a Prismer or a PrismerLM. By default all shipped ones.
        device (`str`, *optional*): by default a GPU, if there is one.
        language (`str`, *optional*):
            Folder or Hub id of the frozen language model of a PrismerLM; by default the one that its checkpoint names.

    Raises:
        OSError, ValueError: if there is no such checkpoint, two have the same name, or it is of another kind.
    """

    def __init__(self, models: Sequence[str] = (), device: str | None = None, language: str | None = None):
        self.device, self.language = device, language
        self._paths: dict[str, str] = {}
        self._kinds: dict[str, str] = {}
        for model in models or sorted(shipped_checkpoints(), key=lambda name: name != DEFAULT_CHECKPOINT):
            path = find_checkpoint(model)
            name = Path(path).name
            if name in self._paths:
                raise ValueError(f"two checkpoints have the name {name!r}: {self._paths[name]} and {path}")
            config, _ = PreTrainedConfig.get_config_dict(path)
            if config.get("model_type") not in ("prismer", "prismer_lm"):
                raise ValueError(f"{model} is a {config.get('model_type')!r}; a Prismer or a PrismerLM is needed")
            self._paths[name], self._kinds[name] = path, config["model_type"]
        self._lock = Lock()
        self._loaded: dict[str, Reader] = {}
        self.main = self[self.names[0]]

    @property
    def names(self) -> list[str]:
        return list(self._paths)

    @property
    def others(self) -> list[str]:
        """The names of the checkpoints to compare with."""
        return self.names[1:]

    def __getitem__(self, name: str) -> Reader:
        """
        Loads a checkpoint, unless it is loaded already.

        Raises:
            Refused: if there is none of this name.
        """
        if name not in self._paths:
            raise Refused(f"checkpoint: “{name}” is unknown; known are: {', '.join(self.names)}.")
        with self._lock:
            if name not in self._loaded:
                path = self._paths[name]
                if self._kinds[name] == "prismer":
                    self._loaded[name] = Reader(path, self.device)
                else:
                    self._loaded[name] = LanguageReader(path, self.device, language=self.language)
            return self._loaded[name]
