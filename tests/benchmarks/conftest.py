"""The benchmark programs import each other as they do when they are run: by name, from their own folder."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
