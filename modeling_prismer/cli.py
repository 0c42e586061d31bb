"""The command line: `prismer ask`, `caption`, `classify`, `experts`, `label`, `convert`, `check` and others."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .command_line import conversion


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
out = Console()
err = Console(stderr=True)

ModelOption = Annotated[
    str | None,
    typer.Option(help="A folder, a Hub id or the name of a shipped checkpoint.", show_default="prismer-scenes"),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]
BeamsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Number of beams.", show_default="the checkpoint's, in its generation_config.json"),
]
Image = Annotated[str, typer.Argument(help="An image: a file or a URL.", metavar="IMAGE")]


# Device types of torch and its extensions. Whether a device is available is only known once torch is imported.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mlu", "musa", "npu")


def _print_version(wanted: bool) -> None:
    if wanted:
        from modeling_prismer import __version__

        print(f"prismer {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prismer: captions images, answers questions about them and classifies them, with frozen experts."""


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Prints errors that bad input causes as one line, and exits with code 1."""
    try:
        yield
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        raise _failed(error) from error
    except RuntimeError as error:
        from modeling_prismer.processing.experts import ExpertError

        if not isinstance(error, ExpertError):
            raise
        raise _failed(error) from error


def _failed(error: Exception) -> typer.Exit:
    err.print(f"error: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)


def _start(image: str | None = None, model: str | None = None, device: str = "cpu") -> None:
    """Checks the arguments that several commands share, without torch. Then imports the package."""
    if image is not None:
        _check_image(image)
    if model is not None:
        _check_model(model)
    name, _, index = device.partition(":")
    if device != "auto" and (name not in _DEVICES or (":" in device and not index.isdecimal())):
        raise ValueError(
            f"--device is {device!r}; accepted are auto, {', '.join(_DEVICES)}, and a number as in cuda:1"
        )
    import modeling_prismer.public  # noqa: F401  registers the Auto classes


def _check_image(image: str) -> None:
    if image.lower().startswith(("http://", "https://", "data:")):
        return
    if not os.path.exists(image):
        raise FileNotFoundError(f"IMAGE: there is no file {image!r}; a file or an http(s) URL is needed")
    if not os.path.isfile(image):
        raise ValueError(f"IMAGE: {image!r} is not a file; a file or an http(s) URL is needed")


def _check_model(model: str) -> None:
    """Raises if there is no such model. Fetches the configuration of a model on the Hub."""
    path = Path(_path(model))
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ValueError(f"model: the folder {model!r} has no config.json; it is not a saved model")
        return
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    from modeling_prismer.pretrained import shipped_checkpoints

    disable_progress_bars()
    try:
        snapshot_download(model, allow_patterns=["config.json", "adapter_config.json"])
    except (ValueError, OSError) as error:
        raise ValueError(
            f"model {model!r} is neither a folder, nor one of the shipped checkpoints "
            f"({', '.join(shipped_checkpoints())}), nor found on the Hub: {error}"
        ) from error


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {error}") from error
    return device


def _path(model: str | None) -> str:
    from modeling_prismer.pretrained import find_checkpoint, pretrained_path

    return pretrained_path() if model is None else find_checkpoint(model)


def _load_processor(model: str | None, device: str) -> Any:
    """Loads the processor of a checkpoint, by default the shipped one."""
    from transformers import logging

    from modeling_prismer import PrismerProcessor

    logging.disable_progress_bar()
    return PrismerProcessor.from_pretrained(_path(model), expert_device=device)


def _load_network(model: str | None, device: str, optimize: bool = True) -> Any:
    import torch

    from modeling_prismer import PrismerForConditionalGeneration, optimize_for_cpu

    # Half precision on a CPU is slower than float32.
    dtype = torch.float32 if device == "cpu" else "auto"
    network = PrismerForConditionalGeneration.from_pretrained(_path(model), dtype=dtype).to(device).eval()
    return optimize_for_cpu(network) if device == "cpu" and optimize else network


def _encode(network: Any, inputs: Any, model: str | None) -> Any:
    """Replaces the image's tensors in `inputs` by the encoded image. Warns if the image is unlike the training's."""
    import torch

    from modeling_prismer.familiarity import Familiarity, image_features

    texts = {name: inputs.pop(name) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        encoded = network.get_image_features(**inputs, return_dict=True)
    familiarity = Familiarity.from_pretrained(_path(model))
    if familiarity is not None:
        distance = familiarity.distance(image_features(network, encoded)).item()
        if distance > familiarity.limit:
            err.print(
                f"warning: this image is unlike those that the checkpoint was trained on (distance {distance:.0f}; "
                f"up to {familiarity.limit:.0f} is usual), so the output may be meaningless. The model card describes "
                "the images of its training. `prismer convert --help` shows how to get a checkpoint for photographs.",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
    return {**texts, "encoder_outputs": encoded}


def _generate(
    image: str, texts: list[str] | None, task: str, model: str | None, device: str, beams: int | None
) -> list[str]:
    _start(image, model, device)
    device = _device(device)
    processor = _load_processor(model, device)
    tasks = processor.tasks or [processor.task]
    if task not in tasks:
        raise ValueError(f"this checkpoint was made for {', '.join(tasks)}; this command needs one for {task!r}")
    inputs = processor(images=image, text=texts, task=task, return_tensors="pt").to(device)
    prompt_length = inputs["input_ids"].shape[1]
    network = _load_network(model, device)
    settings = {} if beams is None else {"num_beams": beams}
    generated = network.generate(**_encode(network, inputs, model), do_sample=False, **settings)
    return processor.post_process_generation(generated, prompt_length, task=task)


@app.command()
def ask(
    image: Image,
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="One or more, each in quotes.")],
    model: ModelOption = None,
    beams: BeamsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Answers questions about an image. Prints each answer on its own line."""
    with _clear_errors():
        if not all(question.strip() for question in questions):
            raise ValueError("a question is empty; put it in quotes: 'What color is it?'")
        for answer in _generate(image, questions, "vqa", model, device, beams):
            out.print(answer, markup=False, highlight=False)


