"""Processor of Prismer: frozen experts, image processor and tokenizer behind one call."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import TensorType, logging

from .chat import CALL_NAMES, QUESTION_TEMPLATE, as_batch, read_messages, render
from .experts_processor import ExpertsProcessor
from .tasks import Task, find_task


logger = logging.get_logger(__name__)

CONTROL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@lru_cache(maxsize=8)
def _pattern_of(tokens: tuple[tuple[str, bool], ...]) -> re.Pattern[str] | None:
    """A pattern of all tokens, the longest first. Each token comes with a flag: whether it must be a whole word."""
    ordered = sorted(tokens, key=lambda token: -len(token[0]))
    parts = [rf"(?<!\w){re.escape(text)}(?!\w)" if whole else re.escape(text) for text, whole in ordered]
    return re.compile("|".join(parts)) if parts else None


def _split_at(every_token: re.Pattern[str] | None, apart: set[str], text: str) -> Iterator[str]:
    """Splits the text into the tokens in `apart` and the pieces between them."""
    end = 0
    for match in every_token.finditer(text) if every_token else ():
        if match[0] in apart:
            yield text[end : match.start()]
            yield match[0]
            end = match.end()
    yield text[end:]


class PrismerProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    _defaults = {
        "text_kwargs": {"padding": True, "padding_side": "left", "truncation": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


class PrismerProcessor(ExpertsProcessor):
    r"""
    Turns images and text into the inputs of Prismer. It runs the frozen experts on the images, prepares images and
    expert maps with a [`PrismerImageProcessor`], and writes the prompt of the checkpoint's task.

    Args:
        image_processor ([`PrismerImageProcessor`]):
            Prepares images and maps. Its `experts` are the experts that the network reads.
        tokenizer ([`PreTrainedTokenizerBase`]):
            A tokenizer like RoBERTa's, with `bos_token`, `eos_token` and `pad_token`.
        experts ([`ExpertSuite`], `list[Expert]`, `str` or `dict`, *optional*):
            The experts that run live: a suite, a list of experts, the name of a suite (`"offline"`), or a suite's
            description (`suite.to_dict()`), which is loaded on first use. Without them, pass labels as
            `expert_labels`. You can replace them at any time: `processor.experts = …`.
        chat_template (`str`, *optional*):
            A chat template in Jinja, by default [`QUESTION_TEMPLATE`]; see [`PrismerProcessor.apply_chat_template`].
        task (`str`, *optional*, defaults to `"caption"`):
            The name of the [`Task`] that the checkpoint was trained for. It decides about prompts, suffixes and
            candidates:

            - `"caption"`: the default prompt is `A picture of`; captions and candidates are lower case.
            - `"vqa"`: the prompt is a question, cleaned by [`clean_question`]; answers are capitalised.
            - `"classification"`: the default prompt is `A photo of a`; classes are lower case.
            - a task of your own, which [`register_task`] has registered.
        tasks (`list[str]`, *optional*):
            All tasks of a checkpoint that was trained for several. Pass `task=…` in the call to choose one. Without
            it, a text that begins with the prompt of one of these tasks belongs to that task, unless it ends with `?`.
            Any other text belongs to `task`. Without a text, the image is captioned.

    You can add tokens to the tokenizer (`processor.tokenizer.add_tokens(…)`). Prompts, suffixes and candidates keep
    them as they are written, and each becomes its id. Control tokens such as `</s>` and `<pad>` are protected: in a
    text, they are ordinary letters.

    Example:

    ```python
    >>> from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor

    >>> processor = PrismerProcessor.from_pretrained(path)
    >>> model = PrismerForConditionalGeneration.from_pretrained(path)
    >>> inputs = processor(images=image, text="what color is the shape")
    >>> {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    {'input_ids': (1, 7), 'attention_mask': (1, 7), 'pixel_values': (1, 3, 64, 64), 'edge_values': (1, 1, 64, 64),
     'ocr_ids': (1, 64, 64), 'ocr_features': (1, 16, 64), 'expert_mask': (1, 2)}
    >>> generated = model.generate(**inputs, num_beams=3)
    >>> processor.post_process_generation(generated, prompt_length=inputs["input_ids"].shape[1])
    ['teal']
    ```
    """

    valid_processor_kwargs = PrismerProcessorKwargs

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        experts: Any = None,
        chat_template: str | None = None,
        task: str = "caption",
        tasks: list[str] | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template or QUESTION_TEMPLATE)
        tokenizer.padding_side = "left"  # `generate` needs it, and a pipeline pads its batches with it
        for token in ("bos_token", "eos_token", "pad_token"):
            if getattr(tokenizer, f"{token}_id", None) is None:
                raise ValueError(
                    f"the tokenizer has no {token}; a tokenizer like RoBERTa's, with <s>, </s> and <pad>, is needed"
                )
        for name in [task, *(tasks or ())]:
            find_task(name)
        if tasks and task not in tasks:
            raise ValueError(f"task is {task!r}; it is not among the tasks {', '.join(map(repr, tasks))}")
        self.task = task
        self.tasks = tasks
        self.experts = experts

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | list[list[str]] | None = None,
        expert_labels: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        suffix: str | list[str] | list[list[str]] | None = None,
        experts: list[str] | str | None = None,
        task: str | list[str] | list[list[str]] | None = None,
        budget_ms: float | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Prepares the inputs of `forward` and `generate`.

        Args:
            images:
                One or many images: paths, URLs, PIL images, arrays, tensors; see [`load_images`].
            text (`str`, `list[str]` or `list[list[str]]`, *optional*):
                The prompts: questions for `"vqa"`, the beginning of the sentence for other tasks. A string is used for
                every image. A list has one prompt for each image, or n, with those of the first image first. A list of
                lists has the n prompts of each image. The network encodes an image once for its n rows.
            expert_labels (`dict` or `list[dict]`, *optional*):
                A dict from an expert's name to its label for each image; see [`PrismerImageProcessor.preprocess`].
                Live experts run only for the names that are absent. A label of `None` marks a missing expert.
            suffix (`str`, `list[str]` or `list[list[str]]`, *optional*):
                For training: the caption, answer or class that follows each prompt, in the layout of `text`. It gets
                the form of the task, and the result has `labels`. If one prompt is used for all, or none is given, an
                image can have several suffixes.
            experts (`list[str]` or `"auto"`, *optional*):
                The names of the experts to use in this call, live or from `expert_labels`. The others are masked out.
                `[]` means none. With `"auto"`, `processor.router` chooses for each image from its texts.
            task (`str`, or in the layout of `text`, *optional*):
                The task of the texts. By default the processor's `task`, except for texts that begin with the prompt
                of another one of its `tasks`.
            budget_ms (`float`, *optional*):
                For `experts="auto"`: the mean time of the experts for an image with one text, in milliseconds, on the
                machine on which the router was trained. By default, the time at which it loses almost nothing.
            kwargs:
                `return_tensors` (defaults to `"pt"`), `padding` (`True`), `truncation` (`True`), `max_length` (in
                tokens; by default the limits of the [`Task`]), `padding_side` (`"left"`), `pad_to_multiple_of`, and
                the arguments of the image processor.

        Returns:
            [`BatchFeature`] with rows = images × prompts per image:

            - `input_ids` (rows, T) int64: `<s>` + prompt, and with `suffix` the suffix + `</s>`; padded on the left;
            - `attention_mask` (rows, T) int64;
            - `labels` (rows, T) int64, with `suffix`: -100 on prompt and padding;
            - `pixel_values`, the experts' tensors and `expert_mask`, with `images` rows; see
              [`PrismerImageProcessor.preprocess`].

        Raises:
            ValueError: if there is no image, if the numbers of images, prompts, suffixes or labels do not fit, if an
                expert is not in the configuration, or if the image processor raises one.

        Example:

        ```python
        >>> questions = [["What shape is it?", "Is it red?"], ["What color is it?", "Is it a circle?"]]
        >>> inputs = processor([image, image], questions)  # two for each image
        >>> inputs["pixel_values"].shape, inputs["input_ids"].shape
        (torch.Size([2, 3, 64, 64]), torch.Size([4, 7]))
        >>> edges = processor.experts["edge"]([image])[0]  # or your own map: uint8 (H, W)
        >>> inputs = processor(image, "Is it red?", expert_labels={"edge": edges, "ocr": None})
        >>> inputs["expert_mask"]
        tensor([[ True, False]])
        ```
        """
        if images is None:
            raise ValueError(
                "images is missing: Prismer needs an image. Pass images=…, or call processor.tokenizer(text) for "
                "tokens alone. A pipeline takes both: images=… and text=…"
            )
        kwargs = self._merge_kwargs(**kwargs)
        images, labels = self._open(images, expert_labels, kwargs["images_kwargs"])
        # texts first, to find mistakes before the experts run
        prompts, suffixes, tasks = self._texts(text, suffix, task, len(images))
        data = self._tokenize(prompts, suffixes, tasks, **kwargs["text_kwargs"])
        each = len(prompts) // len(images)
        texts = [prompts[start : start + each] for start in range(0, len(prompts), each)]
        labels = self._run_experts(images, labels, *self._choose_experts(images, experts, texts, budget_ms))
        data.update(self._image_inputs(images, labels, **kwargs["images_kwargs"]))
        if experts == "auto":
            self.without_missing(data)
        return BatchFeature(data, tensor_type=kwargs["text_kwargs"]["return_tensors"])

    # ---- conversations ----

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = False,
        return_tensors: str | TensorType | None = "auto",
        return_dict: bool = False,
        images: Any = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        The prompt of a conversation by the chat template, or its tensors.

        Prismer was trained on single questions. The template therefore takes the last text of the user as the prompt,
        and the network reads the last image. Earlier turns and system messages are left out. Without a text, or for
        "Describe this image", the prompt is that of the task, such as `A picture of`.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`):
                One or many conversations. A content is a text or a list of items, `{"type": "text", "text": …}` and
                `{"type": "image", "image": …}` (or `url`, `path`, `base64`, `image_url`).
            chat_template (`str`, *optional*): a template, or the name of one.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): a variable of the template.
            continue_final_message (`bool` or `str`, *optional*, defaults to `False`):
                Whether the network goes on with the last turn of the assistant. Otherwise `</s>` ends that turn.
            tokenize (`bool`, *optional*, defaults to `False`): whether to return tensors instead of text.
            return_tensors (`str`, *optional*): `"pt"` (the default), `"np"`, or `None`.
            return_dict (`bool`, *optional*, defaults to `False`):
                Whether to return all inputs of the model, in place of `input_ids` alone.
            images (`list` or `list[list]`, *optional*):
                The images of items that have none: of the conversation, or for each of many conversations.
            processor_kwargs (`dict`, *optional*):
                Arguments of [`PrismerProcessor.__call__`], such as `task`, `experts` or `expert_labels`.
            kwargs: variables of the template; also `processor_kwargs`.

        Returns:
            `str`, `list[str]`, tensors, or [`BatchFeature`].

        Raises:
            ValueError: if a conversation has no turn of the user, no image, or several images in its last message with
                images, or if the task needs a text and there is none.

        Example:

        ```python
        >>> content = [{"type": "image", "image": image}, {"type": "text", "text": "What shape is it?"}]
        >>> messages = [{"role": "user", "content": content}]
        >>> inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        >>> processor.post_process_generation(model.generate(**inputs), inputs["input_ids"].shape[1])
        ['triangle']
        >>> messages += [{"role": "assistant", "content": "triangle"}, {"role": "user", "content": "Is it red?"}]
        >>> processor.apply_chat_template(messages)
        'Is it red?'
        ```
        """
        names = {*CALL_NAMES, "task"}.intersection(kwargs)
        call_kwargs = {name: kwargs.pop(name) for name in names} | (processor_kwargs or {})
        if return_tensors != "auto":
            call_kwargs["return_tensors"] = return_tensors
        images = call_kwargs.pop("images", images)
        conversations, is_batch = as_batch(conversation)
        given: Iterable[Any] = [None] * len(conversations) if images is None else images if is_batch else [images]
        read = [read_messages(messages, own)[0] for messages, own in zip(conversations, given, strict=True)]
        template = self._resolve_chat_template(chat_template)
        variables = {**self.tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt, **kwargs}
        task = call_kwargs.get("task")
        if not tokenize:
            variables["continue_final_message"] = continue_final_message
            texts = [self._prompt_of(messages, task, template, variables) for messages in read]
            return texts if is_batch else texts[0]

        answers = [messages.pop()["content"] for messages in read if messages[-1]["role"] == "assistant"]
        if answers:
            if len(answers) < len(read):
                raise ValueError(
                    "some conversations end with a turn of the assistant and some do not; split the batch"
                )
            call_kwargs["suffix"] = ["".join(item["text"] for item in content) for content in answers]
            call_kwargs["padding_side"] = "left"
        call_kwargs["text"] = [self._prompt_of(messages, task, template, variables) for messages in read]
        inputs = self([_last_image(messages) for messages in read], **call_kwargs)
        if answers:
            del inputs["labels"]
            if continue_final_message:  # without </s>
                for name in ("input_ids", "attention_mask"):
                    inputs[name] = inputs[name][:, :-1]
        return inputs if return_dict else inputs["input_ids"]

    def _prompt_of(self, messages: list[dict], task: str | None, template: str, variables: dict[str, Any]) -> str:
        if not any(message["role"] == "user" for message in messages):
            raise ValueError("the conversation has no turn of the role 'user'; Prismer's prompt is the last one")
        return render(messages, template, **variables) or _own_prompt(find_task(task or self.task_for(None)))

    # ---- text ----

    def _texts(
        self,
        text: str | list[str] | list[list[str]] | None,
        suffix: str | list[str] | list[list[str]] | None,
        task: str | list[str] | list[list[str]] | None,
        num_images: int,
    ) -> tuple[list[str], list[str] | None, list[Task]]:
        """The prompt, the suffix and the task of each row."""
        if task is None and text is None:
            task = self.task_for(None)
        if suffix is not None:
            suffix = [suffix] if isinstance(suffix, str) else _flatten_texts(suffix, num_images, "suffix")
        if text is not None and not isinstance(text, str):
            text = _flatten_texts(text, num_images, "text")
            num_rows = len(text)
        else:  # a prompt for all rows: an image has as many rows as suffixes
            num_rows = num_images if suffix is None else len(suffix)
        if not num_rows or num_rows % num_images:
            raise ValueError(
                f"{num_rows} texts for {num_images} images; as many texts as images, or a multiple, is needed"
            )
        if suffix is not None and len(suffix) != num_rows:
            raise ValueError(f"{len(suffix)} suffixes for {num_rows} prompts; one for each prompt is needed")
        prompts = [text] * num_rows if isinstance(text, str) else text or []
        if task is None:
            read = [self._task_of(prompt) for prompt in prompts]
            tasks, prompts = [name for name, _ in read], [prompt for _, prompt in read]
        else:
            tasks = [task] * num_rows if isinstance(task, str) else _flatten_texts(task, num_images, "task")
        if len(tasks) != num_rows:
            raise ValueError(f"{len(tasks)} tasks for {num_rows} prompts; one for each prompt is needed")
        found = [find_task(name) for name in tasks]
        if text is None:
            prompts = [_own_prompt(task) for task in found]
        keep = self._added_tokens
        prompts = [task.clean_prompt(prompt, keep=keep) for prompt, task in zip(prompts, found)]
        if suffix is not None:
            suffix = [self._written(task.clean_suffix(each, keep=keep), task) for each, task in zip(suffix, found)]
        return prompts, suffix, found

    def task_for(self, text: str | list[str] | list[list[str]] | None) -> str:
        """
        Returns the name of the task that texts belong to if the call names no `task`.

        Args:
            text (`str`, `list[str]`, `list[list[str]]`, *optional*): as in [`PrismerProcessor.__call__`].

        Raises:
            ValueError: if the texts belong to several tasks.
        """
        if text is None:
            found = [find_task(name) for name in (self.task, *(self.tasks or ()))]
            return next((task.name for task in found if task.prompt is not None and not task.is_ranked), self.task)
        if isinstance(text, str):
            return self._task_of(text)[0]
        tasks = sorted({self.task_for(each) for each in text})
        if len(tasks) > 1:
            raise ValueError(f"the texts belong to several tasks, {' and '.join(tasks)}; name one: task=…")
        return tasks[0] if tasks else self.task

    def _task_of(self, text: str) -> tuple[str, str]:
        """The task of a text, and the text with that task's prompt as it was learned."""
        for name in self.tasks or ():
            found = find_task(name).with_own_prompt(text)
            if found is not None:
                return name, found
        return self.task, text

    def _written(self, suffix: str, task: Task) -> str:
        return " " + task.write_suffix(suffix.strip(), keep=self._added_tokens)

    # ---- tokens ----

    @property
    def _control_tokens(self) -> set[str]:
        """The tokens with a meaning for the network, such as the beginning and the end of a text."""
        return {str(token) for name in CONTROL_TOKENS if (token := getattr(self.tokenizer, name, None)) is not None}

    @property
    def _added_tokens(self) -> re.Pattern[str] | None:
        """A pattern of the tokens that were added to the vocabulary, without control tokens."""
        control = self._control_tokens
        return _pattern_of(tuple(token for token in self._listed_tokens() if token[0] not in control))

    def _listed_tokens(self) -> Iterator[tuple[str, bool]]:
        for token in self.tokenizer.added_tokens_decoder.values():
            yield token.content, token.single_word

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        """Added tokens become their ids. Control tokens in a text, such as "</s>" in a question, stay text."""
        control = self._control_tokens
        if not any(token in text for text in texts for token in control):
            return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        every_token = _pattern_of((*self._listed_tokens(), *((token, False) for token in sorted(control))))
        ids: list[list[int]] = [[] for _ in texts]
        for own, text in zip(ids, texts):
            for piece in _split_at(every_token, control, text):
                own += self.tokenizer(piece, add_special_tokens=False, split_special_tokens=piece in control)[
                    "input_ids"
                ]
        return ids

    def _tokenize(
        self,
        prompts: list[str],
        suffixes: list[str] | None,
        tasks: list[Task],
        max_length: int | None = None,
        truncation: bool | str | None = True,
        padding: bool | str | None = True,
        padding_side: str = "left",
        pad_to_multiple_of: int | None = None,
        **kwargs: Any,
    ) -> dict[str, list[list[int]]]:
        rows = [[self.tokenizer.bos_token_id, *ids] for ids in self._token_ids(prompts)]
        learned: list[list[int]] = [[] for _ in rows]
        if suffixes is not None:
            learned = [[*ids, self.tokenizer.eos_token_id] for ids in self._token_ids(suffixes)]
        limits = [max_length or task.max_prompt_tokens for task in tasks]
        # tokens of prompt and suffix together; `None` leaves suffixes whole
        totals = [None if suffixes is None else max_length or task.max_tokens for task in tasks]
        if truncation:
            for i, (limit, total) in enumerate(zip(limits, totals)):
                if len(rows[i]) > limit and suffixes is None:
                    logger.warning_once(
                        f"a text of {len(rows[i])} tokens is cut to its first {limit}: {prompts[i][:60]!r}…; "
                        "`max_length` changes the limit, `truncation=False` removes it"
                    )
                if total is None:
                    rows[i] = rows[i][:limit]
                    continue
                rows[i] = rows[i][: max(1, min(limit, total - 2))]
                room = max(1, total - len(rows[i]))
                if len(learned[i]) > room:  # cut before </s>
                    learned[i] = learned[i][: room - 1] + learned[i][-1:]
        ends: Sequence[int | None] = limits if suffixes is None else totals
        length = None if None in ends else max(filter(None, ends))
        labels = [[-100] * len(row) + ids for row, ids in zip(rows, learned)]
        rows = [row + ids for row, ids in zip(rows, learned)]

        data = dict(
            self.tokenizer.pad(
                {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
                padding=padding,
                max_length=length if padding == "max_length" else None,
                pad_to_multiple_of=pad_to_multiple_of,
                padding_side=padding_side,
            )
        )
        if suffixes is not None:
            missing = [[-100] * (len(ids) - len(row)) for ids, row in zip(data["input_ids"], labels)]
            data["labels"] = [p + row if padding_side == "left" else row + p for p, row in zip(missing, labels)]
        return data

    def prepare_candidates(
        self,
        answers: list[str],
        return_tensors: str | TensorType | None = "pt",
        padding: bool | str = True,
        task: str | None = None,
    ) -> BatchFeature:
        """
        Tokenises the candidates for `model.rank_candidates`, in the form of the task.

        Args:
            answers (`list[str]`): the candidates, which are captions, answers or class names.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, `"np"`, or `None` for lists.
            padding (`bool` or `str`, *optional*, defaults to `True`): as for a tokenizer.
            task (`str`, *optional*):
                The task whose form the candidates get, by default the processor's `task`. Use
                `processor.task_for(text)` for candidates that follow a text.

        Returns:
            [`BatchFeature`] with `candidate_ids` and `candidate_mask`, (number of answers, T) int64: `" "` + answer +
            `</s>` without `<s>`, padded on the right.

        Raises:
            ValueError: if there are no answers, or an empty one.
        """
        answers = [answers] if isinstance(answers, str) else list(answers)
        if not answers or not all(answer.strip() for answer in answers):
            raise ValueError("answers is empty or has an empty text; at least one answer with text is needed")
        answers = [self._written(answer, find_task(task or self.task)) for answer in answers]
        rows = [[*ids, self.tokenizer.eos_token_id] for ids in self._token_ids(answers)]
        padded = self.tokenizer.pad(
            {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]},
            padding=padding,
            padding_side="right",
        )
        data = {"candidate_ids": padded["input_ids"], "candidate_mask": padded["attention_mask"]}
        return BatchFeature(data, tensor_type=return_tensors)

    def post_process_generation(
        self,
        generated_ids: torch.Tensor | np.ndarray | list[list[int]],
        prompt_length: int = 0,
        task: str | None = None,
    ) -> list[str]:
        """
        Decodes the captions, answers or classes from `model.generate`.

        Args:
            generated_ids (`torch.Tensor` of shape `(rows, T)`): prompt and continuation, as `generate` returns them.
            prompt_length (`int`, *optional*, defaults to 0): number of columns to cut off, those of the prompt:
                `inputs["input_ids"].shape[1]`.
            task (`str`, *optional*): as in [`PrismerProcessor.__call__`].

        Returns:
            `list[str]`: the trimmed texts in the form of their task, such as lower case for answers. Tokens that were
            added to the vocabulary stay as they are written. Control tokens such as `</s>` are left out.
        """
        texts = []
        for row in generated_ids:
            ids = row if isinstance(row, list) else row.tolist()
            text = self._decode(ids[prompt_length:]).strip()
            name = task or (self._task_of(self._decode(ids))[0] if self.tasks else self.task)
            texts.append(find_task(name).read_suffix(text, keep=self._added_tokens))
        return texts

    def post_process_image_text_to_text(
        self,
        generated_outputs: torch.Tensor | np.ndarray | list[Any],
        skip_special_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """
        Decodes prompt and continuation as they were generated, for a pipeline.

        Args:
            generated_outputs (`torch.Tensor` of shape `(rows, T)` or `(T,)`): as `generate` returns them.
            skip_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether to leave out control tokens such as `</s>`. Tokens that were added to the vocabulary stay.
            kwargs: passed on to the tokenizer's `decode`.

        Returns:
            `list[str]`, or `str` for one row without a batch dimension.
        """
        ids = generated_outputs if isinstance(generated_outputs, list) else generated_outputs.tolist()
        if ids and not isinstance(ids[0], int):
            return [self.post_process_image_text_to_text(row, skip_special_tokens, **kwargs) for row in ids]
        return self._decode(ids, **kwargs) if skip_special_tokens else self.tokenizer.decode(ids, **kwargs)

    def _decode(self, ids: list[int], **kwargs: Any) -> str:
        """Decodes ids without control tokens. Added tokens stay, even special ones."""
        control = set(self.tokenizer.convert_tokens_to_ids(sorted(self._control_tokens)))
        return self.tokenizer.decode([number for number in ids if number not in control], **kwargs)


def _flatten_texts(texts: Iterable[Any], num_images: int, name: str) -> list[str]:
    texts = list(texts)
    if all(isinstance(text, str) for text in texts):
        return texts
    if not all(isinstance(group, list | tuple) and all(isinstance(text, str) for text in group) for group in texts):
        raise TypeError(
            f"{name} must be a string, a list of strings, or a list of lists of strings, one for each image"
        )
    if len(texts) != num_images:
        raise ValueError(f"{name} has {len(texts)} lists for {num_images} images; one list for each image is needed")
    counts = [len(group) for group in texts]
    if len(set(counts)) > 1:
        raise ValueError(
            f"{name} has lists of {', '.join(map(str, counts))} entries; every image needs the same number, because "
            "the rows of a batch are divided evenly among its images"
        )
    return [text for group in texts for text in group]


def _last_image(messages: Iterable[dict[str, Any]]) -> Any:
    """The image that a question is about: that of the last message with an image."""
    for message in reversed(list(messages)):
        images = [item["image"] for item in message.get("content", ()) if item["type"] == "image"]
        if len(images) > 1:
            raise ValueError(f"a message has {len(images)} images; Prismer reads one image for each question")
        if images and images[0] is not None:
            return images[0]
    raise ValueError(
        "the conversation has no image: Prismer needs one. Add {'type': 'image', 'image': …} to a message of the user"
    )


def _own_prompt(task: Task) -> str:
    if task.prompt is None:
        raise ValueError(
            f"text is missing: the task {task.name!r} needs a {task.prompt_column} for each image. For the image "
            "inputs alone, call processor.process_images(images)"
        )
    return task.prompt


__all__ = ["PrismerProcessor"]
