"""
A load test: many clients ask at once. It fails on an error, on a wrong answer, or if memory grows.

    python tests/spaces_demo/load.py --clients 30 --seconds 120

Each client has its own image. Before the test, each image is answered alone. Under load, its answer must have the same
text, probability and attention.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from gradio_client import Client, handle_file
from PIL import Image, ImageDraw


ROOT = Path(__file__).parents[2]
QUESTION = "What color is the shape?"


def make_image(number: int, folder: Path) -> Path:
    """Draws a square or a circle whose position and color depend on `number`."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", (96, 96), tuple(int(value) for value in random.integers(200, 256, 3)))
    draw = ImageDraw.Draw(image)
    left, top = (int(value) for value in random.integers(8, 40, 2))
    color = tuple(int(value) for value in random.integers(0, 256, 3))
    box = (left, top, left + 44, top + 44)
    shapes = (draw.rectangle, draw.ellipse)
    shapes[number % 2](box, fill=color)
    path = folder / f"{number}.png"
    image.save(path)
    return path


def fingerprint(said: dict) -> tuple:
    return said["text"], round(said["probability"], 4), tuple(round(v, 3) for v in said["attention"].values())


def resident(pid: int) -> float:
    """The resident memory of a process in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def start_server(model: str | None) -> tuple[subprocess.Popen, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "spaces_demo/app.py"), "--port", str(port)]
    process = subprocess.Popen([*command, *(["--model", model] if model else [])], stdout=subprocess.DEVNULL)
    for _ in range(300):
        if process.poll() is not None:
            raise SystemExit("the server did not start")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
        time.sleep(1)
    raise SystemExit("the server did not start in 5 minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--model", help="a checkpoint; by default the one in the package")
    args = parser.parse_args()
    process, address = start_server(args.model)
    problems, waits, memory, served = [], [], [], set()
    try:
        with tempfile.TemporaryDirectory() as folder:
            images = [make_image(number, Path(folder)) for number in range(args.clients)]
            first = Client(address, verbose=False)
            alone = [fingerprint(first.predict(handle_file(str(p)), QUESTION, api_name="/ask")) for p in images]
            if len(set(alone)) < len(alone):
                print(f"note: only {len(set(alone))} of {len(alone)} fingerprints differ", file=sys.stderr)
            end = time.monotonic() + args.seconds

            def client(number: int) -> None:
                try:
                    mine = Client(address, verbose=False)
                    while time.monotonic() < end:
                        start = time.monotonic()
                        said = mine.predict(handle_file(str(images[number])), QUESTION, api_name="/ask")
                        waits.append(time.monotonic() - start)
                        served.add(number)
                        if fingerprint(said) != alone[number]:
                            problems.append(f"client {number} got {fingerprint(said)}, not {alone[number]}")
                except Exception as error:  # report any error; the other clients go on
                    problems.append(f"client {number}: {type(error).__name__}: {error}")

            threads = [threading.Thread(target=client, args=(number,)) for number in range(args.clients)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                memory.append(resident(process.pid))
                time.sleep(1)
    finally:
        process.terminate()
        process.wait()
    third = max(1, len(memory) // 3)
    report = {
        "clients": args.clients,
        "clients_served": len(served),
        "seconds": args.seconds,
        "answers": len(waits),
        "problems": len(problems),
        "median_wait_s": round(float(np.median(waits)), 2) if waits else None,
        "longest_wait_s": round(max(waits), 2) if waits else None,
        "memory_first_third_mb": round(float(np.mean(memory[:third]))),
        "memory_last_third_mb": round(float(np.mean(memory[-third:]))),
        "cores": os.cpu_count(),
    }
    print(json.dumps(report, indent=2))
    print("\n".join(problems[:20]), file=sys.stderr)
    sys.exit(bool(problems) or report["memory_last_third_mb"] > 1.05 * report["memory_first_third_mb"] + 20)


if __name__ == "__main__":
    main()