@app.command()
def caption(
    image: Image,
    model: ModelOption = None,
    prompt: Annotated[str | None, typer.Option(help="The beginning of the caption.")] = None,
    beams: BeamsOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Describes an image in a sentence."""
    with _clear_errors():
        (text,) = _generate(image, prompt if prompt is None else [prompt], "caption", model, device, beams)
        out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def classify(
    image: Image,
    labels: Annotated[list[str], typer.Argument(help="The labels to choose from.")],
    question: Annotated[
        str | None, typer.Option(help="The question that the labels answer. Only checkpoints for questions need it.")
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Ranks your own labels for an image, best first."""
    with _clear_errors():
        _start(image, model, device)
        device = _device(device)
        processor = _load_processor(model, device)
        candidates = processor.prepare_candidates(labels, task=processor.task_for(question)).to(device)
        inputs = processor(images=image, text=question, return_tensors="pt").to(device)
        network = _load_network(model, device)
        ranking = network.rank_candidates(**candidates, k=len(labels), **_encode(network, inputs, model))
        table = Table("label", "mean log-probability")
        for row in processor.post_process_ranking(ranking, labels)[0]:
            table.add_row(row["label"], f"{row['score']:.3f}")
        out.print(table)


@app.command()
def experts(
    image: Image,
    output: Annotated[Path, typer.Option("--out", help="The folder for the panel; made if it does not exist.")],
    model: ModelOption = None,
    suite: Annotated[
        str | None, typer.Option("--experts", help="The name of a suite to run instead of the checkpoint's experts.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Draws the output of each expert for an image."""
    with _clear_errors():
        if output.exists() and not output.is_dir():
            raise ValueError(f"--out {output} is a file; a folder is needed")
        _start(image, model, device)
        from modeling_prismer.expert_spec import read_specs
        from modeling_prismer.processing.image_loading import load_image
        from modeling_prismer.processing.visualization import experts_panel

        opened = load_image(image)
        if suite is None:
            processor = _load_processor(model, _device(device))
            live, descriptions, run = processor.experts, processor.image_processor.experts, processor.run_experts
        else:
            from modeling_prismer.processing.experts import ExpertSuite

            run = live = ExpertSuite.from_name(suite).to(_device(device))
            descriptions = live.descriptions
        start = time.perf_counter()
        labels = run([opened])[0]
        seconds = time.perf_counter() - start
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"{Path(image).stem}_experts.png"
        temporary = path.with_suffix(".tmp")
        specs = read_specs(descriptions)
        panel = experts_panel(
            opened,
            {spec.name: labels.get(spec.name) for spec in specs},
            descriptions=specs,
            class_names=live.class_names if live is not None else None,
        )
        panel.save(temporary, format="PNG")
        temporary.replace(path)
        err.print(f"{', '.join(spec.name for spec in specs)} in {seconds:.1f} s", highlight=False)
        print(path)


def _list_engines(wanted: bool) -> None:
    if wanted:
        from modeling_prismer.processing.labels import LabelEngine

        table = Table("engine", "where the experts run", "options", "installed")
        for name, engine in LabelEngine.registry.items():
            installed = "yes" if engine.is_installed() else f"no: {engine.how_to_install()}"
            table.add_row(name, engine.description, ", ".join(engine.option_names()), Text(installed))
        out.print(table)
        raise typer.Exit()


@app.command()
def label(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="Images, webdataset tars or Parquet files: a folder, a file, a glob in quotes; or a saved data set.",
        ),
    ],
    output: Annotated[Path, typer.Option("--out", help="The label store, a folder. It is continued if it exists.")],
    experts: Annotated[
        str, typer.Option(help="A suite by name (offline, fast, published), or the folder of a checkpoint.")
    ] = "offline",
    engine: Annotated[str, typer.Option(help="Where the experts run; --list-engines lists the names.")] = "local",
    list_engines: Annotated[
        bool,
        typer.Option("--list-engines", callback=_list_engines, is_eager=True, help="List the engines and exit."),
    ] = False,
    shard: Annotated[str | None, typer.Option(help="Label one part of the images; 0/8 is the first of eight.")] = None,
    map_size: Annotated[
        int | None,
        typer.Option(min=1, help="Reduce maps to this many pixels square; the network reads 224."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of images that an expert gets at once.")] = 32,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of workers of the engine.")] = None,
    image_column: Annotated[
        str | None,
        typer.Option(help="The images' column in a data set, or their type in tars (jpg)."),
    ] = None,
    key_column: Annotated[str | None, typer.Option(help="The column that names each image of a data set.")] = None,
    allow_other_versions: Annotated[
        bool,
        typer.Option("--allow-other-versions", help="Continue a store that other versions of the libraries began."),
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set unreadable files of the store aside and label their images again.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Label images that failed before again.")
    ] = False,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs per worker, if the engine has this option; 0.25 shares one GPU.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """
    Runs experts over many images once and stores their labels.

    Run the same command again after an interruption or a full disk: it labels the images that are left.
    """
    with _clear_errors():
        _start(device=device)
        from modeling_prismer.processing.experts import ExpertSuite
        from modeling_prismer.processing.labels import forget_failed, label_images, parse_shard, set_aside_damaged

        part = None if shard is None else parse_shard(shard)
        options: dict[str, Any] = {"num_workers": workers, "gpus_per_worker": gpus_per_worker}
        is_folder = Path(experts).is_dir()
        suite = ExpertSuite.from_pretrained(experts) if is_folder else ExpertSuite.from_name(experts)
        if retry_failed:
            if repair:
                set_aside_damaged(output)
            forget_failed(output)
        report = label_images(
            images,
            suite.to(_device(device)),
            output,
            engine,
            batch_size=batch_size,
            shard=part,
            image_column=image_column,
            key_column=key_column,
            map_size=map_size,
            allow_other_versions=allow_other_versions,
            repair=repair,
            **{name: value for name, value in options.items() if value is not None},
        )
        for key, error in list(report.errors.items())[:10]:
            err.print(f"damaged: {key}: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        if report.failed > 10:
            rest = f"and {report.failed - 10} more; LabelStore({str(output)!r}).errors lists all"
            err.print(rest, markup=False, highlight=False, soft_wrap=True)
        rate = f"{report.images_per_second:.1f} images/s, {report.bytes / max(1, report.images) / 1000:.1f} kB each"
        err.print(f"{report.images} images labelled, {report.failed} of them damaged; {rate}", highlight=False)
        print(output)


@app.command()
def features(
    names: Annotated[Path, typer.Argument(metavar="NAMES", help="A text file with one class name on each line.")],
    output: Annotated[Path, typer.Option("--out", help="The table to write, a safetensors file.")],
    expert: Annotated[str, typer.Option(help="The label expert that has these classes.")] = "segmentation",
    pca: Annotated[
        Path | None,
        typer.Option(
            help="The analysis of the features: clip_pca.pkl as published, or safetensors. Fitted by default."
        ),
    ] = None,
    text_encoder: Annotated[str, typer.Option(help="CLIP: a folder or a Hub id.")] = "openai/clip-vit-large-patch14",
    background: Annotated[str, typer.Option(help="The name of the background.")] = "background",
) -> None:
    """Makes the features of an expert's classes from the names of the classes."""
    with _clear_errors():
        classes = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not classes:
            raise ValueError(f"{names} names no class; one name on each line is needed")
        _start()
        from modeling_prismer.conversion import convert_clip_pca, save_class_features
        from modeling_prismer.processing.experts import ClipTextFeatures

        if pca is None:
            pca = output.with_name(f"{output.stem}_pca.safetensors")
            ClipTextFeatures.fit_pca(classes, pca, model_name=text_encoder)
            err.print(f"the analysis, for other tables and for words: {pca}", highlight=False, soft_wrap=True)
        elif pca.suffix == ".pkl":  # as published
            pca = convert_clip_pca(pca, output.with_name(f"{output.stem}_pca.safetensors"))
        text_features = ClipTextFeatures(pca=str(pca), model_name=text_encoder)
        save_class_features({expert: classes}, text_features, output, background)
        print(output)


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators; else what torch recommends.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the content of OUT.")] = False,
) -> None:
    """Writes a model as ONNX, for onnxruntime: encoder.onnx, decoder.onnx, the processor."""
    with _clear_errors():
        _start(model=model)
        from modeling_prismer.conversion import export_onnx
        from modeling_prismer.conversion.output_folder import check_output_dir

        check_output_dir(output, overwrite)
        processor, network = _load_processor(model, "cpu"), _load_network(model, "cpu", optimize=False)
        print(export_onnx(network, processor, output, opset_version=opset, overwrite=overwrite))


@app.command()
def check(
    device: DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Tests this installation: runs a small network on a device and compares its outputs with recorded ones."""
    with _clear_errors():
        _start(device=device)
        import torch
        from transformers import logging

        from modeling_prismer.self_check import SelfCheck, environment

        logging.disable_progress_bar()
        device = _device(device)
        for name, version in environment(device).items():
            out.print(f"{name}: {version}", markup=False, highlight=False, soft_wrap=True)
        self_check = SelfCheck(device, getattr(torch, dtype, dtype))
        table = Table("check", "holds", "result", "seconds", title=f"{dtype} on {device}")
        failed = []
        for result in self_check.run():
            holds = {True: "yes", False: "NO", None: "not available"}[result.holds]
            table.add_row(result.name, holds, Text(result.detail), f"{result.seconds:.1f}")
            if result.holds is False:
                failed.append(result.name)
        out.print(table)
        if failed:
            raise ValueError(f"{len(failed)} of the checks failed: {', '.join(failed)}")


app.add_typer(conversion.commands)

if __name__ == "__main__":
    sys.exit(app())
