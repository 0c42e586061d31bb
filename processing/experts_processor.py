"""Base of the processors: the experts that run live, and saving them with the rest."""

import json
import os
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging
from transformers.utils.hub import hf_api

from .expert_labels import ExpertFields, match_expert_labels, read_experts
from .expert_router import ExpertRouter
from .image_loading import load_images


if TYPE_CHECKING:
    from typing import Self

logger = logging.get_logger(__name__)


class Shared:
    """Keeps the live experts out of the deep copies that `ProcessorMixin.to_dict` makes for every repr and save."""

    def __init__(self, value: Any):
        self.value = value

    def __deepcopy__(self, memo: Any) -> "Shared":
        return self


class ExpertsProcessor(ProcessorMixin):
    """
    A processor whose image processor is a [`PrismerImageProcessor`]. It runs the experts that the image processor
    describes, and saves them in `experts/`.
    """

    image_processor: Any
    _saved_folders: tuple[str, ...] = ("experts", "additional_chat_templates")
    _experts: Shared
    _experts_source: tuple[str, dict[str, Any]] | None  # where a description comes from: folder or Hub id
    _router: Shared | None = None
    _router_source: tuple[str, dict[str, Any]] | None = None  # of a saved router

    @property
    def experts(self) -> Any:
        """The suite of live experts, or `None`."""
        if _is_description(self._experts.value):
            try:
                suite_class = _suite_class()
            except ImportError as error:
                logger.warning_once(f"The saved experts do not run: {error}")
                return None
            source, hub_kwargs = self._experts_source or (None, {})
            if source is None or os.path.isdir(source):
                suite = suite_class.from_dict(dict(self._experts.value), folder=source)
            else:
                suite = suite_class.from_pretrained(source, **hub_kwargs)
            self._experts = Shared(suite)
        return self._experts.value

    @experts.setter
    def experts(self, experts: Any) -> None:
        self._experts = Shared(experts if _is_description(experts) else as_suite(experts))
        self._experts_source = None
        if hasattr(self._experts.value, "use_class_names"):
            described = self.image_processor.experts
            names = {own["name"]: own["class_names"] for own in described if own.get("class_names")}
            self._experts.value.use_class_names(names)

    @property
    def router(self) -> ExpertRouter | None:
        """Chooses the experts of a call with `experts="auto"`; saved with the processor. `None` if there is none."""
        if self._router is None:
            source, hub_kwargs = self._router_source or (None, {})
            self._router = Shared(None if source is None else ExpertRouter.from_pretrained(source, **hub_kwargs))
        return self._router.value

    @router.setter
    def router(self, router: ExpertRouter | None) -> None:
        self._router = Shared(router)

    # ---- images and experts ----

    def process_images(
        self,
        images: Any,
        expert_labels: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        experts: list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        The image inputs alone, without text: `pixel_values`, the experts' tensors and `expert_mask`.

        Args:
            images, expert_labels, experts: as in [`PrismerProcessor.__call__`].
            kwargs: passed on to the image processor.
        """
        images, labels = self._open(images, expert_labels, kwargs)
        return self._image_inputs(images, self._run_experts(images, labels, experts), **kwargs)

    def run_experts(
        self,
        images: Any,
        expert_labels: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        experts: list[str] | str | None = None,
        text: list[list[str]] | None = None,
        budget_ms: float | None = None,
    ) -> list[dict[str, Any]]:
        """
        The labels of the configured experts, live ones where none are given.

        Args:
            images, expert_labels, experts, budget_ms: as in [`PrismerProcessor.__call__`].
            text (`list[list[str]]`, *optional*): for `experts="auto"`, the texts about each image.

        Returns:
            `list[dict]`: for each image a dict from an expert's name to its label, of 8 bits and the image's size. An
            expert that neither ran nor was given has no entry; a warning says so once. The label of an expert that
            the router has left out is `None`.
        """
        images, labels = self._open(images, expert_labels, {})
        return self._run_experts(images, labels, *self._choose_experts(images, experts, text, budget_ms))

    def check_experts(self, experts: list[str] | None = None) -> tuple[list[str], list[str]]:
        """
        Checks the experts of a call before any of them runs.

        Args:
            experts (`list[str]`, *optional*): as in [`PrismerProcessor.__call__`].

        Returns:
            `tuple[list[str], list[str]]`: the names of the experts to use, and those of them that run live.

        Raises:
            ValueError: if a name is not in the configuration, or if a live expert has another description there.
        """
        configured = [expert["name"] for expert in self.image_processor.experts]
        wanted = configured if experts is None else [experts] if isinstance(experts, str) else list(experts)
        for name in wanted:
            if name not in configured:
                raise ValueError(f"experts has '{name}'; the config's experts are: {', '.join(configured) or 'none'}")
        suite: Any = self.experts if wanted else None
        live = [name for name in wanted if suite is not None and name in suite]
        for expert in read_experts(self.image_processor.experts):
            if expert.name in live:
                _require_same_description(suite[expert.name].description, expert)
        return wanted, live

    def _choose_experts(
        self,
        images: list[Image.Image],
        experts: list[str] | str | None,
        texts: list[list[str]] | None,
        budget_ms: float | None,
    ) -> tuple[list[str] | None, list[list[str]] | None]:
        """The last two arguments of `_run_experts`. With `experts="auto"`, the router chooses for each image."""
        if experts != "auto":
            if budget_ms is not None:
                raise ValueError(f"budget_ms is for experts='auto'; experts is {experts!r}")
            return [experts] if isinstance(experts, str) else experts, None
        if texts is None:
            raise ValueError("experts='auto' needs a text about each image, from which the router chooses")
        router = self.router
        if router is None:
            raise ValueError(
                "experts='auto' needs a router, and this processor has none; training_examples/train_router.py trains "
                "one for a checkpoint"
            )
        price, features = router.config.price_for(budget_ms), None
        if router.config.image_size:
            missing: list[dict[str, Any]] = [{} for _ in images]
            features = router.image_features(self._image_inputs(images, missing))
        unknown = [own["name"] for own in self.image_processor.experts if own["name"] not in router.config.experts]
        return None, [[*chosen, *unknown] for chosen in router.choose(texts, features, price)]

    def without_missing(self, inputs: MutableMapping[str, Any]) -> Any:
        """
        Removes the tensors of experts that no image has, so that the network does not run their stems. Its output is
        the same.

        Args:
            inputs (`dict`): inputs of the network with `expert_mask`; it is changed.
        """
        if "pixel_values" in inputs and "expert_mask" in inputs:  # else these tensors tell the number of images
            for place, expert in enumerate(read_experts(self.image_processor.experts)):
                if not inputs["expert_mask"][:, place].any():
                    for suffix in expert.tensor_suffixes:
                        inputs.pop(f"{expert.name}_{suffix}", None)
        return inputs

    def _image_inputs(self, images: list[Image.Image], labels: list[dict[str, Any]], **kwargs: Any) -> BatchFeature:
        """The tensors of opened images and their labels."""
        return self.image_processor._preprocess_opened(images, labels, **kwargs)

    def _open(
        self, images: Any, expert_labels: Any, settings: dict[str, Any]
    ) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """Opened images, and the labels given for each. `settings` are those of the image processor in this call."""
        images = load_images(
            images,
            max_pixels=settings.get("max_image_pixels", self.image_processor.max_image_pixels),
            input_data_format=settings.pop("input_data_format", None),
        )
        names = [expert["name"] for expert in self.image_processor.experts]
        return images, match_expert_labels(expert_labels, len(images), names)

    def _run_experts(
        self,
        images: list[Image.Image],
        labels: list[dict[str, Any]],
        experts: list[str] | None,
        chosen: list[list[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """
        The labels of the configured experts.

        Args:
            images (`list[PIL.Image.Image]`): opened images.
            labels (`list[dict]`): the given labels of each.
            experts (`list[str]`, *optional*): names of the experts to use; by default all.
            chosen (`list[list[str]]`, *optional*): for each image, those that may run. The label of the others is
                `None`, unless it is given.
        """
        configured = [expert["name"] for expert in self.image_processor.experts]
        wanted, live = self.check_experts(experts)
        suite: Any = self.experts if wanted else None
        labels = [{name: given[name] for name in configured if name in given and name in wanted} for given in labels]

        for name in live:
            if hasattr(suite[name], "label_from"):  # an expert that takes input
                for image, given in zip(images, labels):
                    if given.get(name) is not None:
                        given[name] = suite[name].label_from(given[name], image)

        needs = [
            [name for name in live if name not in given and (chosen is None or name in chosen[row])]
            for row, given in enumerate(labels)
        ]
        for names, rows in _batches(needs, suite):
            part = suite.only(*names)
            needed = {other for name in names for other in _labels_that(part[name], "needs", "uses")}
            known = {"labels": [labels[row] for row in rows]} if needed.intersection(configured) else {}
            outputs = part([images[row] for row in rows], **known)
            for row, output in zip(rows, outputs):
                labels[row].update({name: output.get(name) for name in names})

        lacking = [name for name in wanted if name not in live and any(name not in given for given in labels)]
        if lacking:
            logger.warning_once(
                f"The configured experts {', '.join(lacking)} are neither among the live experts nor in "
                "expert_labels: they are masked out."
            )
        if chosen is not None:
            labels = [{**dict.fromkeys(live), **given} for given in labels]
        return labels

    def post_process_ranking(self, ranking: Any, answers: list[str]) -> list[list[dict[str, Any]]]:
        """
        Adds the names of the candidates to the result of `model.rank_candidates`.

        Args:
            ranking: The result, with `scores` and `indices` of shape `(rows, k)`.
            answers (`list[str]`): The candidates, as given to `prepare_candidates`.

        Returns:
            `list[list[dict]]`: k times `{"label": …, "score": …}` for each row, best first. The score is the mean
            log-probability of the label's tokens.
        """
        return [
            [{"label": answers[index], "score": score} for score, index in zip(*row)]
            for row in zip(ranking.scores.tolist(), ranking.indices.tolist())
        ]

    # ---- saving and loading ----

    def to_dict(self) -> dict[str, Any]:
        """The processor's settings, with a description of the live experts in place of the experts themselves."""
        output = super().to_dict()
        experts = self._experts.value
        if experts is not None:
            output["experts"] = dict(experts) if _is_description(experts) else experts.to_dict()
        return output

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """
        Saves image processor, tokenizer, settings and the description of the live experts, and the weights of those
        experts that have weights of their own.

        Args:
            save_directory (`str` or `os.PathLike`): the folder; made if it does not exist.
            push_to_hub (`bool`, *optional*, defaults to `False`): whether to upload the folder to the Hub.
            kwargs: passed on to `ProcessorMixin.save_pretrained`.
        """
        live = self._experts
        if self.router is not None:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.router.save_pretrained(save_directory)
        if self.experts is not None:
            self.experts.save_pretrained(save_directory)
            # this description gives the paths of own weights relative to the folder
            description = Path(save_directory, "experts", "suite.json").read_text(encoding="utf-8")
            live, self._experts = self._experts, Shared(json.loads(description))
        try:
            return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        finally:
            self._experts = live

    def _upload_modified_files(
        self,
        working_dir: str,
        repo_id: str,
        files_timestamps: dict[str, float],
        commit_message: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        # transformers goes no deeper than one folder, and the experts' weights lie deeper
        times = self._get_files_timestamps(working_dir)
        changed = [name for name in times if times[name] > files_timestamps.get(name, 0)]
        if revision is not None and not revision.startswith("refs/pr"):
            hf_api().create_branch(repo_id=repo_id, branch=revision, token=kwargs.get("token"), exist_ok=True)
        return hf_api().upload_folder(
            repo_id=repo_id,
            folder_path=working_dir,
            allow_patterns=[*changed, "router.*", *(f"{folder}/*" for folder in self._saved_folders)],
            commit_message=commit_message or "Upload processor",
            revision=revision,
            **kwargs,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        experts: Any = "saved",
        expert_device: str | torch.device | int | None = None,
        expert_dtype: torch.dtype | str | None = None,
        experts_memory: str | None = None,
        **kwargs: Any,
    ) -> "Self":
        """
        Loads a processor and its experts; an expert's own weights are loaded when it first runs.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a folder or a Hub id.
            experts (*optional*, defaults to `"saved"`):
                `"saved"` restores the experts that were saved with it; `None` leaves them out; else as in the
                constructor: `"published"`, `"fast"`, `"commercial"`, `"offline"`, a list of experts, a suite.
            expert_device (`str` or `torch.device`, *optional*): where the experts run.
            expert_dtype (`torch.dtype`, *optional*): in which precision they run.
            experts_memory (`str`, *optional*):
                `"sequential"` loads one expert at a time, runs it over all images of the call and frees it: for small
                memories and many images a call. `"all"` keeps them loaded. By default as saved, else `"all"`.
            kwargs: passed on to `ProcessorMixin.from_pretrained`.

        Raises:
            OSError: if the files are not found.
        """
        if experts_memory not in (None, "all", "sequential"):
            raise ValueError(f"experts_memory is {experts_memory!r}; accepted are 'sequential', 'all' and None")
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        names = ("revision", "token", "cache_dir", "local_files_only")
        source = (
            os.fspath(pretrained_model_name_or_path),
            {name: kwargs[name] for name in names if kwargs.get(name) is not None},
        )
        processor._router_source = source
        if isinstance(experts, str) and experts == "saved":
            processor._experts_source = source
        else:
            processor.experts = experts
        if (expert_device is not None or expert_dtype is not None) and processor.experts is not None:
            dtype = getattr(torch, expert_dtype) if isinstance(expert_dtype, str) else expert_dtype
            processor.experts.to(device=expert_device, dtype=dtype)
        if experts_memory is not None and processor.experts is not None:
            processor.experts.memory = experts_memory
        return processor


def as_suite(experts: Any) -> Any:
    """The suite of experts that are given as a suite, a list, the name of a suite, or not at all."""
    if isinstance(experts, str):
        return _suite_class().from_name(experts)
    if isinstance(experts, list | tuple):
        return _suite_class()(list(experts))
    if experts is not None and not isinstance(experts, Mapping):
        raise TypeError(
            f"experts is a {type(experts).__name__}; accepted are an ExpertSuite, a list of experts, the name of a "
            "suite such as 'offline', a suite's description, and None"
        )
    return experts


def _require_same_description(description: Mapping[str, Any], configured: ExpertFields) -> None:
    (live,) = read_experts([description])
    for field in ExpertFields._fields:
        if (getattr(live, field) or None) != (getattr(configured, field) or None):
            raise ValueError(
                f"the live expert '{configured.name}' has {field}={getattr(live, field)!r}; the config's expert "
                f"'{configured.name}' has {field}={getattr(configured, field)!r}"
            )


def _batches(needs: list[list[str]], suite: Any) -> Iterator[tuple[list[str], list[int]]]:
    """
    Names of experts and the images on which they run together.

    Args:
        needs (`list[list[str]]`): the experts that each image needs.
        suite: has them.
    """
    names = [name for name in suite or () if any(name in own for own in needs)]
    linked = {other for name in names for other in _labels_that(suite[name], "needs", "uses")}
    linked |= {name for name in names if _labels_that(suite[name], "needs", "uses")}
    if len({tuple(own) for own in needs if own}) > 1:  # an expert that needs no other runs once
        for name in names:
            if name not in linked:
                yield [name], [row for row, own in enumerate(needs) if name in own]
        needs = [[name for name in own if name in linked] for own in needs]
    for group in dict.fromkeys(tuple(own) for own in needs if own):
        yield list(group), [row for row, own in enumerate(needs) if tuple(own) == group]


def _labels_that(expert: Any, *fields: str) -> list[str]:
    return [name for field in fields for name in getattr(expert, field, ())]


def _is_description(experts: Any) -> bool:
    return isinstance(experts, Mapping) and not callable(experts)


def _suite_class() -> Any:
    # Only live experts need the installed package; the rest works in a saved folder alone (trust_remote_code).
    try:
        from modeling_prismer.processing.experts import ExpertSuite
    except ImportError as error:
        raise ImportError(
            f"live experts need the package modeling-prismer ({error}); install it, or pass expert_labels"
        ) from error
    return ExpertSuite
