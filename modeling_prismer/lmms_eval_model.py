"""
Prismer and PrismerLM as models of lmms-eval. It finds them by the entry point `lmms_eval.models` of this package:

    lmms-eval --model prismer --model_args pretrained=CHECKPOINT --tasks vqav2_val,coco2017_cap_val --batch_size 32
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from .command_line.checkpoints import Checkpoint


MAX_NEW_TOKENS = 64  # if neither the checkpoint nor the task has a limit
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
LIMITS = ("max_new_tokens", "max_length")
SETTINGS = ("max_new_tokens", "num_beams", "do_sample", "temperature", "top_p", "top_k", "length_penalty")

_OPTION = re.compile(r"^\s*\(?([A-Z])[.):]\s*(\S.*?)\s*$", re.MULTILINE)  # "A. a cube", "(A) a cube"
_QUESTION = re.compile(r"[^\n]*\?")
_CAPTION = re.compile(r"\b(caption|describe)\b", re.IGNORECASE)


@dataclass
class Question:
    """
    A prompt of lmms-eval as Prismer was trained to read it.

    Args:
        text (`str`): the question without instructions such as "Answer with a single word"; empty for a caption.
        options (`dict[str, str]`): from the letter of each option to its text.
    """

    text: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, context: str) -> "Question":
        options = dict(_OPTION.findall(context))
        without_options = _OPTION.sub("", context)
        question = _QUESTION.search(without_options)
        if question is not None:
            return cls(question[0].strip(), options if len(options) > 1 else {})
        if _CAPTION.search(context):
            return cls("")
        return cls(context.strip().partition("\n")[0])


class Prismer(lmms):
    """
    A Prismer or a PrismerLM for lmms-eval.

    A PrismerLM reads the prompts of the tasks as they are. A Prismer reads the question alone: instructions are left
    out, and a request for a caption becomes the checkpoint's own prompt. If a prompt lists options by letters, Prismer
    ranks their texts and answers with the letter of the best one.

    Args:
        pretrained (`str`, *optional*, defaults to `"prismer-scenes"`): a folder, a Hub id or a shipped checkpoint.
        device (`str`, *optional*): by default a GPU if there is one; in several processes, that of each process.
        dtype (`str`, *optional*, defaults to `"auto"`): the network's precision.
        batch_size (`int`, *optional*, defaults to 1): number of texts that are generated at once.
        experts (`str`, *optional*): experts to run in place of the checkpoint's, as for `prismer caption`.
        language (`str`, *optional*): the folder of a PrismerLM's language model.
        generation (`str`, *optional*, defaults to `"checkpoint"`):
            `"checkpoint"`: the checkpoint's generation_config.json holds, and the task's settings for what it leaves
            open. `"task"`: the task's settings hold.
        num_beams (`int`, *optional*): beams, whatever the others say.

    Raises:
        ValueError: if `generation` is another word, or the checkpoint is neither a Prismer nor a PrismerLM.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "prismer-scenes",
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        experts: str | None = None,
        language: str | None = None,
        generation: str = "checkpoint",
        num_beams: int | None = None,
        max_batch_size: int | None = None,  # lmms-eval passes it
    ):
        super().__init__()
        if generation not in ("checkpoint", "task"):
            raise ValueError(f"generation is {generation!r}; accepted are 'checkpoint' and 'task'")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        is_missing = device is not None and device.startswith("cuda") and not torch.cuda.is_available()
        if device is None or is_missing or self._world_size > 1:  # lmms-eval's default is cuda
            device = str(self.accelerator.device)
        self.device = torch.device(device)
        reader = Checkpoint(pretrained, str(self.device), dtype, experts, language).load()
        self.network, self.processor, self.experts = reader.network, reader.processor, reader.experts_of_calls
        self.is_lm = self.network.config.model_type == "prismer_lm"
        self.batch_size = int(batch_size)
        self.generation = generation
        self.num_beams = num_beams

    # ---- requests of lmms-eval ----

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The generated texts, or the letters of the best options."""
        batches: dict[Hashable, list[int]] = defaultdict(list)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Prismer", disable=self.rank != 0) as progress:
            for number, request in enumerate(requests):
                context, settings, *document = request.args
                question = self._read(context)
                if question.options:
                    answers[number] = self._choose(question, self._visuals(*document))
                    progress.update()
                else:
                    batches[repr(sorted(settings.items()))].append(number)
            for numbers in batches.values():
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    for number, text in zip(batch, self._generate([requests[number].args for number in batch])):
                        answers[number] = text
                    progress.update(len(batch))
        for request, text in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args[:2], text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """
        For each continuation its mean negative log-probability per token, and whether it is what the model would
        write. As for the other models of lmms-eval, this is a loss: the tasks choose the smallest one.

        lmms-eval 0.7.3 turns a plain tuple into a string. It leaves the content of a `GenerationResult` as it is.
        """
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            context, _, _, *document = request.args
            groups[context, *document].append(number)
        results: dict[int, GenerationResult] = {}
        for numbers in tqdm(groups.values(), desc="Prismer", disable=self.rank != 0):
            context, _, *document = requests[numbers[0]].args
            continuations = [self._continuation(*requests[number].args) for number in numbers]
            conversation = self._conversation(self._read(context).text, self._visuals(*document))
            losses = self._losses(conversation, continuations)
            (written,) = self._write([conversation], {"num_beams": 1, "do_sample": False})
            for number, continuation, loss in zip(numbers, continuations, losses):
                results[number] = GenerationResult((loss, written.lower() == continuation.lower()))
        return [results[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("the model 'prismer' has no tasks of several rounds")

    # ---- prompts ----

    def _read(self, context: str) -> Question:
        return Question(context) if self.is_lm else Question.read(context)

    def _visuals(self, to_visual: Any, doc_id: int, task: str, split: str) -> list[Any]:
        return to_visual(self.task_dict[task][split][doc_id])

    def _continuation(self, context: str, target: Any, to_visual: Any, doc_id: int, task: str, split: str) -> str:
        text = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
        return text.strip()

    def _conversation(self, text: str, visuals: Sequence[Any]) -> list[dict[str, Any]]:
        images = [{"type": "image", "image": image} for image in visuals]
        return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]

    def _apply_template(self, conversations: Any, **kwargs: Any) -> Any:
        template = None if self.processor.chat_template else PLAIN_TEMPLATE
        return self.processor.apply_chat_template(
            conversations, chat_template=template, add_generation_prompt=True, **kwargs
        )

    def _inputs(self, conversations: list[Any]) -> Any:
        inputs = self._apply_template(
            conversations, tokenize=True, return_dict=True, processor_kwargs={"experts": self.experts}
        )
        return inputs.to(self.device)

    # ---- the network ----

    def _generate(self, requests: list[tuple]) -> list[str]:
        conversations = [
            self._conversation(self._read(context).text, self._visuals(*document))
            for context, _, *document in requests
        ]
        given = requests[0][1]
        stops = given.get("until") or []
        texts = self._write(conversations, self._settings(given))
        for stop in [stops] if isinstance(stops, str) else stops:
            texts = [text.partition(stop)[0] for text in texts]
        return [text.strip() for text in texts]

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `generate` for the settings of a task."""
        own = {
            name: value for name, value in self.network.generation_config.to_diff_dict().items() if value is not None
        }
        settings = {name: given[name] for name in SETTINGS if given.get(name) is not None}
        if self.generation == "checkpoint":
            is_limited = any(name in own for name in LIMITS)
            taken = {*own, *(LIMITS if is_limited else ())}
            settings = {name: value for name, value in settings.items() if name not in taken}
        if not any(name in own or name in settings for name in LIMITS):
            settings["max_new_tokens"] = MAX_NEW_TOKENS
        if settings.get("temperature"):
            settings.setdefault("do_sample", True)
        else:  # greedy in lmms-eval, and an error in transformers
            settings = {
                name: value for name, value in settings.items() if name not in ("temperature", "top_p", "top_k")
            }
            settings["do_sample"] = False
        if self.num_beams is not None:
            settings["num_beams"] = self.num_beams
        return settings

    def _write(self, conversations: list[Any], settings: dict[str, Any]) -> list[str]:
        inputs = self._inputs(conversations)
        generated = self.network.generate(**inputs, **settings)
        return self.processor.post_process_generation(generated, inputs["input_ids"].shape[1])

    def _losses(self, conversation: list[Any], candidates: list[str]) -> list[float]:
        """The mean negative log-probability of each candidate."""
        task = self.processor.task_for(self._apply_template(conversation))
        encoded = self.processor.prepare_candidates(candidates, task=task).to(self.device)
        with torch.inference_mode():
            ranking = self.network.rank_candidates(**encoded, k=len(candidates), **self._inputs([conversation]))
        losses = dict(zip(ranking.indices[0].tolist(), (-ranking.scores[0]).tolist()))
        return [losses[number] for number in range(len(candidates))]

    def _choose(self, question: Question, visuals: Sequence[Any]) -> str:
        losses = self._losses(self._conversation(question.text, visuals), list(question.options.values()))
        return min(zip(losses, question.options))[1]


def manifests() -> Any:
    """The entry point of lmms-eval. Returns the names of the model and the place of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("prismer", f"{__name__}.{Prismer.__name__}", aliases=("prismer_lm",))
