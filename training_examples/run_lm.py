"""
PrismerLM: frozen vision encoders and experts in front of a frozen language model, trained in two stages as MiniGPT-4.

    python training_examples/run_lm.py --stage captions --language HuggingFaceTB/SmolLM2-135M-Instruct \\
        --vision google/siglip2-base-patch16-224 facebook/dinov2-small --experts fast --train_data my_images \\
        --do_train --output_dir runs/aligned
    python training_examples/run_lm.py --stage questions --model runs/aligned --train_data my_questions chats.jsonl \\
        --eval_data my_questions --do_train --do_eval --learning_rate 3e-5 --output_dir runs/answers

The first stage aligns the new modules on captions, the second one trains them on questions and conversations. Rows are
those of the other recipes (docs/own_data.md), and conversations in the format of LLaVA. The output folder has the
trained weights alone, with the processor and a model card. docs/prismer_lm.md has more.
"""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.data import ConcatDataset
from transformers import AutoConfig, TrainingArguments
from transformers.pytorch_utils import Conv1D

import run_captioning
import run_vqa
from feature_cache import cache_features
from lm_training import CardFacts, LmTrainer, RecipeCollator, tidy_answer
from modeling_prismer import PrismerLMForConditionalGeneration, PrismerLMProcessor
from modeling_prismer.conversion import class_features_from_names
from modeling_prismer.pretrained import find_checkpoint
from modeling_prismer.processing.data import group_by_image, images_of, is_chat_file, leave_undecoded, load_chats
from modeling_prismer.processing.data.images import refuse_doubled_names
from modeling_prismer.processing.experts import ExpertSuite, HashedNgrams
from modeling_prismer.processing.experts.suite import SUITES
from training import (
    RecipeArguments,
    Rows,
    has_bfloat16,
    label_rows,
    load_data,
    make_augmentation,
    parse_arguments,
    run,
)


logger = logging.getLogger("prismer")

DEFAULTS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 64,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "freeze": "both",
    "augment": False,
}
TASKS = {"captions": "caption", "questions": "vqa"}
GENERATION = {"captions": {"num_beams": 3, "max_new_tokens": 30}, "questions": {"num_beams": 1, "max_new_tokens": 10}}
PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}EOS"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


