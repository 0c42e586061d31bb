"""
Measures the throughput of a server: captions of many images in one process, with stored labels.

    python benchmarks/throughput.py                                 (64 images in batches of 1, 4 and 16)

The images are JPEG files of 640×480, and their labels come from a label store. Captions are found with 3 beams and
have exactly 20 tokens with the prompt. Each stage counts only its own time: `generate` is the work of transformers'
generation around the network. The program writes result.json, table.md and throughput.png.
"""

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measuring import machine_facts, machine_text, machine_title, markdown_table, positive, synchronize, write_result
from rows import Setup, image_and_labels, make_image_processor, make_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration, PrismerProcessor
from modeling_prismer.processing import load_images
from modeling_prismer.processing.labels import LabelStore, LabelWriter, make_manifest


STAGES = {
    "encoder": "the vision encoder with stems and resampler",
    "decoder": "the text decoder and its head",
    "generate": "the work of generate around them: beams, caches",
    "loading": "opens the images and reads their labels from the store",
    "transform": "the image processor: transforms and collates",
    "tokenising": "the prompts",
    "decoding": "tokens to text",
}
NETWORK = ("encoder", "decoder")


class Stopwatch:
    """Measures time by stages. A stage inside another one pauses the outer clock until it ends."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._device = device
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._take()
        self._running.append(name)
        try:
            yield
        finally:
            self._take()
            self._running.pop()

    def watch(self, owner: Any, method: str, name: str) -> None:
        """From now on, the time of `owner.method` counts for the stage."""
        call: Callable = getattr(owner, method)

        @functools.wraps(call)
        def watched(*args, **kwargs):
            with self.stage(name):
                return call(*args, **kwargs)

        setattr(owner, method, watched)

    def _take(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


# ---- inputs ----


def make_tokenizer(config: PrismerConfig) -> PreTrainedTokenizerFast:
    """A tokenizer with as many words as the network knows. All but those of the prompt are made up."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, "A", "picture", "of"]
    words += [f"word{number}" for number in range(len(words), config.text_config.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_images(folder: Path, config: PrismerConfig, number: int) -> list[Path]:
    """Writes JPEG files, and a store of made-up labels in `folder / "labels"`."""
    paths = []
    manifest = make_manifest(None, config.experts, {"source": "made up"})
    with LabelWriter(folder / "labels", manifest) as writer:
        for index in range(number):
            image, labels = image_and_labels(config, seed=index)
            paths.append(folder / f"{index:04}.jpg")
            image.save(paths[-1])
            writer.write(paths[-1].name, labels)
    return paths


# ---- measuring ----


def serve(
    model: PrismerForConditionalGeneration,
    processor: PrismerProcessor,
    paths: list[Path],
    store: LabelStore,
    batch_size: int,
    watch: Stopwatch,
) -> list[str]:
    """The captions of all images, `batch_size` at a time."""
    captions = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        with watch.stage("loading"):
            loaded = load_images([str(path) for path in batch])
            labels = store.labels_for([path.name for path in batch])
        with watch.stage("tokenising"):  # the transform inside it is watched
            inputs = processor(images=loaded, expert_labels=labels, text="A picture of").to(model.device)
        with watch.stage("generate"):  # encoder and decoder inside it are watched
            generated = model.generate(**inputs, num_beams=3, min_length=20, max_length=20, do_sample=False)
        with watch.stage("decoding"):
            captions += processor.post_process_generation(generated, inputs["input_ids"].shape[1])
    return captions


def run(setup: Setup, images: int, batch_sizes: list[int]) -> dict[str, Any]:
    """Measures the total time and the time of each stage for each batch size."""
    device = setup.torch_device
    torch.manual_seed(0)
    model = make_model(setup)
    processor = PrismerProcessor(make_image_processor(model.config), make_tokenizer(model.config))
    result: dict[str, Any] = {
        "network": setup.network,
        "machine": machine_facts(device, setup.torch_dtype),
        "images": images,
        "batch_sizes": {},
    }
    watch = Stopwatch(device)
    watch.watch(processor, "_image_inputs", "transform")
    watch.watch(model, "get_image_features", "encoder")
    watch.watch(model, "forward", "decoder")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), model.config, images)
        store = LabelStore(Path(folder, "labels"))
        serve(model, processor, paths[:1], store, 1, watch)  # warm up
        for batch_size in batch_sizes:
            print(f"batch size {batch_size} …", flush=True)
            watch.seconds = dict.fromkeys(STAGES, 0.0)
            synchronize(device)
            start = time.perf_counter()
            captions = serve(model, processor, paths, store, batch_size, watch)
            synchronize(device)
            seconds = time.perf_counter() - start
            assert len(captions) == images and all(captions)
            result["batch_sizes"][batch_size] = {"seconds": seconds, "stages": dict(watch.seconds)}
    return result


# ---- reading ----


def outside_the_network(entry: dict[str, Any]) -> float:
    """The share of the time that is spent outside encoder and decoder."""
    return 1 - sum(entry["stages"][name] for name in NETWORK) / entry["seconds"]


def table(result: dict[str, Any]) -> str:
    rows = []
    for batch_size, entry in result["batch_sizes"].items():
        cells = [str(batch_size), f"{result['images'] / entry['seconds']:.3g}"]
        cells.append(f"{entry['seconds'] / result['images'] * 1e3:,.0f}")
        cells += [f"{entry['stages'][name] / entry['seconds']:.1%}" for name in STAGES]
        rows.append([*cells, f"{outside_the_network(entry):.1%}"])
    head = ["batch size", "images/s", "ms per image", *STAGES, "outside the network"]
    stages = "; ".join(f"{name}: {text}" for name, text in STAGES.items())
    return "\n\n".join(
        [
            markdown_table(head, rows),
            f"The percentages are shares of the time. {stages[0].upper()}{stages[1:]}.",
            f"{result['images']} images; {result['network']}; {machine_text(result['machine'])}.",
        ]
    )


COLORS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7")  # of Okabe and Ito


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws the milliseconds per image by stages, one bar per batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = result["batch_sizes"]
    figure = Figure(figsize=(8, 1.6 + 0.6 * len(entries)), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(entries)
    for name, color in zip(STAGES, COLORS):
        widths = [entry["stages"][name] / result["images"] * 1e3 for entry in entries.values()]
        axis.barh(range(len(entries)), widths, left=left, color=color, label=name, height=0.6)
        left = [a + b for a, b in zip(left, widths)]
    for place, entry in enumerate(entries.values()):
        speed = result["images"] / entry["seconds"]
        axis.text(1.01, place, f"{speed:.3g} images/s", transform=axis.get_yaxis_transform(), va="center")
    axis.set_yticks(range(len(entries)), [f"batch size {batch_size}" for batch_size in entries])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds per image")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=8)
    figure.suptitle(machine_title(result["network"], result["machine"]), fontsize=11)
    FigureCanvasAgg(figure).print_png(str(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"), help="folder for the result")
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--batch_sizes", type=positive, nargs="+", default=[1, 4, 16])
    Setup.add_arguments(parser)
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    setup.prepare_process()
    result = run(setup, args.images, args.batch_sizes)
    write_result(args.out, result, table(result))
    draw(result, args.out / "throughput.png")


if __name__ == "__main__":
    main()
