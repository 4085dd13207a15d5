"""Measure what a command takes before it works, and where that goes: `make bench-startup`, or

    python benchmarks/startup.py [CHECKOUT ...]     # other versions, measured in turn with this one

It prints Markdown: for each command, the median seconds and CPU-seconds of TIMES turns (3), beside
those of plain Ray; then, for this version, where the CPU-seconds to the first step go, by process
and by import. A pretraining counts until it reports its first step, other commands until they end.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]
TIMES = int(os.environ.get("TIMES", "3"))
SAMPLE_EVERY_S = 0.05
TIMEOUT_S = 600
MIN_SHOWN_S = 0.1  # processes and imports that take less are summed up
FIRST_STEP = re.compile(r"step 1/\d+ ")
FLOOR = """
import sys
import ray, ray.data, ray.train
from ray.train.torch import TorchTrainer

def train():
    for _ in ray.train.get_dataset_shard("train").iter_batches(batch_size=1):
        print("step 1/1 ", file=sys.stderr, flush=True)
        break

ray.init("local", num_cpus=4, include_dashboard=False)
trainer = TorchTrainer(
    train,
    scaling_config=ray.train.ScalingConfig(num_workers=int(sys.argv[1])),
    datasets={"train": ray.data.range(100)},
)
trainer.fit()
"""
# What a finished pretraining, a plan and a pipeline are measured on; of little work.
SHORT = ["optim.max_steps=2"]
CHAIN = """
name: short
stages:
  prepare:
    files: [{root}/configs/prepare/demo.yaml]
    set: {{output: "{{self}}/shapes", num_train: 320, num_val: 40}}
  pretrain:
    files: [{root}/configs/pretrain/demo.yaml]
    set:
      data.train: "{{prepare}}/train"
      data.val: "{{prepare}}/val"
      optim.max_steps: 2
"""


class Spent(NamedTuple):
    seconds: float
    cpu_seconds: float
    by_process: Counter[str]


class Case(NamedTuple):
    name: str
    command: list[str]
    to_first_step: bool = False


def mae(*words: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *words]


def environment(root: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MAE_"))}
    return {**kept, "PYTHONPATH": str(root), "RAY_USAGE_STATS_ENABLED": "0"}


def measure(case: Case, root: Path, folder: Path) -> Spent:
    """Run a command, and add up what it and all processes that it starts take."""
    log = folder / "stderr.txt"
    began_s = time.monotonic()
    with log.open("w") as stderr:
        started = psutil.Popen(
            case.command,
            cwd=folder,
            env=environment(root),
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    spent: dict[psutil.Process, tuple[str, float]] = {}
    is_over = False
    while not is_over:
        is_over = started.poll() is not None
        if case.to_first_step and FIRST_STEP.search(log.read_text()):
            is_over = True
        elif is_over and (started.returncode not in (0, 2) or case.to_first_step):
            raise RuntimeError(f"{' '.join(case.command)}: {log.read_text()[-2000:]}")
        seconds = time.monotonic() - began_s
        if seconds > TIMEOUT_S:
            raise RuntimeError(f"{' '.join(case.command)} takes over {TIMEOUT_S} s")
        for process in family(started):
            with suppress(psutil.Error):
                times = process.cpu_times()
                name = "the command" if process.pid == started.pid else name_of(process)
                spent[process] = (name, times.user + times.system)
        time.sleep(0 if is_over else SAMPLE_EVERY_S)
    for process in reversed(family(started)):
        with suppress(psutil.Error):
            process.kill()
    started.wait()
    by_process: Counter[str] = Counter()
    for name, cpu_seconds in spent.values():
        by_process[name] += cpu_seconds
    return Spent(seconds, sum(by_process.values()), by_process)


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def name_of(process: psutil.Process) -> str:
    """Return what a process of Ray's does, without numbers."""
    words = process.cmdline()
    named = next((w for w in words if w.startswith("ray::")), "")
    if named:
        return named.split("(")[0].split(".")[0]
    file = next((w for w in words if w.endswith(".py")), words[0] if words else "?")
    return Path(file).name


