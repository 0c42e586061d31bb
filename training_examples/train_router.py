"""
Trains a router, which chooses for each question and image the experts that are worth their time, and saves it with the
checkpoint.

    prismer worth prismer-scenes --data my_questions --out runs/gains
    python training_examples/train_router.py --model prismer-scenes --worth runs/gains --data my_questions \\
        --output_dir runs/routed
    prismer ask photo.jpg "What does the sign say?" --model runs/routed --experts auto --budget-ms 50

It learns from the score of each question with each subset of experts, which `prismer worth` has written. Use questions
about images that the checkpoint was not trained on. With `--eval_worth`, the results of `prismer worth` on others, it
compares all experts, none, fixed subsets and the router at several budgets; see router_evaluation.py.
"""

import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from huggingface_hub import snapshot_download
from torch.nn import functional
from transformers import AutoConfig, HfArgumentParser, set_seed

from modeling_prismer import (
    PrismerForConditionalGeneration,
    PrismerLMForConditionalGeneration,
    PrismerLMProcessor,
    PrismerProcessor,
    optimize_for_cpu,
)
from modeling_prismer.expert_worth import ExpertCost, seconds_of
from modeling_prismer.pretrained import find_checkpoint
from modeling_prismer.processing.data import images_of, leave_undecoded, load_rows
from modeling_prismer.processing.expert_router import (
    ExpertRouter,
    RouterConfig,
    RouterPrice,
    best_rows,
    summarize_images,
)
from router_evaluation import Samples, draw, evaluate, predict, table, time_setting
from training import write_json


logger = logging.getLogger("prismer")

PRICES = (0.0, *np.logspace(-2, 3, 61).tolist(), math.inf)
TOLERANCE = 0.005  # the score that the router may lose without a budget


