"""Small tokenizers for the processors: nothing is fetched."""

import json
import string

from tokenizers import ByteLevelBPETokenizer
from transformers import BertTokenizer, GPT2Tokenizer, RobertaTokenizer


SENTENCES = [
    "A picture of a man riding a wave on top of a surfboard",
    "lower newer upper older longer string",
    " a dog a cat yes no red green blue Yes No Red Green Blue Two dogs playing in the park",
]
VOCAB_SIZE = 320


def _byte_pairs(special_tokens: list[str]):
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(SENTENCES, vocab_size=VOCAB_SIZE, min_frequency=1, special_tokens=special_tokens)
    model = json.loads(trainer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def roberta_tokenizer() -> RobertaTokenizer:
    vocab, merges = _byte_pairs(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return RobertaTokenizer(vocab=vocab, merges=merges)


def gpt2_tokenizer() -> GPT2Tokenizer:
    vocab, merges = _byte_pairs(["<|endoftext|>", "<pad>"])
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.pad_token = "<pad>"
    return tokenizer


def bert_tokenizer() -> BertTokenizer:
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    vocab = {token: number for number, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocab, model_input_names=["input_ids", "attention_mask"])
