"""Prismer and PrismerLM. An image is encoded once for all its questions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from feature_cache import encode_images
from lm_training import BACKBONES, batches_by_length, generate_texts
from modeling_prismer import DataCollatorForPrismer, DataCollatorForPrismerLM
from modeling_prismer.command_line.checkpoints import Checkpoint
from modeling_prismer.processing.labels import label_source
from modeling_prismer.processing.tasks import find_task
from scenes.run_lm_scenes import row_with_examples

from .arguments import CompareArguments, check_experts
from .generative import batches
from .models import LETTERS, CannotDo, Model, NamedImage, Query


LIMITS = ("max_new_tokens", "max_length")


class PrismerModel(Model):
    """
    A Prismer or a PrismerLM.

    Args:
        experts (`str`, *optional*): the experts to use, as in `prismer caption --experts`, but not `"auto"`.
    """

    def __init__(self, path: str, args: CompareArguments, experts: str | None = None):
        super().__init__(path, args)
        check_experts(path, experts)
        self.reader = Checkpoint(path, str(args.torch_device), args.dtype, experts, args.language).load()
        self.network, self.processor = self.reader.network, self.reader.processor
        self.is_lm = self.network.config.model_type == "prismer_lm"
        self.kind = "PrismerLM" if self.is_lm else "Prismer"
        names = self.reader.expert_names
        configured = [spec.name for spec in self.reader.specs]
        self.experts = configured if names is None else [name for name in configured if name in names]
        self.expert_bytes = sum(expert.size_in_bytes for expert in self.reader.suite.values())
        settings: dict[str, Any] = {
            "labels_for": label_source(args.labels, self.processor.image_processor.experts),
            "with_suffix": False,
            "experts": names,
        }
        self.is_chat = self.is_lm and self.processor.chat_template is not None
        self.collator: DataCollatorForPrismer
        if self.is_lm:
            given = {"caption": args.caption_prompt, "vqa": args.question_prompt}
            prompts = {task: prompt for task, prompt in given.items() if prompt is not None}
            self.processor.prompts = {**(self.processor.prompts or {}), **prompts}
            self.collator = DataCollatorForPrismerLM(self.processor, as_chat=self.is_chat, **settings)
        else:
            self.collator = DataCollatorForPrismer(self.processor, **settings)

    @property
    def num_trained(self) -> int:
        if self.is_lm:
            named = self.network.named_parameters()
            return sum(own.numel() for name, own in named if own.requires_grad or not name.startswith(BACKBONES))
        with torch.device("meta"):  # the loaded network may have been optimised for a CPU
            copy = type(self.network)(self.network.config)
        copy.freeze_backbones()
        return sum(own.numel() for own in copy.parameters() if own.requires_grad)

    # ---- requests as rows of the collators ----

    def row(self, queries: Sequence[Query], task: str | None) -> dict[str, Any]:
        """A row of the collator for queries about the same image; a Prismer needs the checkpoint's task."""
        first = queries[0]
        if first.examples or len(first.images) != 1:
            return self.row_of_several(first)
        (image,) = first.images
        row: dict[str, Any] = {"image": image.content, "image_id": image.image_id}
        if self.is_lm:
            row["text"] = [self.prompt_of(query.text) for query in queries]
        elif first.text is not None:
            row["text"] = [query.text for query in queries]
        return row if task is None else {**row, "task": [task] * len(queries)}

    def row_of_several(self, query: Query) -> dict[str, Any]:
        """A row for a query with examples or with several images."""
        if not self.is_lm:
            raise CannotDo("a Prismer reads one image and one question: neither examples nor several images")
        if any(example.image is None for example in query.examples):
            raise CannotDo("examples of a PrismerLM have images; leave out --text_examples")
        prompt = self.prompt_of(query.text)
        if query.examples:
            shown = [
                (
                    {"image": own.image.content, "image_id": own.image.image_id},
                    {"question": self.prompt_of(own.text), "answer": own.answer},
                )
                for own in query.examples
                if own.image is not None
            ]
            (image,) = query.images
            last = {"image": image.content, "image_id": image.image_id}
            return row_with_examples(shown, last, prompt, self.is_chat)
        content = "<image>" * len(query.images) + prompt
        row = {
            "images": [image.content for image in query.images],
            "image_ids": [image.image_id for image in query.images],
        }
        if self.is_chat:
            return {**row, "messages": [{"role": "user", "content": content}]}
        return {**row, "text": content}

    def prompt_of(self, text: str | None) -> str:
        return self.processor.prompt_for("caption" if text is None else "vqa", text)

    def task_of(self, query: Query) -> str | None:
        """The checkpoint's task for a question, or for a caption."""
        if self.is_lm:
            return None
        try:
            return self.reader.find_task("caption" if query.text is None else "vqa")
        except ValueError as error:
            raise CannotDo(str(error)) from error

    # ---- what it can be asked ----

    def answer(self, queries: Sequence[Query], max_new_tokens: int) -> list[str]:
        groups, task = group_by_image(queries), self.task_of(queries[0])
        rows = [self.row([queries[number] for number in group], task) for group in groups]
        texts = generate_texts(
            self.network,
            self.collator,
            rows.__getitem__,
            [len(group) for group in groups],
            self.args.batch_size,
            **self.generation(max_new_tokens),
        )
        answers = [""] * len(queries)
        for group, own in zip(groups, texts):
            for number, text in zip(group, own, strict=True):
                answers[number] = text
        return answers

    def generation(self, max_new_tokens: int) -> dict[str, Any]:
        """The settings of `generate` that the checkpoint leaves open."""
        own = self.network.generation_config
        settings: dict[str, Any] = {} if self.args.num_beams is None else {"num_beams": self.args.num_beams}
        if all(getattr(own, name, None) is None for name in LIMITS):
            settings["max_new_tokens"] = max_new_tokens
        return settings

    def rank(self, queries: Sequence[Query], candidates: Sequence[str]) -> np.ndarray:
        return self.rank_as(self.task_of(queries[0]), queries, candidates)

    def rank_as(self, task: str | None, queries: Sequence[Query], candidates: Sequence[str]) -> np.ndarray:
        """As `rank`, for a task of the checkpoint."""
        groups = group_by_image(queries)
        rows = [self.row([queries[number] for number in group], task) for group in groups]
        if self.is_lm:
            encoded = self.reader.prepare_candidates(list(candidates), self.prompt_of(queries[0].text))
        else:
            encoded = self.processor.prepare_candidates(list(candidates), task=task).to(self.network.device)
        scores = np.empty((len(queries), len(candidates)))
        size = self.args.batch_size
        for numbers in tqdm(list(batches_by_length(list(map(len, groups)), size)), desc="ranking", leave=False):
            inputs = self.collator([rows[number] for number in numbers])
            inputs = {name: tensor.to(self.network.device) for name, tensor in inputs.items()}
            with torch.inference_mode():
                ranking = self.network.rank_candidates(**encoded, k=len(candidates), **inputs)
            places = [place for number in numbers for place in groups[number]]
            for place, columns, own in zip(places, ranking.indices.tolist(), ranking.scores.tolist(), strict=True):
                scores[place, columns] = own
        return scores

    def classify(self, images: Sequence[NamedImage], names: Sequence[str]) -> np.ndarray:
        question = self.args.class_question
        if self.is_lm or question is not None:
            return super().classify(images, names)
        known = self.processor.tasks or [self.processor.task]
        tasks = [task for task in ("classification", *known) if task in known and find_task(task).prompt is not None]
        if not tasks:
            raise CannotDo("this checkpoint answers questions only; give the one for classes: --class_question")
        return self.rank_as(tasks[0], [Query((image,)) for image in images], names)

    def choose(self, queries: Sequence[Query], options: Sequence[Sequence[str]]) -> list[str]:
        """A Prismer was trained on short questions: it ranks the texts of the options."""
        if self.is_lm:
            return super().choose(queries, options)
        best = [int(self.rank([query], own).argmax()) for query, own in zip(queries, options, strict=True)]
        return [LETTERS[number] for number in best]

    def embed(self, images: Sequence[NamedImage]) -> np.ndarray:
        """The mean token of an encoded image. Those of a Prismer include the latents of the experts."""
        if self.is_lm and not self.network.config.vision_config:
            raise CannotDo("this PrismerLM has no vision encoder")
        means = []
        names = self.reader.expert_names
        for batch in batches(images, self.args.batch_size, "encoding"):
            rows = [{"image": image.content, "image_id": image.image_id} for image in batch]
            if self.is_lm:
                features = encode_images(self.network, self.processor, rows, self.collator.labels_for, names)
            else:
                opened = [image.open() for image in batch]
                labels = self.collator.labels_for([image.image_id for image in batch])
                inputs = self.processor.process_images(opened, labels, experts=names, return_tensors="pt")
                with torch.inference_mode():
                    features = self.network.get_image_features(**inputs.to(self.network.device)).last_hidden_state
            means.append(features.float().mean(dim=1).cpu().numpy())
        return np.concatenate(means)


def group_by_image(queries: Sequence[Query]) -> list[list[int]]:
    """The numbers of the queries about each image. A query with examples or several images is on its own."""
    groups: dict[Any, list[int]] = {}
    for number, query in enumerate(queries):
        is_plain = len(query.images) == 1 and not query.examples and query.text is not None
        groups.setdefault(query.images[0].image_id if is_plain else number, []).append(number)
    return list(groups.values())
