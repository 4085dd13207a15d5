"""Check and measure the product on a GPU in at most eight minutes: `make gpu-check`.

    python benchmarks/gpu_check.py [--rehearse]

Runs the GPU tests, the training step of ViT-B and ViT-L, and the decoders, each within its own
time, and prints Markdown for docs/results.md. A part that fails or runs out of time is said, and
the next one goes on. Needs mae_core, torch, torchvision, timm, transformers and pytest, but neither
Ray nor a network. --rehearse does the same on the CPU, with small models.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "timm", "transformers", "simplejpeg", "numpy")


class Part(NamedTuple):
    title: str
    limit_s: int
    command: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small models")
    is_rehearsal = parser.parse_args().rehearse
    if not is_rehearsal and not torch.cuda.is_available():
        print("no GPU found; --rehearse runs the same on the CPU", file=sys.stderr)
        return 2
    print_machine("cpu" if is_rehearsal else "cuda")
    parts = rehearsal_parts() if is_rehearsal else gpu_parts()
    failed = [part.title for part in parts if not run(part, is_rehearsal=is_rehearsal)]
    print(f"\nNot finished: {', '.join(failed)}." if failed else "\nAll parts finished.")
    return 1 if failed else 0


def gpu_parts() -> list[Part]:
    """List the parts, the most wanted first; their limits add up to eight minutes."""
    step = ["benchmarks/train_step.py", "--device", "cuda", "--rounds", "2", "--seconds", "4"]
    base = [*step, "--encoders", "vit_base", "--batch"]
    return [
        Part("Step of ViT-B, eager", 60, [*base, "512"]),
        Part("Tests", 120, ["-m", "pytest", "tests/gpu", "-m", "gpu", *plain_pytest()]),
        Part("Step of ViT-B, compiled", 110, [*base, "1024", "--compile", "--ours-only"]),
        Part("Step of ViT-L", 90, [*step, "--encoders", "vit_large", "--batch", "256"]),
        Part("Decoding", 60, ["benchmarks/decode_threads.py", "--device", "cuda"]),
    ]


def rehearsal_parts() -> list[Part]:
    step = ["benchmarks/train_step.py", "--img-size", "32", "--patch-size", "8", "--batch", "2"]
    step += ["--encoders", "vit_nano", "--rounds", "1", "--seconds", "0.1", "--no-memory"]
    tests = ["-m", "pytest", "tests/gpu", "-m", "gpu and not compile", *plain_pytest()]
    decoding = ["benchmarks/decode_threads.py", "--threads", "1,2", "--seconds", "0.1"]
    return [
        Part("Step of a tiny model", 300, step),
        Part("Tests", 300, tests),
        Part("Decoding", 300, decoding),
    ]


def plain_pytest() -> list[str]:
    """Leave out what the other tests need: their fixtures, plugins and options."""
    settings = ["--noconftest", "-c", os.devnull, f"--rootdir={ROOT}", "-p", "no:cacheprovider"]
    return ["-q", *settings, "-W", "ignore::pytest.PytestUnknownMarkWarning"]


def print_machine(device: str) -> None:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    versions = ", ".join(f"{package} {installed(package)}" for package in PACKAGES)
    print(f"{datetime.now(UTC):%Y-%m-%d}, {name}, Python {platform.python_version()}, {versions}")


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def run(part: Part, *, is_rehearsal: bool) -> bool:
    """Run a part within its time, print all that it says, and return whether it succeeded."""
    print(f"\n### {part.title}\n", flush=True)
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-u", *part.command],
            cwd=ROOT,
            env=environment(is_rehearsal=is_rehearsal),
            timeout=part.limit_s,
            check=False,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired:
        print(f"\nstopped after {part.limit_s} s")
        return False
    print(f"\n{time.monotonic() - began:.0f} s, exit {done.returncode}", flush=True)
    return done.returncode == 0


def environment(*, is_rehearsal: bool) -> dict[str, str]:
    given = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))}
    if is_rehearsal:
        given |= {"MAE_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **given, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


if __name__ == "__main__":
    sys.exit(main())
