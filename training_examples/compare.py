"""
Compares models on your data: Prismer, PrismerLM, vision-language models of transformers, CLIP and SigLIP, and language
models without images.

    python training_examples/compare.py --models runs/answers Qwen/Qwen2.5-VL-3B-Instruct runs/SmolLM2-135M-Instruct \\
        --tasks vqa yes_no --data my_questions --output_dir runs/comparison
    python training_examples/compare.py --models prismer-scenes prismer-scenes@none openai/clip-vit-base-patch32 \\
        --tasks caption retrieval --data scenes --max_rows 200 --output_dir runs/comparison

Each model runs in a process of its own. Its results are kept in the output folder: a comparison that was stopped goes
on, and a model that is added later runs alone. `table.md`, `scores.png` and `results.json` have each score with its
95 % interval, the paired difference to the first model, seconds and memory for an image, parameters and experts. A
model that cannot do a task is listed with the reason. docs/comparison.md lists the tasks and their data.
"""

import logging
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, set_seed
from transformers import logging as transformers_logging

from comparison.arguments import CompareArguments, ModelName, read_models
from comparison.measuring import measure_cost
from comparison.models import CannotDo, Model, kind_of, open_model
from comparison.report import Described, Result, write_report
from comparison.trials import Trial, make_trials
from modeling_prismer.command_line.arguments import weight_fingerprint


logger = logging.getLogger("prismer")

# arguments that change no result
SHOWN_ONLY = ("models", "tasks", "output_dir", "own_process", "shots")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    try:
        (args,) = HfArgumentParser(CompareArguments).parse_args_into_dataclasses()
        models = read_models(args.models)
        if args.output_dir is None:
            raise ValueError("--output_dir is missing: the folder of results, table and figure")
        for name in models:
            kind_of(name)
        if args.shots_by == "similar":
            args.similar_by = args.similar_by or args.models[0]
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        trials = make_trials(args)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"compare.py: {error}") from error
    failed = []
    for name in models:
        try:
            in_own_process(name, args) if args.own_process else measure_model(name, args)
        except Exception:  # libraries raise all kinds; the other models still run, and the next start repeats this one
            logger.exception("%s failed", name.name)
            failed.append(name.name)
    settings = {name: settings_of(args, name) for name in models}
    done = [find_result(args, name, trial, settings[name]) for trial in trials for name in models]
    results = [result for result in done if result is not None]
    if results:
        write_report(trials, results, Path(args.output_dir), args.seed)
        print((Path(args.output_dir) / "table.md").read_text())
    if failed:
        raise SystemExit(f"compare.py: {', '.join(failed)} failed, see above; the report has the others")


def in_own_process(name: ModelName, args: CompareArguments) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(measure_model, name, args).result()


def measure_model(name: ModelName, args: CompareArguments) -> None:
    """Runs the trials of a model that have no results yet."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    transformers_logging.set_verbosity_error()
    settings = settings_of(args, name)
    trials = [trial for trial in make_trials(args) if find_result(args, name, trial, settings) is None]
    if not trials:
        logger.info("%s: all results are there", name.name)
        return
    set_seed(args.seed)
    model = open_model(name, args)
    described = Described(
        name.name,
        name.path,
        model.kind,
        model.num_parameters,
        model.num_trained,
        model.experts,
        model.expert_bytes,
    )
    for trial in trials:
        own = {**settings, "asked": trial.digest}
        measure_trial(model, described, trial, args, own).save(file_of(args, name, trial))


def measure_trial(model: Model, described: Described, trial: Trial, args: CompareArguments, settings: dict) -> Result:
    try:
        said, cost = measure_cost(lambda: trial.ask(model), args.torch_device)
    except CannotDo as error:
        logger.info("%s, %s: %s", described.name, trial.title, error)
        return Result(described, trial.title, reason=str(error), settings=settings)
    scores = trial.score(said)
    shown = ", ".join(f"{score.name} {score.value:.1f}" for score in scores)
    logger.info("%s, %s: %s", described.name, trial.title, shown)
    return Result(
        described,
        trial.title,
        scores,
        said if isinstance(said[0], str) else [],
        cost.seconds / trial.num_images,
        cost.megabytes / min(args.batch_size, trial.num_images),
        settings=settings,
    )


def settings_of(args: CompareArguments, name: ModelName) -> dict[str, Any]:
    """The settings and weights that change the results of a model. Those of the trial are in its digest."""
    weights = [weight_fingerprint(path) for path in (name.path, args.language) if path is not None]
    shared = {key: value for key, value in asdict(args).items() if key not in SHOWN_ONLY}
    return {"path": name.path, "experts": name.experts, "weights": weights, **shared}


def file_of(args: CompareArguments, name: ModelName, trial: Trial) -> Path:
    return Path(args.output_dir or ".", "runs", name.folder, f"{trial.file_name}.json")


def find_result(args: CompareArguments, name: ModelName, trial: Trial, settings: dict[str, Any]) -> Result | None:
    """The result of a model in a trial. `None` if there is none with these settings, weights and questions."""
    path = file_of(args, name, trial)
    if not path.exists():
        return None
    result = Result.load(path)
    return result if result.settings == {**settings, "asked": trial.digest} else None


if __name__ == "__main__":
    main()