def imports(root: Path, modules: list[str]) -> Counter[str]:
    """Return the seconds that importing takes, by top-level package."""
    code = ";".join(f"import {module}" for module in modules)
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env=environment(root),
        capture_output=True,
        text=True,
        check=True,
    )
    found: Counter[str] = Counter()
    for line in ended.stderr.splitlines():
        parts = re.match(r"import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)", line)
        if parts:
            found[parts[2].split(".")[0]] += int(parts[1]) / 1e6
    return found


def prepared(root: Path, folder: Path) -> list[Case]:
    """Make in `folder` what the commands of a version need, and return these commands."""

    def run(*words: str) -> None:
        subprocess.run(
            mae(*words), cwd=folder, env=environment(root), check=True, capture_output=True
        )

    demo = f"{root}/configs/pretrain/demo.yaml"
    place = ["storage.root=runs", "tracking.uri=sqlite:///mlflow.db"]
    run("prepare", f"{root}/configs/prepare/demo.yaml", "output=data/shapes")
    run("pretrain", demo, *place, *SHORT)
    (folder / "chain.yaml").write_text(CHAIN.format(root=root))
    chain = ["chain.yaml", *(f"--set={word}" for word in place)]
    run("run", *chain)
    fresh = [*place, "name=first-step", "reporting.every_steps=1", "--fresh"]
    return [
        Case("`mae --help`", mae("--help")),
        Case("a config error", mae("pretrain", demo, "optim.epoch=1")),
        Case("`mae plan`, all reused", mae("plan", *chain)),
        Case("`mae run`, all reused", mae("run", *chain)),
        Case("`mae pretrain`, finished", mae("pretrain", demo, *place, *SHORT)),
        Case("`mae pretrain` to its first step", mae("pretrain", demo, *fresh), True),
    ]


def table(title: str, counts: Counter[str]) -> str:
    shown = [(name, x) for name, x in counts.most_common() if x >= MIN_SHOWN_S]
    rest = sum(counts.values()) - sum(x for _, x in shown)
    rows = [f"| {name} | {x:.1f} |" for name, x in [*shown, ("all others", rest)]]
    return f"| {title} | CPU-seconds |\n|---|---|\n" + "\n".join(rows)


def main() -> None:
    versions = [ROOT, *(Path(word).resolve() for word in sys.argv[1:])]
    floor = [
        Case(f"plain Ray to its first batch, {name}", [sys.executable, "-c", FLOOR, workers], True)
        for name, workers in (("in the driver", "0"), ("one worker", "1"))
    ]
    found: dict[tuple[str, str], list[Spent]] = {}
    with tempfile.TemporaryDirectory(prefix="mae-startup-") as temporary:
        cases: list[tuple[str, Path, Path, Case]] = []
        for number, root in enumerate(versions):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            name = "this version" if number == 0 else root.name
            cases += [(name, root, folder, case) for case in prepared(root, folder)]
        cases += [("plain Ray", ROOT, Path(temporary), case) for case in floor]
        for turn in range(TIMES):
            for name, root, folder, case in cases:
                print(f"turn {turn + 1}: {name}: {case.name}", file=sys.stderr)
                found.setdefault((case.name, name), []).append(measure(case, root, folder))
    print(f"{psutil.cpu_count()} CPUs, load {os.getloadavg()[1]:.1f}, median of {TIMES}\n")
    print("| | version | seconds | CPU-seconds |\n|---|---|---|---|")
    for (case_name, name), turns in sorted(found.items(), key=lambda item: item[0][0]):
        seconds, cpu = (
            statistics.median(values)
            for values in ([t.seconds for t in turns], [t.cpu_seconds for t in turns])
        )
        print(f"| {case_name} | {name} | {seconds:.1f} | {cpu:.1f} |")
    last = found["`mae pretrain` to its first step", "this version"][-1]
    print(f"\n{table('to the first step, by process', last.by_process)}\n")
    loaded = imports(ROOT, ["pipelines.pretrain", "pipelines.training.pretrain_run"])
    print(table("imports of the command, by package", loaded))
    if out := os.environ.get("OUT_JSON"):
        kept = {" / ".join(key): [t[:2] for t in turns] for key, turns in found.items()}
        Path(out).write_text(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
