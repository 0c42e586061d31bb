"""The tasks of a checkpoint, such as captions and questions. All that depends on a task is in its [`Task`]."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol


# ---- forms of a text ----


class TextForm(Protocol):
    """Changes a text, except what the pattern `keep` matches: tokens that were added to the vocabulary."""

    def __call__(self, text: str, /, *, keep: re.Pattern[str] | None) -> str: ...


_PUNCTUATION = re.compile(r'[.!"()*#:;~]')


def clean_caption(caption: str, max_words: int = 30, keep: re.Pattern[str] | None = None) -> str:
    r"""
    Cleans a caption as in the training of the published checkpoints. The first letter becomes upper case and the rest
    lower case. Each of `. ! " ( ) * # : ; ~` becomes a space, and two or more white-space characters become one space.
    The result is trimmed and cut after `max_words` words.

    Args:
        caption (`str`): The caption.
        max_words (`int`, *optional*, defaults to 30): The number of words to keep.
        keep (`re.Pattern`, *optional*): Matches stay as they are. Use it for tokens that you added to the vocabulary.

    Example:

    ```python
    >>> import re
    >>> from modeling_prismer.processing import clean_caption

    >>> clean_caption("THE QUICK*BROWN~FOX: #1")
    'The quick brown fox 1'
    >>> clean_caption("a [DEFECT] On top.", keep=re.compile(r"\[DEFECT\]"))
    'A [DEFECT] on top'
    ```
    """

    def clean(text: str) -> str:
        return re.sub(r"\s{2,}", " ", _PUNCTUATION.sub(" ", text))

    caption = _outside(keep, clean, capitalize(caption, keep=keep)).strip()
    return " ".join(caption.split(" ")[:max_words])


def clean_question(question: str, max_words: int = 30, keep: re.Pattern[str] | None = None) -> str:
    """
    Cleans a question as in the training of the published checkpoints. It works like [`clean_caption`], but keeps the
    white space inside the question and appends a `?` if there is none at the end.

    Args:
        question (`str`): The question.
        max_words (`int`, *optional*, defaults to 30): The number of words to keep.
        keep (`re.Pattern`, *optional*): Matches stay as they are. Use it for tokens that you added to the vocabulary.

    Example:

    ```python
    >>> from modeling_prismer.processing import clean_question

    >>> clean_question("is it (really) raining!?")
    'Is it  really  raining ?'
    ```
    """
    question = capitalize(question, keep=keep)
    question = _outside(keep, lambda text: _PUNCTUATION.sub(" ", text), question).strip()
    question = " ".join(question.split(" ")[:max_words])
    return question if question.endswith("?") else question + "?"


def lower_case(text: str, keep: re.Pattern[str] | None = None) -> str:
    """`text.lower()`, except what `keep` matches."""
    return _outside(keep, str.lower, text)


def capitalize(text: str, keep: re.Pattern[str] | None = None) -> str:
    """`text.capitalize()`, except what `keep` matches."""
    first = keep.search(text) if keep else None
    if first is None:
        return text.capitalize()
    return text[: first.start()].capitalize() + lower_case(text[first.start() :], keep)


def trim_end(text: str, keep: re.Pattern[str] | None = None) -> str:
    """`text.rstrip()`."""
    return text.rstrip()


def unchanged(text: str, keep: re.Pattern[str] | None = None) -> str:
    """The text itself."""
    return text


def _outside(keep: re.Pattern[str] | None, change: Callable[[str], str], text: str) -> str:
    """Applies `change` to the pieces of the text between the matches of `keep`."""
    changed, end = "", 0
    for match in keep.finditer(text) if keep else ():
        changed += change(text[end : match.start()]) + match[0]
        end = match.end()
    return changed + change(text[end:])


# ---- tasks ----


@dataclass(frozen=True)
class Task:
    """
    Everything that depends on a task: its prompt, the forms of its texts, its limits and its generation settings.
    Processor, data collator, recipes, command line, conversion and web demo all ask this object.

    A sample is `<s>` + prompt + `" "` + suffix + `</s>`. The network learns the suffix: a caption, an answer, a class.

    Args:
        name (`str`):
            The name of the task, for `PrismerProcessor(task=…)` and processor_config.json.
        prompt (`str`, *optional*):
            The prompt of the task, `""` for a task that begins with the suffix. Without it, the user writes a text for
            each image.
        clean_prompt (`Callable`, *optional*):
            `clean_prompt(text, keep=pattern)` returns the prompt that the network reads. It can also put the user's
            text into a template. `keep` is a `re.Pattern` of the tokens that were added to the vocabulary, or `None`;
            its matches must stay as they are. By default, white space at the end is removed.
        clean_suffix (`Callable`, *optional*):
            Cleans a suffix for training, with the same arguments. By default, it stays unchanged.
        write_suffix (`Callable`, *optional*):
            Returns the form in which the network writes cleaned suffixes and candidates. By default, unchanged.
        read_suffix (`Callable`, *optional*):
            Turns a generated suffix into the text that the user gets. By default, unchanged.
        max_prompt_tokens (`int`, *optional*, defaults to 30):
            The limit on the tokens of a prompt without a suffix, with `<s>`. Longer prompts are cut.
        max_tokens (`int`, *optional*):
            The limit on the tokens of prompt and suffix together, with `<s>` and `</s>`. By default, prompts keep
            their own limit and suffixes are never cut.
        generation (`dict`, *optional*):
            The settings of `generate` for this task, such as `num_beams` and `max_new_tokens`. Training and conversion
            write them into the checkpoint's generation_config.json.
        is_ranked (`bool`, *optional*, defaults to `False`):
            Whether the suffix is chosen among candidates (`model.rank_candidates`) instead of generated.
        num_ranked (`int`, *optional*):
            The `k` of `model.rank_candidates` with which the paper ranks candidates of this task.
        prompt_column (`str`, *optional*, defaults to `"question"`):
            The column of a data set that has the user's texts, for tasks without a prompt.
        suffix_column (`str`, *optional*, defaults to `"answer"`):
            The column of a data set that has the suffixes.

    Raises:
        ValueError: if `name` or `prompt` is empty, or a limit is too small.

    Example:

    ```python
    >>> from modeling_prismer import Task
    >>> from modeling_prismer.processing.tasks import lower_case

    >>> def where_is(text, keep=None):
    ...     return f"Where is the {lower_case(text.strip(), keep)}?"

    >>> task = Task("pointing", clean_prompt=where_is, generation={"max_new_tokens": 8})
    >>> task.clean_prompt(" Red CUBE", keep=None)
    'Where is the red cube?'
    ```
    """

    name: str
    prompt: str | None = None
    clean_prompt: TextForm = trim_end
    clean_suffix: TextForm = unchanged
    write_suffix: TextForm = unchanged
    read_suffix: TextForm = unchanged
    max_prompt_tokens: int = 30
    max_tokens: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    is_ranked: bool = False
    num_ranked: int | None = None
    prompt_column: str = "question"
    suffix_column: str = "answer"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name is {self.name!r}; a task needs a name such as 'caption'")
        if self.prompt and not self.prompt.strip():
            raise ValueError(
                f"the prompt of the task {self.name!r} is white space; give a text, '' for none, or None if users "
                "write it"
            )
        for limit in ("max_prompt_tokens", "max_tokens"):
            value = getattr(self, limit)
            if value is not None and value < 3:
                raise ValueError(f"{limit} of the task {self.name!r} is {value}; at least 3 is needed")

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a data set, beside the image. The last one is the suffix."""
        return (self.suffix_column,) if self.prompt is not None else (self.prompt_column, self.suffix_column)

    def with_own_prompt(self, text: str) -> str | None:
        """
        The text with the task's prompt as it was learned, if the text begins with that prompt, in upper or lower case,
        and is not a question. `None` for any other text.
        """
        beginning = None if self.prompt is None else _pattern_of_prompt(self.prompt).match(text)
        if beginning is None or text.rstrip().endswith("?"):
            return None
        return f"{self.prompt}{text[beginning.end() :]}"