@dataclass
class LmArguments(RecipeArguments):
    model: str | None = field(
        default=None,
        metadata={"help": "A PrismerLM to continue from: a folder or a Hub id. Without it, a new model is made."},
    )
    stage: Literal["captions", "questions"] = field(
        default="captions", metadata={"help": "`captions` for the alignment, or `questions` and conversations."}
    )
    language: str | None = field(
        default=None, metadata={"help": "The language model or vision-language model: a Hub id or a folder."}
    )
    vision: list[str] = field(
        default_factory=list,
        metadata={"help": "Frozen vision encoders: Hub ids, folders, or a shipped Prismer such as prismer-scenes."},
    )
    experts: str | None = field(
        default=None,
        metadata={
            "help": "The experts: published, fast, offline, a folder with a suite, a shipped Prismer, or none. By "
            "default `offline`. The encoder of a Prismer brings its own; `none` masks them out."
        },
    )
    without_experts: str | None = field(
        default=None, metadata={"help": "Experts of the suite to leave out of a new model, such as `ocr`."}
    )
    add_expert: str | None = field(
        default=None,
        metadata={"help": "An expert of the suite to add to --model. Its stem alone is trained."},
    )
    experts_config: str | None = field(
        default=None,
        metadata={"help": 'Fields of PrismerExpertsConfig as JSON, such as {"image_size": 224, "num_latents": 64}.'},
    )
    experts_as: Literal["tokens", "words", "both"] = field(
        default="tokens", metadata={"help": "How the language model gets the experts' output."}
    )
    fusion: Literal["prefix", "cross_attention"] = field(
        default="prefix",
        metadata={"help": "Features in place of placeholder tokens, or gated cross-attention as in Flamingo."},
    )
    cross_attention_every: int = field(default=4, metadata={"help": "A gated block before every n-th layer."})
    cross_attention_intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the blocks' MLPs, by default four times that of the model."}
    )
    projector_hidden_size: int | None = field(
        default=None, metadata={"help": "Width inside the projections, by default that of the language model."}
    )
    question_queries: bool = field(
        default=False, metadata={"help": "Whether the question conditions the resampler. Rows are then not packed."}
    )
    lora: int | None = field(default=None, metadata={"help": "Rank of LoRA in the language model."})
    dora: int | None = field(default=None, metadata={"help": "Rank of DoRA in the language model."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={"help": "Precision of the frozen parts. `auto` is bfloat16 if the hardware supports it."},
    )
    pack: bool = field(
        default=True, metadata={"help": "Whether the texts about an image are packed into one row (--no_pack)."}
    )
    texts_per_image: int | None = field(
        default=None, metadata={"help": "The number of texts of an image to draw each time, by default all."}
    )
    chat: bool = field(
        default=True,
        metadata={"help": "Whether to use the chat template of the language model, if it has one (--no_chat)."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A chat template of a new model, in place of the language model's: a file, or `plain` for "
            "questions and answers alone, which take fewer tokens."
        },
    )
    caption_prompt: str = field(
        default="Describe the image in one sentence.", metadata={"help": "The prompt for captions."}
    )
    question_prompt: str = field(
        default="{}\nAnswer with a word or a short phrase.",
        metadata={"help": "The prompt for a question, which takes the place of {}."},
    )
    max_length: int | None = field(default=None, metadata={"help": "Limit of tokens in a text. Longer ones are cut."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams in evaluation: 3 for captions, else 1."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Limit of generated tokens in evaluation: 30 for captions, else 10."}
    )
    cache_features: bool = field(
        default=False,
        metadata={"help": "Encode each training image once before the training, and keep its features on disk."},
    )
    language_id: str | None = field(
        default=None, metadata={"help": "Hub id of a local --language, for the model card and --publish_to."}
    )
    vision_ids: list[str] = field(
        default_factory=list, metadata={"help": "Hub ids of local --vision, for the model card and --publish_to."}
    )


# ---- the model ----


def find_dtype(name: str) -> torch.dtype:
    """The precision of frozen backbones. On a CPU without hardware for bfloat16, float32 is faster."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if has_bfloat16() else torch.float32


def load_suite(name: str | None, without: str | None = None) -> ExpertSuite | None:
    """The suite of experts of a name, a folder or a shipped Prismer."""
    if name == "none":
        return None
    name = name or "offline"
    suite = ExpertSuite.from_name(name) if name in SUITES else ExpertSuite.from_pretrained(find_checkpoint(name))
    left_out = without.split(",") if without else []
    if unknown := [expert for expert in left_out if expert not in suite]:
        raise SystemExit(f"--without_experts {unknown[0]}: the suite has {', '.join(suite)}")
    return suite.only(*(expert for expert in suite if expert not in left_out)) if left_out else suite


def load_model(args: LmArguments, do_train: bool) -> tuple[PrismerLMForConditionalGeneration, PrismerLMProcessor]:
    """A new model, or that of `--model`, and its processor. Backbones are in `--dtype`, all else in float32."""
    dtype = find_dtype(args.dtype)
    vision = [name for name in args.vision if name != "none"]
    if args.model:
        backbones = {name: value for name, value in (("language", args.language), ("vision", vision)) if value}
        model = PrismerLMForConditionalGeneration.from_pretrained(args.model, dtype=dtype, **backbones)
        processor = PrismerLMProcessor.from_pretrained(args.model)
    else:
        model, processor = new_model(args, vision, dtype)
    if args.add_expert:
        add_expert(model, processor, args)
    elif do_train:
        choose_trained(model, args)
    for name, module in model.model.named_children():
        if name != "language_model":
            module.to(dtype if name == "vision_encoders" else torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model, processor


def new_model(
    args: LmArguments, vision: list[str], dtype: torch.dtype
) -> tuple[PrismerLMForConditionalGeneration, PrismerLMProcessor]:
    if args.language is None:
        raise SystemExit("--language is missing: the language model of a new PrismerLM, or --model to continue from")
    configs = [AutoConfig.from_pretrained(find_checkpoint(name)) for name in vision]
    suite = None
    if not any(config.model_type == "prismer" for config in configs):
        suite = load_suite(args.experts, args.without_experts)
    elif args.experts not in (None, "none") or args.without_experts:
        raise SystemExit(
            "--experts: the encoder of a Prismer brings its own experts; accepted is `none`, without them"
        )
    model = PrismerLMForConditionalGeneration.from_backbones(
        args.language,
        vision or None,
        [] if suite is None else suite.descriptions,
        fusion=args.fusion,
        experts_config=json.loads(args.experts_config) if args.experts_config and suite is not None else None,
        language_kwargs={"dtype": dtype},
        experts_as=args.experts_as,
        question_queries=args.question_queries,
        cross_attention_every=args.cross_attention_every,
        cross_attention_intermediate_size=args.cross_attention_intermediate_size,
        projector_hidden_size=args.projector_hidden_size,
    )
    processor = PrismerLMProcessor.from_backbones(args.language, vision or None, suite, config=model.config)
    if args.chat_template:
        processor.chat_template = read_chat_template(args.chat_template, processor.tokenizer.eos_token)
    if model.config.experts_config is not None:
        set_class_features(model, suite)
    return model, processor


def read_chat_template(name: str, eos_token: str) -> str:
    if name == "plain":
        return PLAIN_TEMPLATE.replace("EOS", eos_token)
    if not Path(name).is_file():
        raise SystemExit(f"--chat_template: there is no file {name!r}; accepted are a file and `plain`")
    return Path(name).read_text(encoding="utf-8")


def set_class_features(model: PrismerLMForConditionalGeneration, suite: ExpertSuite) -> None:
    """Sets the features of label experts' classes, from the names of the classes."""
    names = {
        spec.name: list(suite.class_names[spec.name])
        for spec in model.config.expert_specs
        if spec.num_classes and suite.class_names.get(spec.name)
    }
    tables = class_features_from_names(names, HashedNgrams())
    for name, classes in names.items():
        model.set_class_features(name, tables[name], tables["background"], classes)


def choose_trained(model: PrismerLMForConditionalGeneration, args: LmArguments) -> None:
    """Freezes the backbones that `--freeze` names, and adds the adapter of `--lora` or `--dora`."""
    adapter = [parameter for name, parameter in model.language_model.named_parameters() if "lora_" in name]
    model.freeze_backbones(vision=args.freeze in ("vision", "both"), language=args.freeze in ("language", "both"))
    for parameter in adapter:
        parameter.requires_grad_(True)
    if args.lora and args.dora or adapter and (args.lora or args.dora):
        raise SystemExit("--lora, --dora: a language model has one adapter; that of --model is trained further")
    if rank := args.lora or args.dora:
        settings = LoraConfig(
            r=rank, lora_alpha=2 * rank, use_dora=args.dora is not None, target_modules=linear_layers(model)
        )
        inject_adapter_in_model(settings, model.language_model)


def linear_layers(model: PrismerLMForConditionalGeneration) -> str:
    """A pattern for the linear layers of the decoder, but not of a vision-language model's encoder."""
    language_model = model.language_model
    decoder = language_model.get_decoder()
    place = next(name for name, module in language_model.named_modules() if module is decoder)
    names = {
        name.rpartition(".")[2]
        for name, module in model.model.decoder_layers.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    return rf"{place}\.(layers|h)\.\d+\.(.*\.)?({'|'.join(sorted(names))})"


def add_expert(model: PrismerLMForConditionalGeneration, processor: PrismerLMProcessor, args: LmArguments) -> None:
    """Adds an expert to a trained model and its processor. Its stem alone is trained."""
    suite, name = load_suite(args.experts), args.add_expert
    if args.model is None:
        raise SystemExit(f"--add_expert {name} needs --model, a trained one; a new model gets all of --experts")
    if suite is None or name not in suite:
        raise SystemExit(f"--add_expert {name}: the experts of --experts are {', '.join(suite or ()) or 'none'}")
    model.requires_grad_(False)
    model.add_expert(**suite[name].description).requires_grad_(True)
    set_class_features(model, suite)
    processor.experts = ExpertSuite([*(processor.experts or {}).values(), suite[name]])
    processor.image_processor.experts = [dict(expert) for expert in model.config.experts]


# ---- data ----


def load_texts(args: LmArguments, training_args: TrainingArguments) -> tuple[Rows | None, Rows | None]:
    """The rows of images with captions or questions, to train on and to evaluate."""
    if any(map(is_chat_file, args.eval_data)):
        raise SystemExit("--eval_data has conversations, which are not measured; give questions or captions")
    is_text = [not is_chat_file(source) for source in args.train_data]
    folders = args.image_folder
    if len(folders) == len(is_text) > 1:
        folders = list(compress(folders, is_text))
    wanted = copy.copy(training_args)
    wanted.do_train = training_args.do_train and any(is_text)
    of_texts = dataclasses.replace(args, train_data=list(compress(args.train_data, is_text)), image_folder=folders)
    train_rows, eval_rows = load_data(of_texts, wanted, TASKS[args.stage])
    if isinstance(train_rows, datasets.Dataset):
        train_rows = group_by_image(best_answers(train_rows))
    return train_rows, eval_rows


def load_conversations(args: LmArguments) -> datasets.Dataset | None:
    """The conversations to train on."""
    folders = args.image_folder
    if len(folders) != len(args.train_data):
        folders = (folders or [None])[:1] * len(args.train_data)
    chats = [
        load_chats(source, folder, args.max_train_rows, args.bad_rows or "error", args.check_images)
        for source, folder in zip(args.train_data, folders)
        if is_chat_file(source)
    ]
    if chats and args.stage == "captions":
        raise SystemExit("--train_data has conversations: they need --stage questions")
    return datasets.concatenate_datasets(chats) if chats else None


def best_answers(rows: datasets.Dataset) -> datasets.Dataset:
    """One row for each question, with the answer that most annotators gave."""
    columns = rows.with_format(None)
    if "text" not in columns.column_names:
        return rows
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for number, (*key, weight) in enumerate(zip(*(columns[name][:] for name in ("image_id", "text", "weight")))):
        if weight > best.get(tuple(key), (-1, 0))[0]:
            best[tuple(key)] = (weight, number)
    return rows.select(sorted(number for _, number in best.values()))


def images_of_chats(chats: datasets.Dataset) -> datasets.Dataset:
    """The columns `image_id` and `image` of conversations, each image once."""
    paths: dict[str, str] = {}
    for names, own in zip(chats["image_ids"][:], chats["images"][:]):
        paths.update(zip(names, own))
    images = datasets.Dataset.from_dict({"image_id": list(paths), "image": list(paths.values())})
    return images.cast_column("image", datasets.Image(decode=False))


# ---- training and evaluation ----


def score_answers(answers: list[str], rows: Rows) -> dict[str, float]:
    """The share of answers that are one of the references, and the accuracy of the VQA challenge."""
    references = [[tidy_answer(text) for text in texts] for texts in rows["references"][:]]
    exact = [answer in texts for answer, texts in zip(answers, references, strict=True)]
    return {"exact": sum(exact) / len(exact), **run_vqa.score_answers(answers, rows)}


SCORES = {"captions": run_captioning.score_captions, "questions": score_answers}
WRITERS = {"captions": run_captioning.write_captions, "questions": run_vqa.write_answers}


def no_labels(image_ids: Iterable[str]) -> list[dict[str, Any]]:
    return [{} for _ in image_ids]


def use_cache(
    collator: RecipeCollator,
    model: PrismerLMForConditionalGeneration,
    parts: list[datasets.Dataset],
    args: LmArguments,
    training_args: TrainingArguments,
) -> None:
    """Encodes the images of the training, and lets the collator read their features."""
    config = model.config
    if not config.vision_config or any(weight.requires_grad for weight in model.model.vision_encoders.parameters()):
        raise SystemExit("--cache_features needs vision encoders that are frozen")
    if args.augment or (args.expert_dropout and config.has_prismer_encoder):
        raise SystemExit("--cache_features encodes an image once: leave out --augment and --expert_dropout")
    images = datasets.concatenate_datasets([images_of(part).with_format(None) for part in parts])
    folder = Path(training_args.output_dir, "image_features")
    model.to(training_args.device)
    collator.features = cache_features(
        model, collator.processor, images, folder, collator.labels_for, collator.experts
    )
    if config.has_prismer_encoder:
        collator.encoded_names += ("expert_mask", *(f"{name}_" for name in config.expert_names))
        if args.experts_as == "tokens":  # the labels are needed for words only
            collator.labels_for, collator.experts = no_labels, []


def make_lm_trainer(
    model: PrismerLMForConditionalGeneration,
    processor: PrismerLMProcessor,
    args: LmArguments,
    training_args: TrainingArguments,
    train_rows: Rows | None = None,
    eval_rows: Rows | None = None,
    chats: datasets.Dataset | None = None,
    labels_for: Callable | None = None,
    trainer_class: type[LmTrainer] = LmTrainer,
    **kwargs,
) -> LmTrainer:
    """
    Makes the trainer: labels and encodes the images, and makes collators from the arguments.

    Args:
        train_rows, eval_rows: rows of images with texts; either can be missing.
        chats (`Dataset`, *optional*): conversations to train on.
        labels_for (`Callable`, *optional*): a function from ids of images to labels, in place of `--labels`.
        trainer_class (`type`, *optional*): a subclass of [`LmTrainer`].
        kwargs: passed on to the trainer.
    """
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%.2f of %.1f million parameters are trained", trained / 1e6, model.num_parameters() / 1e6)
    if training_args.do_train and not trained:
        raise SystemExit("nothing is trained: without images or experts as tokens, give --lora or --dora")
    if chats is not None and (processor.chat_template is None or not args.chat):
        raise SystemExit("conversations need the chat template of the language model")
    if not args.chat:
        for part in filter(None, (processor, processor.tokenizer, processor.vlm_processor)):
            part.chat_template = None  # users ask as the model was trained
    if chats is not None and isinstance(train_rows, datasets.IterableDataset):
        raise SystemExit("--streaming: conversations cannot be joined to a stream")

    train_rows, eval_rows = (None if rows is None else leave_undecoded(rows) for rows in (train_rows, eval_rows))
    parts = [rows for rows in (train_rows, chats and images_of_chats(chats)) if rows]
    refuse_doubled_names(parts)
    experts = [] if args.experts == "none" else None
    train_labels = eval_labels = labels_for
    if labels_for is None:  # separate stores, because an id can name different images in two folders
        store = output_dir / "expert_labels"
        train_labels = label_rows(parts, processor, args.labels, store / "train", experts)
        eval_labels = label_rows([eval_rows], processor, args.labels, store / "eval", experts)
    settings = {
        "experts": experts,
        "as_chat": processor.chat_template is not None,
        "max_length": args.max_length,
    }
    processor.prompts = {"caption": args.caption_prompt, "vqa": args.question_prompt}  # saved with the checkpoint
    collator = RecipeCollator(
        processor,
        train_labels,
        make_augmentation(args, processor.image_processor),
        expert_dropout=args.expert_dropout,
        texts_per_image=args.texts_per_image,
        seed=training_args.seed,
        pack=args.pack and not args.question_queries and processor.vlm_processor is None,
        **settings,
    )
    if args.cache_features and parts:
        use_cache(collator, model, parts, args, training_args)
    both = [rows for rows in (train_rows, chats) if rows is not None]
    generation = {name: getattr(args, name) or value for name, value in GENERATION[args.stage].items()}
    facts = CardFacts(
        args.language_id,
        args.vision_ids,
        args.caption_prompt if args.stage == "captions" else collator.prompt_for("What is this?"),
        collator.as_chat,
        f"Trained on {args.stage}: {', '.join(Path(source).name for source in args.train_data)}.",
    )
    return trainer_class(
        model=model,
        args=training_args,
        train_dataset=ConcatDataset(both) if len(both) > 1 else next(iter(both), None),
        eval_dataset=eval_rows,
        processing_class=processor,
        data_collator=collator,
        eval_collator=RecipeCollator(processor, eval_labels, with_suffix=False, **settings),
        **{
            "score": SCORES[args.stage],
            "read_text": tidy_answer if args.stage == "questions" else str,
            "generation": generation,
            "facts": facts,
            **kwargs,
        },
    )


def main():
    args, training_args = parse_arguments(LmArguments, **DEFAULTS)
    model, processor = load_model(args, training_args.do_train)
    train_rows, eval_rows = load_texts(args, training_args)
    chats = load_conversations(args) if training_args.do_train else None
    trainer = make_lm_trainer(model, processor, args, training_args, train_rows, eval_rows, chats)
    run(trainer, args, WRITERS[args.stage])


if __name__ == "__main__":
    main()
