"""The prompts with which models of each family were trained or evaluated."""

from dataclasses import dataclass, replace

from .arguments import CompareArguments


@dataclass(frozen=True)
class Prompts:
    """
    Args:
        caption (`str`): the prompt for a caption.
        question (`str`): the prompt for an answer, with `{}` for the question.
        one_image (`bool`): whether a prompt can have one image only.
    """

    caption: str
    question: str
    one_image: bool = False

    def of(self, text: str | None) -> str:
        return self.caption if text is None else self.question.replace("{}", text)

    def changed_by(self, args: CompareArguments) -> "Prompts":
        given = {"caption": args.caption_prompt, "question": args.question_prompt}
        return replace(self, **{name: prompt for name, prompt in given.items() if prompt is not None})


# the instruction for short answers is that of LLaVA-1.5
CHAT = Prompts("Describe the image in one sentence.", "{}\nAnswer the question using a single word or phrase.")
# as Flamingo writes its examples
PLAIN_TEXT = Prompts("Output:", "Question: {} Short answer:")
# of models without a chat template, by their type
FAMILIES = {
    "git": Prompts("", "{}", one_image=True),
    "blip-2": Prompts("a photo of", "Question: {} Answer:", one_image=True),
    "paligemma": Prompts("caption en", "answer en {}"),
}