@dataclass
class RouterArguments:
    """The arguments of this script."""

    model: str = field(metadata={"help": "Checkpoint: a folder, a Hub id, or the name of a shipped one."})
    worth: Path = field(metadata={"help": "The folder that `prismer worth` has written, with samples.parquet."})
    data: list[str] = field(metadata={"help": "The data that were given to `prismer worth`, with their images."})
    output_dir: Path = field(metadata={"help": "The folder for the checkpoint with its router."})
    split: str | None = field(default=None, metadata={"help": "Split of --data."})
    image_folder: str | None = field(default=None, metadata={"help": "The folder with the images of a list."})
    eval_worth: Path | None = field(default=None, metadata={"help": "As --worth, of questions to evaluate."})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "As --data, for --eval_worth."})
    budgets: list[float] = field(
        default_factory=lambda: [5.0, 10.0, 20.0, 40.0, 80.0], metadata={"help": "Budgets to evaluate, in ms."}
    )
    timed_rows: int = field(default=64, metadata={"help": "Questions on which --eval_worth measures the time."})
    images: bool = field(default=True, metadata={"help": "Whether the router sees the image (--no_images)."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the router."})
    buckets: int = field(default=2048, metadata={"help": "Embeddings that the words share."})
    held_out: float = field(default=0.25, metadata={"help": "Share of the images to choose epoch and prices on."})
    epochs: int = field(default=40, metadata={"help": "Epochs; the best one is kept."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Learning rate of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    batch_size: int = field(default=128, metadata={"help": "Questions in a batch."})
    seed: int = 0


def read_samples(folder: Path) -> Samples:
    """Reads the results of `prismer worth`."""
    report = json.loads((folder / "worth.json").read_text())
    table = pq.read_table(folder / "samples.parquet").to_pydict()
    costs = {name: ExpertCost(own["seconds"], needs=tuple(own["needs"])) for name, own in report["costs"].items()}
    if unknown := [name for name, own in costs.items() if own.seconds is None]:
        raise SystemExit(f"{folder}: the time of {', '.join(unknown)} is unknown, so a router cannot weigh it")
    subsets = [own["experts"] for own in report["subsets"]]
    scores = torch.tensor([table["+".join(own) or "none"] for own in subsets]).T
    texts = table.get("text") or [""] * len(scores)
    return Samples(table["image_id"], texts, scores, subsets, [seconds_of(own, costs) for own in subsets])


# ---- features ----


def load_checkpoint(model: str) -> tuple[Path, Any, Any]:
    """The folder of a checkpoint, its processor and its network."""
    path = find_checkpoint(model)
    folder = Path(path if os.path.isdir(path) else snapshot_download(path))
    if AutoConfig.from_pretrained(folder).model_type == "prismer_lm":
        network = PrismerLMForConditionalGeneration.from_pretrained(folder)
        return folder, PrismerLMProcessor.from_pretrained(folder), network.eval()
    network = PrismerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, PrismerProcessor.from_pretrained(folder), optimize_for_cpu(network)


def prompts_of(processor: Any, texts: Sequence[str]) -> list[str]:
    """Texts as the router of a processor sees them: those of a PrismerLM in its chat template."""
    if not isinstance(processor, PrismerLMProcessor):
        return list(texts)
    prompts = [processor.prompt_for("vqa", text) if text else processor.prompt_for("caption") for text in texts]
    if processor.chat_template is None:
        return prompts
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}] for prompt in prompts
    ]
    written = processor.apply_chat_template(turns, add_generation_prompt=True)
    return [text.replace(processor.image_token, " ") for text in written]


def load_images(args: RouterArguments, data: list[str]) -> dict[str, Any]:
    """The images of data by their ids, undecoded."""
    rows = leave_undecoded(
        load_rows(data, "vqa", args.split, train=False, image_folder=args.image_folder, check_images=False)
    )
    return {row["image_id"]: row["image"]["path"] or row["image"]["bytes"] for row in images_of(rows)}


@torch.no_grad()
def add_features(samples: Samples, images: dict[str, Any], processor: Any, network: Any, batch_size: int = 32) -> None:
    """Adds the features of the images to samples."""
    names = list(dict.fromkeys(samples.image_ids))
    features = []
    for start in range(0, len(names), batch_size):
        inputs = processor.process_images([images[name] for name in names[start : start + batch_size]], experts=[])
        features.append(
            summarize_images(network, {name: tensor.to(network.device) for name, tensor in inputs.items()})
        )
    places = {name: place for place, name in enumerate(names)}
    samples.features = torch.cat(features)[[places[name] for name in samples.image_ids]]


# ---- training ----


def train(router: ExpertRouter, train_part: Samples, held_out: Samples, args: RouterArguments) -> None:
    """Trains the router by the squared error of all scores, and keeps the best epoch."""
    network = router.network
    if train_part.features is not None:
        network.image_mean.copy_(train_part.features.mean(0))
        network.image_std.copy_(train_part.features.std(0).clamp(min=1e-6))
    network.scores.bias.data.copy_(train_part.scores.mean(0))
    words = [[router.words_of(text) for text in part.texts] for part in (train_part, held_out)]
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay)
    steps = args.epochs * math.ceil(len(train_part) / args.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = math.inf, {}

    def loss_of(part: Samples, own: list[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
        features = None if part.features is None else part.features[rows]
        return functional.mse_loss(network([own[row] for row in rows], features), part.scores[rows])

    for epoch in range(args.epochs):
        network.train()
        for rows in torch.randperm(len(train_part)).split(args.batch_size):
            optimizer.zero_grad()
            loss_of(train_part, words[0], rows.tolist()).backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            error = loss_of(held_out, words[1], range(len(held_out))).item()
        if error < best:
            best, kept = error, {name: tensor.clone() for name, tensor in network.state_dict().items()}
            logger.info("epoch %d: squared error %.4f", epoch + 1, error)
    network.load_state_dict(kept)


def set_prices(router: ExpertRouter, samples: Samples) -> None:
    """Measures the time and the score of prices, and chooses the price that loses at most half a point."""
    predicted, config = predict(router, samples), router.config
    seconds = torch.tensor(config.seconds)
    prices = []
    for price in PRICES:
        rows = best_rows(predicted, config.seconds, price)
        score = samples.scores.gather(1, rows[:, None]).mean().item()
        prices.append(RouterPrice(price, 1000 * seconds[rows].mean().item(), score))
    # an infinite price is not JSON, and needs no entry
    config.prices = [own for own in prices if own.price < math.inf]
    wanted = samples.scores[:, -1].mean().item() - TOLERANCE
    good = [own for own in config.prices if own.score >= wanted] or config.prices[:1]
    fastest = min(own.milliseconds for own in good)
    # many prices may lead to this time; the lowest one leaves most room for questions of other kinds
    config.default_price = min(own.price for own in good if own.milliseconds <= 1.02 * fastest)


def main() -> None:
    (args,) = HfArgumentParser(RouterArguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    set_seed(args.seed)
    folder, processor, network = load_checkpoint(args.model)
    samples = read_samples(args.worth)
    questions = samples.texts
    samples.texts = prompts_of(processor, questions)
    if args.images:
        add_features(samples, load_images(args, args.data), processor, network)
    names = sorted(set(samples.image_ids))
    held_out = set(np.random.default_rng(args.seed).permutation(names)[: max(1, round(args.held_out * len(names)))])
    is_held_out = np.array([name in held_out for name in samples.image_ids])
    config = RouterConfig(
        subsets=samples.subsets,
        seconds=samples.seconds,
        image_size=0 if samples.features is None else samples.features.shape[1],
        buckets=args.buckets,
        hidden_size=args.hidden_size,
    )
    router = ExpertRouter(config)
    others = samples.part(np.flatnonzero(is_held_out))
    train(router, samples.part(np.flatnonzero(~is_held_out)), others, args)
    set_prices(router, others)
    shutil.copytree(folder, args.output_dir, dirs_exist_ok=True)
    router.save_pretrained(args.output_dir)
    logger.info("the checkpoint with its router is in %s", args.output_dir)
    if args.eval_worth is None:
        return

    router.encoder = network
    processor.router = router
    test = read_samples(args.eval_worth)
    if test.subsets != samples.subsets:
        raise SystemExit(f"{args.eval_worth} has other subsets of experts than {args.worth}")
    test.seconds = samples.seconds
    images = load_images(args, args.eval_data or args.data)
    questions = test.texts
    test.texts = prompts_of(processor, questions)
    if args.images:
        add_features(test, images, processor, network)
    settings = evaluate(router, test, args.budgets)
    if args.timed_rows and not isinstance(processor, PrismerLMProcessor):
        rows = np.random.default_rng(args.seed).permutation(len(test))[: args.timed_rows]
        timed = replace(test.part(rows), texts=[questions[row] for row in rows])
        settings = [time_setting(own, timed, images, processor, network) for own in settings]
    write_json(args.output_dir / "router_results.json", [asdict(own) for own in settings])
    print(table(settings))
    draw(settings, test, f"{Path(args.model).name}: experts chosen for each question", args.output_dir / "router.png")


if __name__ == "__main__":
    main()
