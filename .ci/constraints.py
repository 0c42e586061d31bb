"""Writes a constraints file from pip's report: `pip install --dry-run --report - … | python constraints.py OUT`."""

import json
import sys
from pathlib import Path


PYTHON = "{}.{}".format(*sys.version_info)
HEADER = f"# The exact versions that were tested, on Python {PYTHON}. `make constraints` writes this file.\n"


def main(output: Path) -> None:
    packages = [package["metadata"] for package in json.load(sys.stdin)["install"]]
    pins = sorted(f"{package['name'].lower()}=={package['version']}" for package in packages)
    own = [pin for pin in pins if not pin.startswith("modeling-prismer==")]
    temporary = output.with_suffix(".tmp")
    temporary.write_text(HEADER + "\n".join(own) + "\n", encoding="utf-8")
    temporary.replace(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
