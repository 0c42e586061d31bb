"""
Compares the answers of a deployed network with its answers in float32.

    python benchmarks/deployed_answers.py

The program asks prismer-easy-vqa the test questions of easy-VQA with the dtypes and quantisations of docs/deploy.md,
decoded greedily. Those whose library is not installed are left out. Sizes are those of the weights on disk. The
program writes result.json and table.md.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import easy_vqa
import torch
from measuring import machine_facts, machine_text, markdown_table, positive, write_result
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_prismer import PrismerForConditionalGeneration, PrismerProcessor, pretrained_path
from modeling_prismer.conversion import OnnxPrismer, export_onnx


CHECKPOINT = pretrained_path("prismer-easy-vqa")


def load(**kwargs: Any) -> PrismerForConditionalGeneration:
    return PrismerForConditionalGeneration.from_pretrained(CHECKPOINT, **kwargs)


def torchao_int8(name: str) -> PrismerForConditionalGeneration:
    import torchao.quantization

    return load(dtype=torch.float32, quantization_config=TorchAoConfig(getattr(torchao.quantization, name)()))


def bitsandbytes(**kwargs: Any) -> PrismerForConditionalGeneration:
    return load(dtype=torch.float32, device_map="cpu", quantization_config=BitsAndBytesConfig(**kwargs))


def onnx(folder: Path, int8: bool = False) -> OnnxPrismer:
    processor = PrismerProcessor.from_pretrained(CHECKPOINT, experts=None)
    export_onnx(load(dtype=torch.float32), processor, folder)
    if int8:
        from onnxruntime.quantization import quantize_dynamic

        for path in sorted(folder.glob("*.onnx")):
            quantize_dynamic(path, path.with_suffix(".int8"), op_types_to_quantize=["MatMul"])
            path.with_suffix(".int8").replace(path)
            Path(f"{path}.data").unlink()
    return OnnxPrismer(folder)


# name: (libraries that it needs, function that makes it in a folder)
FORMS: dict[str, tuple[tuple[str, ...], Callable[[Path], Any]]] = {
    "float32": ((), lambda folder: load(dtype=torch.float32)),
    "float16": ((), lambda folder: load(dtype=torch.float16)),
    "bfloat16": ((), lambda folder: load(dtype=torch.bfloat16)),
    "torchao int8": (("torchao",), lambda folder: torchao_int8("Int8WeightOnlyConfig")),
    "torchao int8, dynamic": (("torchao",), lambda folder: torchao_int8("Int8DynamicActivationInt8WeightConfig")),
    "bitsandbytes 8 bit": (("bitsandbytes",), lambda folder: bitsandbytes(load_in_8bit=True)),
    "bitsandbytes 4 bit": (
        ("bitsandbytes",),
        lambda folder: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    ),
    "ONNX": (("onnxscript", "onnxruntime"), onnx),
    "ONNX int8, dynamic": (("onnxscript", "onnxruntime"), lambda folder: onnx(folder, int8=True)),
}


def questions_by_image(images: int) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The inputs of each image with its questions and expert labels, and the true answers."""
    questions, answers, image_ids = easy_vqa.get_test_questions()
    paths = easy_vqa.get_test_image_paths()
    processor = PrismerProcessor.from_pretrained(CHECKPOINT)
    inputs, truths = [], []
    for image_id in sorted(set(image_ids))[:images]:
        rows = [row for row, of in enumerate(image_ids) if of == image_id]
        inputs.append(dict(processor(images=paths[image_id], text=[questions[row] for row in rows])))
        truths.append([answers[row] for row in rows])
    return inputs, truths


def answer(network: Any, inputs: list[dict[str, Any]]) -> tuple[list[list[str]], torch.Tensor]:
    """The answers for each image, and the logits of their first tokens: (questions, vocabulary)."""
    processor = PrismerProcessor.from_pretrained(CHECKPOINT, experts=None)
    answers, logits = [], []
    for each in inputs:
        images = {key: tensor for key, tensor in each.items() if key not in ("input_ids", "attention_mask")}
        prompts = {key: each[key] for key in ("input_ids", "attention_mask")}
        if isinstance(network, OnnxPrismer):
            encoded = network.encode(**images)
            scores = torch.from_numpy(network.forward(**prompts, encoded=encoded)[0])
            generated = network.generate(**prompts, encoded=encoded)
        else:
            encoded = network.get_image_features(**images)
            scores = network(**prompts, encoder_outputs=encoded).logits.float()
            generated = network.generate(**prompts, encoder_outputs=encoded, num_beams=1, do_sample=False)
        logits.append(scores[:, -1])
        answers.append(processor.post_process_generation(generated, prompts["input_ids"].shape[1]))
    return answers, torch.cat(logits)


def size(network: Any, folder: Path) -> int:
    """The size of the weights on disk in bytes."""
    if not isinstance(network, OnnxPrismer):
        network.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*") if path.suffix in (".safetensors", ".onnx", ".data"))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/deployed_answers"), help="folder for the result")
    parser.add_argument("--images", type=positive, default=200, help="number of test images; easy-VQA has 1,000")
    parser.add_argument("--only", nargs="+", metavar="FORM", choices=FORMS, help="only these forms, and float32")
    args = parser.parse_args()

    inputs, truths = questions_by_image(args.images)
    number = sum(map(len, truths))
    forms: dict[str, dict[str, Any]] = {}
    rows = []
    for name, (libraries, make) in FORMS.items():
        wanted = args.only is None or name in args.only or name == "float32"
        if not wanted or not all(map(importlib.util.find_spec, libraries)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            network = make(Path(folder) / "model")
            weights = size(network, Path(folder) / "model")  # first, because running it may repack the weights
            answers, logits = answer(network, inputs)
        if name == "float32":
            expected, expected_logits = answers, logits
        form = {
            "bytes": weights,
            "right": sum(map(count_equal, answers, truths)),
            "other_answers": number - sum(map(count_equal, answers, expected)),
            "logits_change": ((logits - expected_logits).norm() / expected_logits.norm()).item(),
        }
        forms[name] = form
        cells = [f"{weights / 1e6:.1f}", f"{form['logits_change']:.2g}", f"{form['right'] / number:.2%}"]
        rows.append([name, *cells, str(form["other_answers"])])
    head = ["", "weights, MB", "change of the logits", "exact match", "changed answers"]
    machine = machine_facts(torch.device("cpu"), torch.float32)
    text = "\n\n".join(
        [
            markdown_table(head, rows),
            f"Compared with float32 on {number} questions about {len(inputs)} images. Change of the logits: the norm "
            "of the change divided by the norm of the logits, for the first token of each answer. "
            f"{machine_text(machine)}.",
        ]
    )
    write_result(args.out, {"machine": machine, "questions": number, "forms": forms}, text)


def count_equal(first: list[str], second: list[str]) -> int:
    return sum(one == other for one, other in zip(first, second))


if __name__ == "__main__":
    main()
