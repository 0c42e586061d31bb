"""
Measures the time from an image to its first answer, in Python, once the checkpoint is warm.

    python tests/spaces_demo/first_answer.py --threads 2

It prints medians in seconds: the wall-clock time, and in brackets the CPU time of all threads, which depends less on
other programs. "first word" and "caption" are counted from the start.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2] / "spaces_demo"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--model", default="prismer-scenes", help="a shipped name, a folder or a Hub id")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    import torch
    from readers import Readers

    from modeling_prismer import sample_image

    torch.set_num_threads(args.threads)
    reader, image = Readers([args.model], "cpu").main, sample_image("scene")
    reader.warm_up()
    runs: list[dict[str, tuple[float, float]]] = []
    for _ in range(args.repeats + 1):
        found: dict[str, tuple[float, float]] = {}
        start = (time.perf_counter(), time.process_time())

        def note(name: str, found: dict = found, start: tuple = start) -> None:
            found.setdefault(name, (time.perf_counter() - start[0], time.process_time() - start[1]))

        labels = {seen.name: seen.label for seen in reader.look(image)}
        note("experts")
        encoding = reader.encode(image, labels)
        note("encoded")
        steps = reader.say(encoding)
        first = next(steps)
        note("first word")
        caption = [first, *steps][-1]
        note("caption")
        runs.append(found)
    print(f"{args.model}: “{caption}”, {args.threads} threads, {args.repeats} runs after a first one")
    for name in runs[0]:
        wall, cpu = (statistics.median(own) for own in zip(*(run[name] for run in runs[1:])))
        print(f"{name:12} {wall:.2f} ({cpu:.2f})")


if __name__ == "__main__":
    main()
