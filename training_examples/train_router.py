"""
Trains a router, which chooses for each question and image the experts that are worth their time, and saves it with the
checkpoint.

    prismer worth prismer-scenes --data my_questions --out runs/gains
    python training_examples/train_router.py --model prismer-scenes --worth runs/gains --data my_questions \\
        --output_dir runs/routed
    prismer ask photo.jpg "What does the sign say?" --model runs/routed --experts auto --budget-ms 50

It learns from the score of each question with each subset of experts, which `prismer worth` has written. Use questions
about images that the checkpoint was not trained on. The gains of experts are fitted by ridge regression, on the words
of a question and the frozen encoder's features of its image; cross-validation over images chooses the penalty, and
measures time and score at each price of time. With `--eval_worth`, the results of `prismer worth` on other questions,
it compares all experts, none, fixed subsets and the router at several budgets; see router_evaluation.py.
"""

import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from huggingface_hub import snapshot_download
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from torch.nn import functional
from transformers import AutoConfig, HfArgumentParser, set_seed

from columns import ColumnOptions
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
from router_evaluation import Samples, draw, evaluate, table, time_setting
from training import write_json


logger = logging.getLogger("prismer")

PENALTIES = (1.0, 3.0, 10.0, 30.0, 100.0)
IMAGE_SCALES = (0.0, 0.05, 0.1, 0.2)
WORTH_A_LOOK = 0.99  # of the error without images, because seeing them runs the encoder once more
PRICES = (0.0, *np.logspace(-2, 2, 41).tolist())  # of a second
TOLERANCE = 0.0025  # the score that the router may lose without a budget


@dataclass
class RouterArguments(ColumnOptions):
    """The arguments of this script."""

    model: str = field(metadata={"help": "Checkpoint: a folder, a Hub id, or the name of a shipped one."})
    worth: Path = field(metadata={"help": "The folder that `prismer worth` has written, with samples.parquet."})
    data: list[str] = field(metadata={"help": "The data that were given to `prismer worth`, with their images."})
    output_dir: Path = field(metadata={"help": "The folder for the checkpoint with its router."})
    split: str | None = field(default=None, metadata={"help": "Split of --data."})
    image_folder: str | None = field(default=None, metadata={"help": "The folder with the images of a list."})
    class_names: str | None = field(default=None, metadata={"help": "JSON file {folder: name of the class}."})
    bad_rows: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Stop at rows that cannot be used, or leave them out."}
    )
    eval_worth: Path | None = field(default=None, metadata={"help": "As --worth, of questions to evaluate."})
    eval_data: list[str] = field(default_factory=list, metadata={"help": "As --data, for --eval_worth."})
    budgets: list[float] = field(
        default_factory=lambda: [5.0, 10.0, 20.0, 40.0, 80.0], metadata={"help": "Budgets to evaluate, in ms."}
    )
    timed_rows: int = field(default=64, metadata={"help": "Questions on which --eval_worth measures the time."})
    images: bool = field(default=True, metadata={"help": "Whether the router may see the image (--no_images)."})
    folds: int = field(default=5, metadata={"help": "Folds of the cross-validation over images."})
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


def load_images(args: RouterArguments, data: list[str], worth: Path) -> dict[str, Any]:
    """The images of data by their ids, undecoded. `prismer worth` has written the task of the data into `worth`."""
    task = json.loads((worth / "worth.json").read_text())["task"]
    rows = leave_undecoded(
        load_rows(
            data,
            task,
            args.split,
            train=False,
            image_folder=args.image_folder,
            class_names=args.class_names,
            bad_rows=args.bad_rows,
            check_images=False,
            **args.columns_of(task),
        )
    )
    return {row["image_id"]: row["image"]["path"] or row["image"]["bytes"] for row in images_of(rows)}


@torch.no_grad()
def add_features(samples: Samples, images: dict[str, Any], processor: Any, network: Any, batch_size: int = 32) -> None:
    """Adds the features of the images to samples."""
    names = list(dict.fromkeys(samples.image_ids))
    features = []
    for start in range(0, len(names), batch_size):
        batch = [images[name] for name in names[start : start + batch_size]]
        features.append(summarize_images(network, processor.process_images(batch, experts=[]).to(network.device)))
    places = {name: place for place, name in enumerate(names)}
    samples.features = torch.cat(features)[[places[name] for name in samples.image_ids]]


# ---- training ----


