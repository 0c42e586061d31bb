"""Language models without images: what the questions alone reveal."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchFeature

from modeling_prismer import PrismerLMForConditionalGeneration

from .arguments import CompareArguments
from .generative import GenerativeModel, batches
from .models import Query
from .prompts import CHAT, PLAIN_TEXT, Prompts


class LanguageModel(GenerativeModel):
    """A language model. It gets the texts alone, so that it is the floor for models that see."""

    kind = "language"

    def __init__(self, path: str, args: CompareArguments):
        super().__init__(path, args)
        self.network = AutoModelForCausalLM.from_pretrained(path, dtype=args.torch_dtype).to(args.torch_device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.is_chat = self.tokenizer.chat_template is not None
        self.prompts: Prompts = (CHAT if self.is_chat else PLAIN_TEXT).changed_by(args)
        # a PrismerLM without encoders and experts is the language model itself
        self.ranker = PrismerLMForConditionalGeneration.from_backbones(self.network)
        self.separator = "" if self.is_chat else " "

    def prepare(self, queries: Sequence[Query]) -> BatchFeature:
        return self.encode([self.write(query) for query in queries])

    def encode(self, texts: Sequence[str]) -> BatchFeature:
        encoded = self.tokenizer(list(texts), padding=True, return_tensors="pt", add_special_tokens=not self.is_chat)
        encoded.pop("token_type_ids", None)
        return BatchFeature(dict(encoded))

    def write(self, query: Query) -> str:
        turns: list[tuple[str, str]] = []
        for example in query.examples:
            turns += [("user", self.prompts.of(example.text)), ("assistant", example.answer)]
        turns.append(("user", query.text if query.has_instruction else self.prompts.of(query.text)))
        if not self.is_chat:
            shown = [f"{asked} {answer}\n\n" for (_, asked), (_, answer) in zip(turns[:-1:2], turns[1::2])]
            return "".join([*shown, turns[-1][1]])
        messages = [{"role": role, "content": text} for role, text in turns]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def answer(self, queries: Sequence[Query], max_new_tokens: int) -> list[str]:
        """Queries with the same text are answered once."""
        asked = {self.write(query): query for query in queries}
        answers = dict(zip(asked, super().answer(list(asked.values()), max_new_tokens), strict=True))
        return [answers[self.write(query)] for query in queries]

    def rank(self, queries: Sequence[Query], candidates: Sequence[str]) -> np.ndarray:
        """Each text runs once for all candidates, and once for all images that it is about."""
        texts = list(dict.fromkeys(self.write(query) for query in queries))
        rows = [torch.tensor(self.candidate_tokens(candidate)) for candidate in candidates]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        scores: dict[str, np.ndarray] = {}
        for batch in batches(texts, self.args.batch_size, "ranking"):
            inputs = self.encode(batch).to(self.network.device)
            ranking = self.ranker.rank_candidates(ids, mask, len(candidates), **inputs)
            for text, columns, own in zip(batch, ranking.indices.cpu(), ranking.scores.float().cpu(), strict=True):
                scores[text] = np.empty(len(candidates))
                scores[text][columns.numpy()] = own.numpy()
        return np.stack([scores[self.write(query)] for query in queries])
