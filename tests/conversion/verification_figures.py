"""
Prints the table of docs/convert.md: the distances of right and of broken maps from those of the training.

    PYTHONPATH=.:training_examples python -m tests.conversion.verification_figures

The maps are those of the live experts of `prismer-scenes` for 32 test scenes. It takes about a minute of one core.
"""

import copy

import torch
from PIL import Image

from modeling_prismer import ExpertSpec, PrismerForConditionalGeneration, PrismerProcessor, pretrained_path
from modeling_prismer.conversion.stem_inputs import examine_stem
from scenes.scenes import make_example
from tests.conversion.test_verification import BROKEN, shuffle_objects


NUM_IMAGES = 32


def main() -> None:
    torch.set_num_threads(1)
    model = PrismerForConditionalGeneration.from_pretrained(pretrained_path(), dtype=torch.float32)
    processor = PrismerProcessor.from_pretrained(pretrained_path())
    images = [Image.fromarray(make_example("test", index)["image"]) for index in range(NUM_IMAGES)]
    right = processor.run_experts(images)
    specs = {spec.name: spec for spec in model.config.expert_specs}
    cases = {f"right {name}": (name, lambda own: None, "") for name in specs} | BROKEN
    cases["shuffled objects"] = ("detection", shuffle_objects, "")
    print("| maps | expert | distance | cause |\n| --- | --- | --- | --- |")
    for case, (name, change, _) in cases.items():
        labels = copy.deepcopy(right)
        for own in labels:
            change(own)
        if labels[0][name] is None:
            continue
        inputs = processor.image_processor(images, labels, return_tensors="pt")
        of_expert = {suffix: inputs[f"{name}_{suffix}"] for suffix in specs[name].tensor_suffixes}
        show(case, model, specs[name], of_expert)
        if case == "right edge":
            for unit in (1, 255):
                values = (of_expert["values"] + 1) / 2 * unit
                show(f"edges from 0 to {unit}", model, specs[name], {"values": values})


def show(case: str, model: PrismerForConditionalGeneration, spec: ExpertSpec, inputs: dict[str, torch.Tensor]) -> None:
    found = examine_stem(model.model.vision_model.expert_stems[spec.name], spec, inputs)
    print(f"| {case} | {spec.name} | {found.distance:.3f} | {found.cause or 'none'} |", flush=True)


if __name__ == "__main__":
    main()