def fit(samples: Samples, penalty: float, image_scale: float) -> ExpertRouter:
    """
    Fits a router by ridge regression.

    Args:
        samples ([`Samples`]): the scores.
        penalty (`float`): on the weights.
        image_scale (`float`): scale of the standardised features of images, beside words that count 1. With 0, the
            router reads texts alone.
    """
    image_size = samples.features.shape[1] if image_scale and samples.features is not None else 0
    router = ExpertRouter(RouterConfig(samples.subsets, samples.seconds, image_size))
    words = [router.words_of(text) for text in samples.texts]
    ends = np.cumsum([0, *map(len, words)])
    shape = (len(words), router.config.buckets)
    inputs = sparse.csr_matrix((np.ones(ends[-1]), np.concatenate(words).astype(int), ends), shape)
    weights = {"mean": torch.zeros(0), "std": torch.zeros(0)}
    if image_size:
        weights = {"mean": samples.features.mean(0), "std": samples.features.std(0)}
        standard = (samples.features - weights["mean"]) / weights["std"].clamp(min=1e-6)
        inputs = sparse.hstack([inputs, image_scale * standard.numpy()], format="csr")
    members, scores = router.members.numpy(), samples.scores.numpy()
    gains = scores @ np.linalg.pinv(members).T  # (samples, 1 + experts)
    ridge = Ridge(penalty).fit(inputs, gains)
    coefficients = torch.from_numpy(ridge.coef_.T).float()
    rest = (scores - gains @ members.T).mean(0)  # of each subset, because gains do not simply add up
    weights |= {
        "words": coefficients[: router.config.buckets].contiguous(),
        "image": (image_scale * coefficients[router.config.buckets :]).contiguous(),
        "constants": torch.from_numpy(members @ ridge.intercept_ + rest).float(),
    }
    return ExpertRouter(router.config, weights)


def predict_others(samples: Samples, folds: int, penalty: float, image_scale: float) -> torch.Tensor:
    """The scores that routers predict for images that they were not fitted on: `(samples, subsets)`."""
    predicted = torch.zeros_like(samples.scores)
    for known, others in GroupKFold(folds).split(samples.texts, groups=samples.image_ids):
        own = samples.part(others)
        router = fit(samples.part(known), penalty, image_scale)
        predicted[others] = router.predict(own.texts, own.features if image_scale else None)
    return predicted


def train(samples: Samples, folds: int) -> ExpertRouter:
    """
    Chooses the penalty and the scale of images by cross-validation, fits the router, and measures prices. If images do
    not lower the error, the router reads texts alone.
    """
    errors: dict[tuple[float, float], float] = {}
    scales = (0.0,) if samples.features is None else IMAGE_SCALES
    for penalty, scale in itertools.product(PENALTIES, scales):
        predicted = predict_others(samples, folds, penalty, scale)
        errors[penalty, scale] = functional.mse_loss(predicted, samples.scores).item()
        logger.info("penalty %g, images %g: squared error %.5f", penalty, scale, errors[penalty, scale])
    penalty, scale = min(errors, key=lambda settings: errors[settings])
    blind = min((own for own in errors if not own[1]), key=lambda settings: errors[settings])
    if errors[penalty, scale] > WORTH_A_LOOK * errors[blind]:
        penalty, scale = blind
    router = fit(samples, penalty, scale)
    set_prices(router, predict_others(samples, folds, penalty, scale), samples.scores)
    return router


def set_prices(router: ExpertRouter, predicted: torch.Tensor, scores: torch.Tensor) -> None:
    """Measures the time and the score of prices, and chooses the fastest one that loses at most `TOLERANCE`."""
    config = router.config
    seconds = torch.tensor(config.seconds)
    for price in PRICES:
        rows = best_rows(predicted, config.seconds, price)
        score = scores.gather(1, rows[:, None]).mean().item()
        config.prices.append(RouterPrice(price, 1000 * seconds[rows].mean().item(), score))
    wanted = scores[:, -1].mean().item() - TOLERANCE
    good = [own for own in config.prices if own.score >= wanted] or config.prices[:1]
    fastest = min(own.milliseconds for own in good)
    # many prices may lead to this time; the lowest one leaves most room for questions of other kinds
    config.default_price = min(own.price for own in good if own.milliseconds <= 1.02 * fastest)


def main() -> None:
    (args,) = HfArgumentParser(RouterArguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    set_seed(args.seed)
    if args.output_dir.resolve() == Path(find_checkpoint(args.model)).resolve():
        raise SystemExit(f"--output_dir {args.output_dir} is the folder of --model; name another one")
    folder, processor, network = load_checkpoint(args.model)
    samples = read_samples(args.worth)
    number = len(set(samples.image_ids))
    if not 2 <= args.folds <= number:
        raise SystemExit(
            f"--folds is {args.folds}, and {args.worth} has {number} images; at least 2 folds are needed, and "
            "an image for each"
        )
    samples.texts = prompts_of(processor, samples.texts)
    if args.images:
        add_features(samples, load_images(args, args.data, args.worth), processor, network)
    router = train(samples, args.folds)
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
    images = load_images(args, args.eval_data or args.data, args.eval_worth)
    questions = test.texts
    test.texts = prompts_of(processor, questions)
    if router.config.image_size:
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
