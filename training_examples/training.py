"""The recipes' common parts: arguments, the trainer, and the course of a run."""

import copy
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, sort_checkpoints, speed_metrics

from columns import ColumnOptions
from model_card import measured, write_model_card
from modeling_prismer import (
    DataCollatorForPrismer,
    PrismerForConditionalGeneration,
    PrismerImageProcessor,
    PrismerProcessor,
    keep_freed_memory,
    optimize_for_cpu,
)
from modeling_prismer.expert_spec import read_specs
from modeling_prismer.pretrained import find_checkpoint
from modeling_prismer.processing import JointAugmentation
from modeling_prismer.processing.data import images_of, leave_undecoded, load_rows, raise_together, shorten_answers
from modeling_prismer.processing.labels import label_images, label_source
from modeling_prismer.processing.tasks import find_task


logger = logging.getLogger("prismer")

Rows = datasets.Dataset | datasets.IterableDataset
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass
class RecipeArguments(ColumnOptions):
    """The arguments of every recipe, in addition to those of `transformers.TrainingArguments`."""

    model: str | None = field(
        default=None, metadata={"help": "Checkpoint: a folder, a Hub id, or the name of a shipped one."}
    )
    train_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "A folder of images with a CSV or JSONL file, an annotation list, a data set of the Hub or on "
            "disk, or webdataset tars; one or several. See docs/own_data.md."
        },
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "The data to evaluate or predict, as --train_data."}
    )
    train_split: str | None = field(default=None, metadata={"help": "Split of --train_data."})
    eval_split: str | None = field(default=None, metadata={"help": "Split of --eval_data."})
    image_folder: list[str] = field(
        default_factory=list,
        metadata={"help": "The folder with the images of annotation lists: one for all, or one for each list."},
    )
    bad_rows: Literal["error", "skip"] | None = field(
        default=None,
        metadata={
            "help": "What to do with rows whose image or text is missing, empty or damaged: stop and name them "
            "(error), or leave them out with a warning (skip). By default error, and skip for streams."
        },
    )
    check_images: bool = field(
        default=True,
        metadata={"help": "Whether to open all images before the training (--no_check_images)."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the training data during the training (needs --max_steps)."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on this many rows only."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate this many rows only."})
    labels: str = field(
        default="precomputed",
        metadata={
            "help": "The source of the experts' labels: `precomputed` runs the experts over all images once before "
            "the training and stores the labels in the output folder, `live` runs them on every batch, or the path of "
            "a label store."
        },
    )
    experts: str | None = field(
        default=None, metadata={"help": "The experts to use, such as `depth,ocr`; `none` masks out all."}
    )
    expert_dropout: float = field(
        default=0.0, metadata={"help": "Probability with which each expert is missing in a training sample."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the images in pixels; by default the paper's for training and the checkpoint's for "
            "evaluation."
        },
    )
    freeze: str = field(default="vision", metadata={"help": "Frozen backbones: none, vision, language or both."})
    label_smoothing: float = field(
        default=0.1, metadata={"help": "Label smoothing of the loss, also for ranking candidates."}
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Number of samples per optimizer step. Gradients are accumulated to reach it. By default "
            "--per_device_train_batch_size and --gradient_accumulation_steps decide."
        },
    )
    crop_scale: tuple[float, float] = field(
        default=(0.5, 1.0), metadata={"help": "Bounds of a random crop's share of the image's area."}
    )
    randaugment: int = field(default=2, metadata={"help": "RandAugment operations per sample, magnitude 5 of 10."})
    flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    augment: bool = field(default=True, metadata={"help": "Whether to augment (--no_augment)."})
    predict_only: bool = field(
        default=False, metadata={"help": "Write predictions for --eval_data, which needs no references."}
    )
    publish_to: str | None = field(
        default=None, metadata={"help": "Write the model in half precision, with its processor, to this folder."}
    )


def parse_arguments(
    arguments_class: type[RecipeArguments] = RecipeArguments, image_size: int | None = None, **defaults
) -> tuple[RecipeArguments, TrainingArguments]:
    """
    Parses the command line. `defaults` are the recipe's defaults for both classes, and `image_size` is the default for
    training.
    """
    parser = HfArgumentParser((arguments_class, TrainingArguments))
    shared = {"weight_decay": 0.05, "logging_steps": 10, "save_total_limit": 2, "ddp_find_unused_parameters": False}
    shared |= {"dataloader_pin_memory": torch.cuda.is_available(), "report_to": "none"}
    parser.set_defaults(**{**shared, **defaults})
    args, training_args = parser.parse_args_into_dataclasses()
    training_args.remove_unused_columns = False  # the columns are the collator's
    if args.image_size is None and training_args.do_train:
        args.image_size = image_size
    if args.freeze not in ("none", "vision", "language", "both"):
        parser.error(f"--freeze {args.freeze}: accepted are none, vision, language and both")
    if training_args.label_smoothing_factor:
        parser.error("--label_smoothing_factor changes the paper's loss; use --label_smoothing")
    if args.predict_only and (training_args.do_train or training_args.do_eval):
        parser.error("--predict_only neither trains nor evaluates: leave out --do_train and --do_eval")
    if not (training_args.do_train or training_args.do_eval or args.predict_only):
        parser.error("nothing to do: give --do_train, --do_eval or --predict_only")
    if training_args.do_train and not args.train_data:
        parser.error("--do_train needs --train_data")
    if (training_args.do_eval or args.predict_only) and not args.eval_data:
        parser.error("--do_eval and --predict_only need --eval_data")
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not training_args.do_train:
        parser.error("FSDP is for training; evaluate and predict with accelerate_configs/ddp.yaml")
    if training_args.n_gpu > 1:  # instead of DataParallel, which divides a batch unevenly
        logger.warning("one of %d GPUs is used; `accelerate launch` uses all", training_args.n_gpu)
        training_args._n_gpu = 1
    if args.total_batch_size and training_args.do_train:
        at_once = training_args.train_batch_size * training_args.world_size
        if args.total_batch_size % at_once:
            parser.error(
                f"--total_batch_size {args.total_batch_size} is not a multiple of the {at_once} samples that the "
                "devices take at once (--per_device_train_batch_size)"
            )
        training_args.gradient_accumulation_steps = args.total_batch_size // at_once
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    set_seed(training_args.seed)
    return args, training_args


def last_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint. A checkpoint is incomplete if the training was killed while writing it."""
    for folder in reversed(sort_checkpoints(output_dir)):
        try:
            TrainerState.load_from_json(os.path.join(folder, TRAINER_STATE_NAME))  # written last
        except (OSError, ValueError):
            continue
        return folder
    return None


def load_checkpoint(
    args: RecipeArguments, task: str, processor_path: str | None = None
) -> tuple[PrismerForConditionalGeneration, PrismerProcessor]:
    """
    Loads the checkpoint of `--model` for a task, at the resolution of `--image_size`. The processor can come from
    another folder.
    """
    if args.model is None:
        raise SystemExit("--model is missing: a folder, a Hub id or the name of a shipped checkpoint")
    path = find_checkpoint(args.model)
    processor = PrismerProcessor.from_pretrained(processor_path or path)
    model = PrismerForConditionalGeneration.from_pretrained(path, dtype=torch.float32, image_size=args.image_size)
    processor.task = task
    if processor.tasks and task not in processor.tasks:
        processor.tasks = [*processor.tasks, task]
    size = model.config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    return model, processor


def load_data(
    args: RecipeArguments, training_args: TrainingArguments, task: str, **options
) -> tuple[Rows | None, Rows | None]:
    """Loads the rows for training and those for evaluation or prediction; `None` if the arguments need none."""
    folders = args.image_folder[0] if len(args.image_folder) == 1 else args.image_folder or None
    options = {"image_folder": folders, "bad_rows": args.bad_rows, "check_images": args.check_images, **options}
    options |= args.columns_of(task)
    train_rows = eval_rows = None
    problems = []  # of both data sets, reported together
    if training_args.do_train:
        try:
            train_rows = load_rows(
                args.train_data,
                task,
                split=args.train_split,
                streaming=args.streaming,
                max_rows=args.max_train_rows,
                **options,
            )
        except (ValueError, FileNotFoundError) as problem:
            problems.append(problem)
    if args.eval_data:
        try:
            eval_rows = load_rows(
                args.eval_data, task, split=args.eval_split, max_rows=args.max_eval_rows, train=False, **options
            )
        except (ValueError, FileNotFoundError) as problem:
            problems.append(problem)
    raise_together(problems)
    return train_rows, eval_rows


def without_adapters(model: torch.nn.Module) -> PrismerForConditionalGeneration:
    """The model without the wrapper of peft."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def replace_generation_settings(model: torch.nn.Module, settings: dict[str, Any]) -> None:
    """Replaces the model's settings for `generate`, except the ids of special tokens."""
    model = without_adapters(model)
    tokens = {name: getattr(model.generation_config, name) for name in SPECIAL_TOKENS}
    model.generation_config = GenerationConfig(**(tokens | settings))


class TextTrainer(Trainer):
    """
    A Trainer that evaluates the texts that the model generates.

    Args:
        eval_collator ([`DataCollatorForPrismer`]): makes the batches for evaluation.
        score (`Callable`): returns a dict of metrics from the model's texts and the rows of the data set.
        args, kwargs: as those of `transformers.Trainer`.
    """

    def __init__(
        self,
        *args,
        eval_collator: DataCollatorForPrismer | None = None,
        score: Callable[[list[str], Rows], dict[str, float]] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.eval_collator = eval_collator
        self.score = score
        self.metrics: dict[str, float] = {}  # for the model card
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            # otherwise one process reads for all, and cannot distribute batches of different lengths
            self.accelerator.dataloader_config.dispatch_batches = False
        if isinstance(self.data_collator, DataCollatorForPrismer):
            self.add_callback(_CountEpochs(self.data_collator))
        if self.args.world_size > 1 and self.args.device.type == "cuda":
            self.model = self.model_wrapped = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)

    def predict_texts(self, dataset: Rows) -> list[str]:
        """The model's text for each row, in order."""
        raise NotImplementedError

    def publish(self, folder: str) -> None:
        """Writes the model in half precision, with its processor."""
        raise NotImplementedError

    def evaluate(self, *args, **kwargs):
        metrics = self._evaluate(*args, **kwargs)
        self.metrics = measured(metrics)
        if self.args.do_train and self.is_world_process_zero():
            self.create_model_card()
        return metrics

    def _evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.score is None or isinstance(dataset, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        start = time.time()
        predictions = self.predict_texts(dataset)
        scores = [self.score(predictions, dataset) if self.is_world_process_zero() else None]
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in broadcast_object_list(scores)[0].items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(predictions))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class PrismerTrainer(TextTrainer):
    """
    A [`TextTrainer`] with the paper's loss, which is a mean over samples for any sizes of the micro-batches.

    Args:
        candidates (`list[str]`, *optional*): the answers to rank. Without them, the model generates.
        num_ranked (`int`): the number of candidates to score in full, those with the most probable first tokens.
        generation (`dict`, *optional*): the generation settings of the model, for evaluation and for its
            generation_config.json. They replace all settings of the task that it was trained for before.
        sources (`list[str]`, *optional*): where the model's weights came from, for the model card.
        args, kwargs: as those of [`TextTrainer`].
    """

    def __init__(
        self,
        *args,
        candidates: list[str] | None = None,
        num_ranked: int = 16,
        generation: dict[str, Any] | None = None,
        sources: Sequence[str] = (),
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.candidates = candidates
        self.num_ranked = num_ranked
        self.sources = sources
        if generation is not None:
            replace_generation_settings(self.model, generation)
        self.loss_is_scaled_for_ga = True  # by compute_loss
        if self.is_fsdp_enabled:
            # Autocast instead: BatchNorm does not accept bf16 weights with float32 statistics, and losses stay exact.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    # ---- the loss: a mean over the samples of an optimizer step ----

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        sizes = torch.zeros(1, max(len(batch_samples), self.args.gradient_accumulation_steps), device=device)
        for i, batch in enumerate(batch_samples):
            sizes[0, i] = len(batch["input_ids"])
        sizes = self.accelerator.gather(sizes)  # (processes, micro-batches)
        # Streams can end at different times. A micro-batch that some processes lack would make the others wait.
        common = int((sizes > 0).all(dim=0).sum())
        del batch_samples[common:]
        return sizes[:, :common].sum()

    def compute_loss_context_manager(self):
        return self.accelerator.autocast() if self.is_fsdp_enabled else super().compute_loss_context_manager()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if model.training and num_items_in_batch is not None:
            # processes' gradients are averaged
            loss = loss * len(inputs["input_ids"]) * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    # ---- evaluation of the model's texts ----

    def get_eval_dataloader(self, eval_dataset=None):
        collator, self.data_collator = self.data_collator, self.eval_collator or self.data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if "labels" in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if isinstance(model, FSDPModule) and "rank_candidates" not in vars(model):
            register_fsdp_forward_method(model, "rank_candidates")  # as Trainer does with `generate`
        with torch.no_grad(), self.accelerator.autocast():
            if self.candidates is not None:
                candidates = self.processing_class.prepare_candidates(self.candidates).to(self.args.device)
                return None, model.rank_candidates(**candidates, k=self.num_ranked, **inputs).indices[:, :1], None
            synced_gpus = is_deepspeed_zero3_enabled() or isinstance(model, FSDPModule)
            generated = model.generate(**inputs, synced_gpus=synced_gpus)
        return None, generated[:, inputs["input_ids"].shape[1] :].contiguous(), None

    def predict_texts(self, dataset: Rows) -> list[str]:
        """The model's text for each row, in their order."""
        output: EvalLoopOutput = self.evaluation_loop(
            self.get_eval_dataloader(dataset), "Prediction", prediction_loss_only=False
        )
        if self.candidates is not None:
            return [self.candidates[index] for index in output.predictions[:, 0]]
        padded = np.where(output.predictions < 0, self.processing_class.tokenizer.pad_token_id, output.predictions)
        return self.processing_class.post_process_generation(padded)

    def publish(self, folder: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, FSDPModule):
            model = PrismerForConditionalGeneration.from_pretrained(self.args.output_dir)
        copy.deepcopy(model).half().save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        write_model_card(folder, model, self.processing_class, self.sources, self.metrics)

    def create_model_card(self, **kwargs) -> None:
        model = self.accelerator.unwrap_model(self.model)
        write_model_card(self.args.output_dir, model, self.processing_class, self.sources, self.metrics)


class _CountEpochs(TrainerCallback):
    """Sets the epoch of the collator, which changes its random choices."""

    def __init__(self, collator: DataCollatorForPrismer):
        self.collator = collator

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.collator.epoch = self.epoch  # for streams, state.epoch is not a whole number yet
        self.epoch += 1


def require_live_experts(processor: PrismerProcessor, wanted: list[str]) -> None:
    """Ends the program with a remedy if the processor cannot run all of these experts."""
    live = processor.experts or ()
    if missing := ", ".join(name for name in wanted if name not in live):
        others = ",".join(name for name in wanted if name in live) or "none"
        raise SystemExit(
            f"the model's processor cannot run its experts {missing}, because it was saved without them. Either:\n"
            "- give the processor its experts and save it again: docs/new_model.md\n"
            "- pass stored labels: --labels STORE, written by `prismer label`\n"
            f"- leave the experts out: --experts {others}"
        )


def label_rows(
    parts: Sequence[Rows | None],
    processor: PrismerProcessor,
    labels: str,
    store: Path,
    wanted: list[str] | None = None,
) -> Callable[[list[str]], list[dict] | None]:
    """
    Returns a function from ids of images to their labels. `labels` is `live`, the path of a label store, or
    `precomputed`. With `precomputed`, the experts of `wanted` (names, by default all) run now over all images that are
    not yet in `store`. A part of the experts has a store of its own beside `store`, unless that one exists.
    """
    experts = processor.image_processor.experts
    names = [spec.name for spec in read_specs(experts)]
    wanted = names if wanted is None else wanted
    if unknown := ", ".join(name for name in wanted if name not in names):
        raise SystemExit(f"--experts: {unknown}; the model's experts are {', '.join(names) or 'none'}")
    parts = [rows for rows in parts if rows is not None]
    if labels in ("live", "precomputed") and parts:
        require_live_experts(processor, wanted)
    if labels != "precomputed":
        return label_source(labels, experts)
    if not wanted or not parts:
        return label_source("live", experts)  # nothing to label
    suite = processor.experts
    if set(wanted) != set(names) and not store.exists():  # a store with all experts has these, too
        suite = suite.only(*wanted)
        store = store.with_name("-".join([store.name, *suite]))
    for rows in parts:
        if not isinstance(rows, datasets.Dataset):
            raise SystemExit(
                "streamed rows cannot be labelled before the training; use --labels live or a label store"
            )
        images = images_of(rows)
        first = np.unique(np.asarray(images["image_id"]), return_index=True)[1]  # each image once
        label_images(images.select(np.sort(first)), suite, store, key_column="image_id")
        PartialState().wait_for_everyone()  # each process has labelled its share
    return label_source(store, [description for description in experts if description["name"] in wanted])


def make_augmentation(args: RecipeArguments, image_processor: PrismerImageProcessor) -> JointAugmentation | None:
    """The augmentation of images and their maps, unless `--no_augment` is given."""
    if not args.augment:
        return None
    return JointAugmentation(
        image_processor.experts,
        size=(image_processor.size["height"], image_processor.size["width"]),
        expert_size=image_processor.expert_size,
        scale=tuple(args.crop_scale),
        flip_probability=args.flip,
        num_ops=args.randaugment,
    )


def make_trainer(
    model: PrismerForConditionalGeneration,
    processor: PrismerProcessor,
    args: RecipeArguments,
    training_args: TrainingArguments,
    train_rows: Rows | None = None,
    eval_rows: Rows | None = None,
    other_rows: Sequence[Rows] = (),
    labels_for: Callable | None = None,
    texts_per_image: int | None = None,
    generation: dict[str, Any] | None = None,
    trainer_class: type[PrismerTrainer] = PrismerTrainer,
    collator_class: type[DataCollatorForPrismer] = DataCollatorForPrismer,
    **kwargs,
) -> PrismerTrainer:
    """
    Makes the trainer of a recipe: freezes backbones, labels the images, and makes augmentation and collators from the
    arguments.

    Args:
        train_rows, eval_rows: the data; either can be missing.
        other_rows: further rows for `trainer.predict_texts`.
        labels_for (`Callable`, *optional*): a function from ids of images to labels, in place of `--labels`.
        texts_per_image (`int`, *optional*): the number of texts to draw from a training row with several.
        generation (`dict`, *optional*): the generation settings of the model, by default those of the task.
        trainer_class (`type`, *optional*): a subclass of [`PrismerTrainer`].
        collator_class (`type`, *optional*): a subclass of [`DataCollatorForPrismer`] for the training rows.
        kwargs: passed on to the trainer.
    """
    output_dir = Path(training_args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model.config.label_smoothing = args.label_smoothing
    if not getattr(model, "peft_config", None):  # peft has frozen all weights except the adapter's
        model.freeze_backbones(vision=args.freeze in ("vision", "both"), language=args.freeze in ("language", "both"))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    logger.info("%.1f of %.1f million parameters are trained", trained / 1e6, model.num_parameters() / 1e6)

    if train_rows is not None:
        train_rows = shorten_answers(leave_undecoded(train_rows), processor, model.config.text_config)
    if eval_rows is not None:
        eval_rows = leave_undecoded(eval_rows)
    experts = args.experts and [name for name in args.experts.split(",") if name != "none"]
    train_labels = eval_labels = labels_for
    if labels_for is None:  # separate stores, because an id can name different images in two folders
        store = output_dir / "expert_labels"
        train_labels = label_rows([train_rows], processor, args.labels, store / "train", experts)
        eval_labels = label_rows([eval_rows, *other_rows], processor, args.labels, store / "eval", experts)
    return trainer_class(
        model=model,
        args=training_args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        data_collator=collator_class(
            processor,
            train_labels,
            make_augmentation(args, processor.image_processor),
            expert_dropout=args.expert_dropout,
            texts_per_image=texts_per_image,
            experts=experts,
            seed=training_args.seed,
        ),
        eval_collator=DataCollatorForPrismer(processor, eval_labels, with_suffix=False, experts=experts),
        generation=find_task(processor.task).generation if generation is None else generation,
        sources=[args.model]
        if args.model
        else [getattr(args, name) for name in ("vision", "text") if hasattr(args, name)],
        **kwargs,
    )


def run(
    trainer: TextTrainer,
    args: RecipeArguments,
    write_results: Callable[[Path, list[str], Rows], None] | None = None,
) -> None:
    """
    Trains, evaluates, predicts and publishes, depending on the arguments. Writes the model with its processor and
    model card, `train_results.json`, `eval_results.json` and `predictions.json` to the output folder.
    """
    training_args = trainer.args
    if training_args.device.type == "cpu" and not training_args.do_train and isinstance(trainer, PrismerTrainer):
        optimize_for_cpu(trainer.model)
    if training_args.do_train:
        if training_args.device.type == "cpu":
            keep_freed_memory()
        checkpoint = training_args.resume_from_checkpoint
        if checkpoint == "last":  # without a checkpoint, the training starts from the beginning
            checkpoint = last_checkpoint(training_args.output_dir)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        if trainer.is_fsdp_enabled:  # checkpoints are sharded, the final model is not
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model()
        if trainer.is_world_process_zero() and getattr(trainer.model, "peft_config", None):  # peft does not save it
            without_adapters(trainer.model).generation_config.save_pretrained(training_args.output_dir)
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        if trainer.is_world_process_zero():
            trainer.create_model_card()
    if training_args.do_eval and trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.predict_only:
        predictions = trainer.predict_texts(trainer.eval_dataset)
        if trainer.is_world_process_zero():
            path = Path(training_args.output_dir, "predictions.json")
            write_results(path, predictions, trainer.eval_dataset)
            logger.info("%d predictions in %s", len(predictions), path)
    if args.publish_to and trainer.is_world_process_zero():
        trainer.publish(args.publish_to)


def has_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 in hardware. Elsewhere, float32 is faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def write_text(path: Path, text: str) -> None:
    """Writes a file that exists only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def save_model(model: PreTrainedModel, folder: Path, processor: Any = None) -> None:
    """Saves a model, and its processor if there is one, in a folder that exists only when it is complete."""
    incomplete = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    model.save_pretrained(incomplete)
    if processor is not None:
        processor.save_pretrained(incomplete)
    shutil.rmtree(folder, ignore_errors=True)
    incomplete.rename(folder)
