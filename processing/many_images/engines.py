"""Engines run a worker over many images. `LocalEngine` does it in this process."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any, ClassVar

from ..experts.suite import ExpertSuite
from .sources import ImageSource
from .worker import ImageWorker


@dataclass
class LabelEngine(ABC):
    """
    The interface of all engines, for labels of experts and for captions and answers.

    An engine of your own is a subclass with a `name`, a `description` and a method `run`. Defining the class registers
    it: `label_images(…, engine=name)` accepts the name, and error messages and `prismer label --list-engines` list it.
    The options of an engine are the fields of a dataclass.

    Args:
        num_workers (`int`, *optional*): number of workers, threads or processes. Each engine has its own default.

    Attributes:
        name (`str`): the name in `label_images(engine=…)` and `prismer label --engine`.
        description (`str`): one line for lists of engines: where the models run, and what a worker is.
        requires (`tuple[str, ...]`): modules that must be installed.
        extra (`str`, *optional*): the extra of this package that installs them.

    Example:

    ```python
    >>> from dataclasses import dataclass
    >>> from modeling_prismer.processing.experts import CannyEdges
    >>> from modeling_prismer.processing.labels import LabelEngine, label_images

    >>> @dataclass
    ... class SimpleEngine(LabelEngine):
    ...     name = "simple"
    ...     description = "this process, image by image"
    ...     is_loud: bool = False
    ...
    ...     def run(self, source, worker, batch_size):
    ...         for key, image in source:
    ...             if self.is_loud:
    ...                 print(key)
    ...             ((result, error),) = worker.see([worker.open(key, image)])
    ...             yield worker.encode(key, result, error)

    >>> images = "modeling_prismer/assets"
    >>> report = label_images(images, [CannyEdges()], "my_labels", engine="simple", is_loud=True, progress=False)
    scene.png
    shape.png
    ```
    """

    registry: ClassVar[dict[str, type["LabelEngine"]]] = {}
    name: ClassVar[str]
    description: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None

    num_workers: int | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            cls.registry[cls.name] = cls

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}; at least 1 is needed")

    @abstractmethod
    def run(self, source: ImageSource, worker: ImageWorker, batch_size: int) -> Iterator[dict[str, Any]]:
        """
        Runs a worker over images.

        Args:
            source ([`ImageSource`]): the images. `source.parts` splits them for other processes.
            worker ([`ImageWorker`]):
                Opens images, runs the models and encodes the results: labels of experts (`prismer label`), or captions
                and answers (`prismer caption`). It can be pickled.
            batch_size (`int`): number of images that the models get at a time.

        Returns:
            `Iterator[dict]`: one row per image, from [`ImageWorker.encode`] or [`ImageWorker.rows`], in any order.
        """

    @property
    def device(self) -> str | None:
        """The device on which the workers run the models. By default they stay where they are."""
        return None

    def place_suite(self, suite: ExpertSuite) -> ExpertSuite:
        """Returns the suite on the device where the workers run it."""
        if self.device is None or not is_on_cpu(suite):
            return suite
        # a copy, because this process may lack the device; a copy has no loaded models
        return copy.deepcopy(suite).to(self.device)

    @classmethod
    def option_names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    @classmethod
    def is_installed(cls) -> bool:
        return all(find_spec(module) is not None for module in cls.requires)

    @classmethod
    def how_to_install(cls) -> str:
        """The command that installs the modules in `requires`."""
        return f"pip install 'modeling-prismer[{cls.extra}]'" if cls.extra else f"pip install {' '.join(cls.requires)}"

    @classmethod
    def from_name(cls, name: str, **options: Any) -> "LabelEngine":
        """
        Makes a registered engine.

        Raises:
            ValueError: if there is no such engine, or if it does not have one of the options.
            ImportError: if a library that the engine requires is not installed.
        """
        if name not in cls.registry:
            raise ValueError(f"engine is {name!r}; accepted are {', '.join(map(repr, cls.registry))}")
        engine = cls.registry[name]
        for option in options:
            if option not in engine.option_names():
                names = ", ".join(engine.option_names())
                raise ValueError(f"the engine '{name}' has no option '{option}'; its options are {names}")
        if not engine.is_installed():
            raise ImportError(
                f"the engine '{name}' needs {', '.join(engine.requires)}: {engine.how_to_install()}, or use another "
                "engine"
            )
        return engine(**options)


class LocalEngine(LabelEngine):
    """
    Runs the models in this process. Rows keep the order of the images.

    Args:
        num_workers (`int`, *optional*):
            Number of threads that open images and encode results while the models run. By default one per core, at
            most 8.

    Example:

    ```python
    >>> from modeling_prismer.processing.labels import LocalEngine, label_images

    >>> engine = LocalEngine(num_workers=2)
    >>> label_images("modeling_prismer/assets", "offline", "my_labels", engine, progress=False).images
    2
    ```
    """

    name = "local"
    description = "this process; workers are threads that open images and encode results"

    def run(self, source: ImageSource, worker: ImageWorker, batch_size: int) -> Iterator[dict[str, Any]]:
        pool = ThreadPoolExecutor(self.num_workers or min(8, os.cpu_count() or 1))
        try:
            yield from worker.rows(source, batch_size, pool)
        finally:
            pool.shutdown(cancel_futures=True)


def is_on_cpu(suite: ExpertSuite) -> bool:
    return all(expert.device.type == "cpu" for expert in suite.values())
