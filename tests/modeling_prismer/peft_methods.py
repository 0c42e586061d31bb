"""
What each method of the installed peft can do with a Prismer. As a command it writes the table in docs/peft.md:

    python -m tests.modeling_prismer.peft_methods
"""

import copy
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from modeling_prismer import PrismerForConditionalGeneration

from .tiny import EXPERTS, image_inputs, prompts, tiny_config, tiny_model, training_inputs


GUIDE = Path(__file__).parents[2] / "docs" / "peft.md"
COLUMNS = ("trains", "generates", "saved, loaded", "merged")
HEADER = ("method", "configuration", "modules, by default", *COLUMNS, "")
EXPERTS_HERE = [EXPERTS[0], EXPERTS[2]]
NO_MERGE = "Nothing to merge: the method does not change weights."
VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


@dataclass
class Case:
    """Settings that a method needs beyond its defaults, often because the model is narrow; one row of the table."""

    settings: dict = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)
    remark: str = ""


TASKS = {"task_ids": torch.tensor([0, 1])}
CASES = {
    "ADALORA": Case(
        {"total_step": 10}, remark="`total_step` is needed; call `model.base_model.update_and_allocate(step)`."
    ),
    "ADAPTION_PROMPT": Case(remark="peft has it for Llama, Mistral and GPT-2 only, and says so."),
    "C3A": Case({"block_size": 8}),
    "CARTRIDGE": Case(VIRTUAL, remark=NO_MERGE),
    "CPT": Case(
        {
            "task_type": "CAUSAL_LM",
            "cpt_token_ids": [5, 6, 7],
            "cpt_mask": [1, 1, 1],
            "cpt_tokens_type_mask": [1, 2, 4],
        },
        remark=f"{NO_MERGE} Its loss is peft's, not Prismer's.",
    ),
    "FOURIERFT": Case({"n_frequency": 20}),
    "FROD": Case(remark="The decoder only: modules of one name must have one width."),
    "LILY": Case(
        remark="It averages over all tokens of a batch, so what it says depends on the batch, and generation differs "
        "from the forward pass. peft cannot merge it."
    ),
    "MISS": Case({"r": 8}),
    "MULTITASK_PROMPT_TUNING": Case(
        {**VIRTUAL, "num_tasks": 2, "num_ranks": 2},
        TASKS,
        NO_MERGE,
    ),
    "POLY": Case(
        {"task_type": "CAUSAL_LM", "r": 4, "n_tasks": 2},
        TASKS,
        'With `task_type="CAUSAL_LM"` and one of `task_ids` for each image; generate without beams. peft cannot merge '
        "it.",
    ),
    "PREFIX_TUNING": Case(VIRTUAL, remark=f"{NO_MERGE} Not with gradient checkpointing."),
    "PROMPT_TUNING": Case(VIRTUAL, remark=NO_MERGE),
    "PSOFT": Case({"r": 8}),
    "P_TUNING": Case({**VIRTUAL, "encoder_hidden_size": 8}, remark=NO_MERGE),
    "RANDLORA": Case({"r": 4}),
    "ROAD": Case({"group_size": 8}),
    "SHADOW": Case(remark="It copies a decoder: give it the decoder, see below."),
    "SHIRA": Case({"r": 4}),
    "TRAINABLE_TOKENS": Case(
        {"token_indices": [5, 6]},
        remark="Before merging, peft leaves out the bias of the tied output layer "
        "([peft#3649](https://github.com/huggingface/peft/issues/3649)).",
    ),
    "VBLORA": Case({"vector_length": 8, "num_vectors": 16}),
    "WAVEFT": Case({"n_frequency": 50}),
    "XLORA": Case(
        {"task_type": "CAUSAL_LM", "hidden_size": 24},
        remark="Mixes saved LoRA adapters of the decoder's self-attention; `config.use_cache = False`. " + NO_MERGE,
    ),
}


def small_model() -> PrismerForConditionalGeneration:
    """As small as a Prismer with both kinds of experts can be; encoder and decoder differ in width."""
    config = tiny_config(experts=EXPERTS_HERE)
    config.vision_config.num_hidden_layers = config.vision_config.resampler_layers = 1
    config.text_config.num_hidden_layers = 2
    return tiny_model(config)


