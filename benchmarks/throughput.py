"""
A server's view: captions of many pictures in one process, labels given. Images a second, and where the time goes.

    python benchmarks/throughput.py                                 (64 images, by 1, 4 and 16 at a time)

The pictures are JPEG files of 640×480, their labels come from a label store, the captions are found by 3 beams and
have exactly 20 tokens with their prompt. Each stage counts only its own time: `generate` is what transformers'
generation does around the network. Writes result.json, table.md and throughput.png.
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
from rows import Setup, make_image_processor, make_model, picture_and_labels
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modeling_prismer import PrismerConfig, PrismerForConditionalGeneration, PrismerProcessor
from modeling_prismer.processing import load_images
from modeling_prismer.processing.labels import LabelStore, LabelWriter, make_manifest


STAGES = {
    "encoder": "the vision encoder with stems and resampler",
    "decoder": "the text decoder and its head",
    "generate": "what generate does around them: beams, caches",
    "loading": "opening the pictures, reading their labels from the store",
    "transform": "the image processor: transform and collate",
    "tokenising": "the prompts",
    "decoding": "tokens to text",
}
NETWORK = ("encoder", "decoder")


class Stopwatch:
    """Time by stages. A stage that begins within another stops that one's clock until it ends."""

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
        """From now on what `owner.method` takes is the stage's."""
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


# ---- what is served ----


def make_tokenizer(config: PrismerConfig) -> PreTrainedTokenizerFast:
    """As many words as the network has, made up but for those of the prompt."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, "A", "picture", "of"]
    words += [f"word{number}" for number in range(len(words), config.text_config.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_pictures(folder: Path, config: PrismerConfig, number: int) -> list[Path]:
    """JPEG files, and a label store of what experts would say of them in `folder / "labels"`."""
    paths = []
    manifest = make_manifest(None, config.experts, {"source": "made up"})
    with LabelWriter(folder / "labels", manifest) as writer:
        for index in range(number):
            picture, labels = picture_and_labels(config, seed=index)
            paths.append(folder / f"{index:04}.jpg")
            picture.save(paths[-1])
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
    """Captions of all pictures, `batch_size` at a time."""
    captions = []
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        with watch.stage("loading"):
            pictures = load_images([str(path) for path in batch])
            labels = store.labels_for([path.name for path in batch])
        with watch.stage("tokenising"):  # within it the pictures' transform, which is watched
            inputs = processor(images=pictures, expert_labels=labels, text="A picture of").to(model.device)
        with watch.stage("generate"):  # within it encoder and decoder, which are watched
            generated = model.generate(**inputs, num_beams=3, min_length=20, max_length=20, do_sample=False)
        with watch.stage("decoding"):
            captions += processor.post_process_generation(generated, inputs["input_ids"].shape[1])
    return captions


def run(setup: Setup, images: int, batch_sizes: list[int]) -> dict[str, Any]:
    """For each batch size the time of all, and that of each stage."""
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
    watch.watch(processor, "process_images", "transform")
    watch.watch(model, "get_image_features", "encoder")
    watch.watch(model, "forward", "decoder")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), model.config, images)
        store = LabelStore(Path(folder, "labels"))
        serve(model, processor, paths[:1], store, 1, watch)  # to warm up
        for batch_size in batch_sizes:
            print(f"{batch_size} at a time …", flush=True)
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
    """Share of the time that is not encoder or decoder."""
    return 1 - sum(entry["stages"][name] for name in NETWORK) / entry["seconds"]


def table(result: dict[str, Any]) -> str:
    rows = []
    for batch_size, entry in result["batch_sizes"].items():
        cells = [str(batch_size), f"{result['images'] / entry['seconds']:.3g}"]
        cells.append(f"{entry['seconds'] / result['images'] * 1e3:,.0f}")
        cells += [f"{entry['stages'][name] / entry['seconds']:.1%}" for name in STAGES]
        rows.append([*cells, f"{outside_the_network(entry):.1%}"])
    head = ["at a time", "images/s", "ms an image", *STAGES, "outside the network"]
    stages = "; ".join(f"{name}: {text}" for name, text in STAGES.items())
    return "\n\n".join(
        [
            markdown_table(head, rows),
            f"Shares of the time. {stages[0].upper()}{stages[1:]}.",
            f"{result['images']} images; {result['network']}; {machine_text(result['machine'])}.",
        ]
    )


COLORS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7")  # of Okabe and Ito


def figure(result: dict[str, Any], path: Path) -> None:
    """Milliseconds an image by stages, a bar for each batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = result["batch_sizes"]
    picture = Figure(figsize=(8, 1.6 + 0.6 * len(entries)), layout="constrained")
    axis = picture.subplots()
    left = [0.0] * len(entries)
    for name, color in zip(STAGES, COLORS):
        widths = [entry["stages"][name] / result["images"] * 1e3 for entry in entries.values()]
        axis.barh(range(len(entries)), widths, left=left, color=color, label=name, height=0.6)
        left = [a + b for a, b in zip(left, widths)]
    for place, entry in enumerate(entries.values()):
        speed = result["images"] / entry["seconds"]
        axis.text(1.01, place, f"{speed:.3g} images/s", transform=axis.get_yaxis_transform(), va="center")
    axis.set_yticks(range(len(entries)), [f"{batch_size} at a time" for batch_size in entries])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds an image")
    axis.spines[["top", "right"]].set_visible(False)
    picture.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=8)
    picture.suptitle(machine_title(result["network"], result["machine"]), fontsize=11)
    FigureCanvasAgg(picture).print_png(str(path))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"), help="folder for what is written")
    parser.add_argument("--images", type=positive, default=64)
    parser.add_argument("--batch_sizes", type=positive, nargs="+", default=[1, 4, 16])
    Setup.add_arguments(parser)
    args = parser.parse_args()
    setup = Setup.from_arguments(args)
    setup.prepare_process()
    result = run(setup, args.images, args.batch_sizes)
    write_result(args.out, result, table(result))
    figure(result, args.out / "throughput.png")


if __name__ == "__main__":
    main()
