"""The API. Each call brings its own image, and the server keeps nothing of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from checks import Refused
from inputs import guarded
from PIL import Image
from reader import MAX_LABEL_LETTERS, Reader, parse_labels
from uploads import open_upload

from modeling_prismer.processing.visualization import label_in_words


GUIDE = Path(__file__).with_name("guide.md").read_text(encoding="utf-8")


class Endpoints:
    """Args: reader ([`Reader`]): the checkpoint."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def build(self) -> None:
        """Adds the endpoints to a `gr.Blocks`. They are invisible on the page."""
        names = list(self.reader.specs)
        with gr.Column(visible=False):
            image = gr.Image(label="image", sources=["upload"])
            question = gr.Textbox(label="question")
            labels = gr.Textbox(label="labels", max_length=MAX_LABEL_LETTERS)
            experts = gr.CheckboxGroup(names, value=names, label="experts")
            output, button = gr.JSON(label="result"), gr.Button("call")

        def add(function: Callable, inputs: list[Any], description: str) -> None:
            button.click(
                guarded(function),
                inputs,
                output,
                api_name=function.__name__,
                api_description=description,
                concurrency_id="network",
                preprocess=False,
            )

        add(self.experts, [image], "The output of each expert for an image.")
        if self.reader.caption_task:
            add(self.caption, [image, experts], "A caption, its probability, and the attention of the model.")
        if self.reader.question_task:
            add(self.ask, [image, question, experts], "The answer to a question about an image.")
        add(self.classify, [image, labels, question, experts], "Ranks your own labels, separated by commas.")

    def experts(self, image: Any) -> list[dict[str, Any]]:
        found = []
        for seen in self.reader.look(_required(image)):
            entry = {"name": seen.name, "seconds": round(seen.seconds, 3), "failed": seen.failed}
            found.append(
                entry
                | {"saw": label_in_words(seen.label, self.reader.specs[seen.name], self.reader.class_names(seen.name))}
            )
        return found

    def caption(self, image: Any, experts: list[str] | None = None) -> dict[str, Any]:
        return self._said(image, None, experts)

    def ask(self, image: Any, question: str, experts: list[str] | None = None) -> dict[str, Any]:
        question = "" if question is None else question
        self.reader.prompt(self.reader.task_of(question), question)
        return self._said(image, question, experts)

    def classify(
        self, image: Any, labels: str, question: str = "", experts: list[str] | None = None
    ) -> list[dict[str, Any]]:
        names = parse_labels(labels or "")
        self.reader.prompt(self.reader.ranking_task, question)
        return self.reader.rank(self._encode(_required(image), experts), names, question)

    def _encode(self, image: Image.Image, experts: list[str] | None) -> Any:
        names = list(self.reader.specs)
        wanted = names if experts is None else experts
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise Refused(f"experts: “{unknown[0]}” is unknown; known are: {', '.join(names) or 'none'}.")
        seen = {each.name: each.label for each in self.reader.look(image, wanted)}
        return self.reader.encode(image, seen)

    def _said(self, image: Any, text: str | None, experts: list[str] | None) -> dict[str, Any]:
        encoding = self._encode(_required(image), experts)
        said = self.reader.explain(encoding, text)
        looked = {} if said.looked is None else {"image": said.looked} | said.looked_at_experts
        limit = self.reader.usual_distance
        return {
            "text": said.text,
            "probability": said.probability,
            "per_word": said.per_word,
            "alternatives": [{"text": text, "probability": probability} for text, probability in said.others],
            "attention": {name: round(weights.sum().item(), 4) for name, weights in looked.items()},
            "familiar": None if limit is None else encoding.distance <= limit,
        }


def _required(payload: Any) -> Image.Image:
    image = open_upload(payload)
    if image is None:
        raise Refused("image: an uploaded file is needed.")
    return image