def adapted(method: str, folder: str) -> tuple[peft.PeftModel, peft.PeftConfig]:
    settings = copy.deepcopy(CASES.get(method, Case()).settings)
    model = small_model()
    if method == "XLORA":
        targets = r".*text_model\..*\.self_attn\.(q_proj|v_proj)"
        for name in ("0", "1"):
            expert = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            peft.get_peft_model(small_model(), expert).save_pretrained(f"{folder}/{name}")
        settings["adapters"] = {name: f"{folder}/{name}" for name in ("0", "1")}
        model.config.use_cache = False
    config = PEFT_TYPE_TO_CONFIG_MAPPING[method](**settings)
    return peft.get_peft_model(model, config), config


def examine(method: str, folder: str) -> tuple[dict[str, str], list[Exception]]:
    """`yes`, `no` or `–` (does not apply) for each of `COLUMNS`, and the errors behind each `no`."""
    result, errors = dict.fromkeys(COLUMNS, "no"), []
    case = CASES.get(method, Case())
    inputs = {**training_inputs(batch_size=2, experts=EXPERTS_HERE), **case.inputs}
    images = {**image_inputs(batch_size=2, experts=EXPERTS_HERE), **case.inputs}
    generation = {"do_sample": False, "num_beams": 1, "max_new_tokens": 3, "min_new_tokens": 3}
    generation |= {"return_dict_in_generate": True, "output_logits": True}
    try:
        model, config = adapted(method, folder)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
        model.train()
        optimizer = torch.optim.AdamW({parameters[name] for name in trained}, lr=0.01)
        model(**inputs).loss.backward()
        optimizer.step()
        if method == "ADALORA":
            model.base_model.update_and_allocate(0)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        if not changed or changed - trained:
            raise AssertionError(f"changed: {sorted(changed - trained) or 'nothing'}")
        result["trains"] = "yes"
    except Exception as error:
        return result, [error]

    model.eval()
    logits = model(**inputs).logits.detach()
    try:
        generated = model.generate(input_ids=prompts(2), **images, **generation)
        expected = model(input_ids=generated.sequences, **images).logits[:, -4:-1]
        torch.testing.assert_close(torch.stack(generated.logits, dim=1), expected, atol=1e-4, rtol=1e-4)
        result["generates"] = "yes"
    except Exception as error:
        errors.append(error)
    try:
        model.save_pretrained(f"{folder}/adapter")
        base = small_model()
        base.config.use_cache = model.config.use_cache if method == "XLORA" else True
        loaded = peft.PeftModel.from_pretrained(base, f"{folder}/adapter").eval()
        torch.testing.assert_close(loaded(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
        result["saved, loaded"] = "yes"
    except Exception as error:
        errors.append(error)
    if config.is_prompt_learning or method == "XLORA":
        result["merged"] = "–"
        return result, errors
    try:
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-3, rtol=1e-4)
        result["merged"] = "yes"
    except Exception as error:
        errors.append(error)
    return result, errors


def row(method: str, result: dict[str, str]) -> str:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[method]
    tuner = peft.PEFT_TYPE_TO_TUNER_MAPPING.get(method)
    targets = (getattr(tuner, "target_module_mapping", None) or {}).get("prismer")
    if method == "IA3":
        targets = peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING["prismer"]
    elif method == "TRAINABLE_TOKENS":
        targets = ["word_embeddings"]
    shown = targets if isinstance(targets, str) else ", ".join(targets or ["–"])
    shown = "–" if shown == "–" else "`" + shown.replace("|", "\\|") + "`"
    remark = CASES.get(method, Case()).remark
    cells = (method, f"`{config_class.__name__}`", shown, *(result[column] for column in COLUMNS), remark)
    return "| " + " | ".join(cells) + " |"


def rows_of_the_guide() -> dict[str, str]:
    """The rows of the table in docs/peft.md, by method."""
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    return {line.split("|")[1].strip(): line for line in lines if re.match(r"\| [A-Z0-9_]+ \|", line)}


def main() -> None:
    lines = [f"peft {peft.__version__}:", "", "| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for method in sorted(method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING):
        with tempfile.TemporaryDirectory() as folder:
            result, errors = examine(method, folder)
        lines.append(row(method, result))
        print(lines[-1], *(f"    {type(error).__name__}: {str(error)[:300]}" for error in errors), sep="\n")
    start, end = "<!-- methods -->\n", "<!-- end of methods -->"
    guide = GUIDE.read_text(encoding="utf-8")
    before, rest = guide.split(start)
    GUIDE.write_text(before + start + "\n".join(lines) + "\n" + end + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