@lru_cache
def _pattern_of_prompt(prompt: str) -> re.Pattern[str]:
    return re.compile(r"\s*" + r"\s+".join(map(re.escape, prompt.split())) + r"(?!\S)", re.IGNORECASE)


TASKS: dict[str, Task] = {}
"""The registered tasks by name. [`register_task`] adds one."""


def register_task(task: Task, exist_ok: bool = False) -> Task:
    """
    Makes a task known by its name. Do this before you make or load a processor for it.

    Args:
        task ([`Task`]): The task.
        exist_ok (`bool`, *optional*, defaults to `False`): Whether to replace a task of the same name.

    Returns:
        [`Task`]: The task itself.

    Raises:
        TypeError: if `task` is not a [`Task`].
        ValueError: if another task has this name.

    Example:

    ```python
    >>> from modeling_prismer import PrismerProcessor, Task, register_task

    >>> task = register_task(Task("counting", prompt="The number of objects is", generation={"max_new_tokens": 3}))
    >>> counting = PrismerProcessor(processor.image_processor, processor.tokenizer, task="counting")
    >>> inputs = counting(image, suffix="4")
    >>> counting.batch_decode(inputs["input_ids"])
    ['<s>The number of objects is 4</s>']
    ```
    """
    if not isinstance(task, Task):
        raise TypeError(f"task is a {type(task).__name__}; register_task needs a Task")
    if TASKS.get(task.name, task) != task and not exist_ok:
        raise ValueError(f"a task {task.name!r} is registered already; choose another name, or pass exist_ok=True")
    TASKS[task.name] = task
    return task


def find_task(name: str) -> Task:
    """
    The registered task of a name.

    Raises:
        ValueError: if there is none. The message lists the registered tasks and says how to register one.
    """
    if name not in TASKS:
        raise ValueError(
            f"task is {name!r}; accepted are {', '.join(map(repr, TASKS))}. Register a task of your own before you "
            f"make or load its processor: modeling_prismer.register_task(modeling_prismer.Task({name!r}, …))"
        )
    return TASKS[name]


register_task(
    Task(
        "caption",
        prompt="A picture of",
        clean_suffix=clean_caption,
        write_suffix=lower_case,
        max_tokens=30,
        generation={"num_beams": 3, "max_length": 20, "min_length": 8},  # lengths with the prompt
        suffix_column="caption",
    )
)
register_task(
    Task(
        "vqa",
        clean_prompt=clean_question,
        write_suffix=capitalize,
        read_suffix=lower_case,
        max_prompt_tokens=35,
        num_ranked=16,
        generation={"num_beams": 3, "max_new_tokens": 10, "min_new_tokens": 2, "length_penalty": -1.0},
    )
)
register_task(
    Task(
        "classification",
        prompt="A photo of a",
        write_suffix=lower_case,
        max_tokens=30,
        generation={"max_new_tokens": 10},
        is_ranked=True,
        num_ranked=32,
        suffix_column="class",
    )
)
register_task(
    Task(
        "zero_shot_caption",  # of the published checkpoints that were only pre-trained
        prompt="",
        clean_suffix=clean_caption,
        max_tokens=30,
        generation={"num_beams": 3, "max_length": 20, "min_length": 8},
        suffix_column="caption",
    )
)


__all__ = ["TASKS", "Task", "clean_caption", "clean_question", "find_task", "register_task"]
