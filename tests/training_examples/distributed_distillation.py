"""Runs all stages of a distillation in one of several processes."""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState

from modeling_prismer import PrismerForConditionalGeneration


def all_stages(folder: Path, checkpoint: Path, image_folder: Path) -> None:
    """Writes the sums of the trained weights of this process after each stage."""
    import run_distillation
    from distillation import DistillationMixin

    sums, original = {}, DistillationMixin.log
    shared = ["--train_data", image_folder / "captions.csv", "--image_size", 32, "--do_train", "--max_steps", 2]
    shared += ["--per_device_train_batch_size", 2, "--labels", "live", "--logging_steps", 1, "--save_strategy", "no"]
    shared += ["--learning_rate", 0.01, "--use_cpu"]
    model = checkpoint
    for stage in ("teachers", "experts", "task"):

        def remember(self, *args, stage=stage, **kwargs):
            weights = [weight for weight in self.model.parameters() if weight.requires_grad]
            sums[stage] = [weight.double().sum().item() for weight in weights]
            return original(self, *args, **kwargs)

        DistillationMixin.log = remember
        out = folder / stage
        arguments = ["--distil", stage, "--model", model, "--output_dir", out, "--num_adaptors", 3, *shared]
        sys.argv = ["run_distillation", *map(str, arguments)]
        run_distillation.main()
        PartialState().wait_for_everyone()  # the first process writes the model
        model = out
    assert PrismerForConditionalGeneration.from_pretrained(model).config.imitated_experts == ["edge"]
    (folder / f"sums_{os.environ['RANK']}.json").write_text(json.dumps(sums))
