"""Measure what a run loses when it is stopped or killed at a random step: `make chaos`, or

    python benchmarks/stopping.py [TIMES [STAGE ...]]     # pretrain, classify, segment, embed

Trains tiny models on a drawn data set and stops each run once. Lost are the steps that were
trained, according to the trace of samples, but are in no checkpoint. `embed` keeps finished files
and, if it is stopped within a file, the images done so far; how many of these a kill loses cannot
be seen from outside. Processes that live 15 s after the stop are counted as left. `ray job stop`
needs the services of `make up` and their `env` in the environment, and is skipped otherwise.
Prints a Markdown table, and each stop on stderr.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pyarrow as pa

from infra.processes import is_alive
from pipelines.embed import NEXT_ROW
from pipelines.training.checkpoints import newest_step

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("pretrain", "classify", "segment", "embed")
WAYS = ("Ctrl-C", "SIGTERM", "ray job stop", "kill -9")
FIRST_STEP, LAST_STEP = 2, 60
TIMEOUT_S = 600
ROWS_PER_FILE = 500
LEAVE_S = 15.0
TRAINING = [
    "data.shuffle_window=32",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=8",
    "optim.epochs=400",
    "optim.warmup_epochs=1",
    "checkpoint.every_steps=25",
    "reporting.every_steps=10",
]
MODEL = [
    "model.encoder=vit_micro",
    "model.img_size=16",
    "model.patch_size=4",
    "optim.base_lr=1e-3",
    "reporting.picture_every_steps=5000",
]
SHAPES = "[background,disc,ring,crescent,heart,triangle,square,star,cross,arrow,bowtie]"
ARMS = {
    "classify": ["classify.arms=[finetune]"],
    "segment": ["segment.arms=[finetune]", f"segment.names={SHAPES}", "segment.channels=16"],
}


class Stopped(NamedTuple):
    reached: int  # the step (of embed, the images) that the run had come to
    saved: int
    seconds: float
    said: str
    left: int  # processes of the run that live on


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = 0
        self._mae("prepare", "synthetic=shapes", f"output={folder}/shapes", "img_size=16")
        ended = self._mae("pretrain", *self.words("pretrain"), "optim.max_steps=2")
        self.encoder = json.loads(ended.stdout.splitlines()[-1])["output"]

    def _mae(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command(*words), cwd=ROOT, text=True, capture_output=True, check=True)

    def words(self, stage: str) -> list[str]:
        self.number += 1
        place = [
            f"storage.root={self.folder}/runs-{self.number}",
            f"tracking.uri=sqlite:///{self.folder}/mlflow.db",
        ]
        shapes = f"{self.folder}/shapes"
        if stage == "embed":
            words = [f"data={shapes}/train", f"rows_per_file={ROWS_PER_FILE}", "batch_size=1"]
            return [*place, *words, f"init_from={self.encoder}"]
        trace = f"debug.sample_trace={self.folder}/trace-{self.number}"
        data = f"data.train={shapes}/train"
        if stage == "pretrain":
            return [*place, *TRAINING, *MODEL, "model.decoder={dim: 32, depth: 1}", data, trace]
        own = [*ARMS[stage], f"data.val={shapes}/val", f"init_from={self.encoder}"]
        return [*place, *TRAINING, *own, data, trace]

    def reached(self, stage: str) -> int:
        if stage == "embed":
            return self.saved(stage)
        files = Path(f"{self.folder}/trace-{self.number}").glob("rank-*.jsonl")
        steps = [re.findall(r'"step": (\d+)', file.read_text()) for file in files]
        return max((int(step) for found in steps for step in found[-1:]), default=0)

    def saved(self, stage: str) -> int:
        runs = list(Path(f"{self.folder}/runs-{self.number}/{stage}").glob("*"))
        if not runs:
            return 0
        if stage != "embed":
            return newest_step(str(runs[0])) or 0
        whole = ROWS_PER_FILE * len(list((runs[0] / "features").glob("*.parquet")))
        return whole + sum(rows_in_part(file) for file in (runs[0] / "parts").glob("*.arrow"))

    def stop(self, stage: str, way: str) -> Stopped:
        """Start a run, stop it at a random step, and check what is left."""
        words = self.words(stage)
        log = self.folder / f"log-{self.number}.txt"
        start, end = in_a_job(log) if way == "ray job stop" else on_this_machine(log, way)
        process = start(command(stage, *words))
        aim = ROWS_PER_FILE if stage == "embed" else random.randint(FIRST_STEP, LAST_STEP)
        deadline_s = time.monotonic() + TIMEOUT_S
        while self.reached(stage) < aim:
            if time.monotonic() > deadline_s or process.poll() not in (None, 0):
                process.kill()
                raise RuntimeError(f"{stage} did not come to {aim}: {log.read_text()[-2000:]}")
            time.sleep(0.02)
        time.sleep(random.random() / 4)
        family = family_of(f"{self.folder}/runs-{self.number}")
        since_s = time.monotonic()
        end(process)
        seconds = time.monotonic() - since_s
        said = re.findall(r"^stopped .*", log.read_text(), re.MULTILINE)
        # A step whose images were read has begun, but only finished steps count.
        reached = max(self.reached(stage) - 1, 0) if way == "kill -9" else self.reached(stage)
        saved = self.saved(stage)
        if stage == "embed":  # it finishes its batch
            reached = saved
        stopped = Stopped(reached, saved, seconds, said[-1] if said else "", num_left(family))
        print(stage, way, stopped, file=sys.stderr, flush=True)
        return stopped


def is_true(stopped: Stopped) -> bool:
    """Return whether the run's last line says what is saved."""
    if "starts over" in stopped.said:
        return stopped.saved == 0
    return re.search(rf"\b{stopped.saved}\b", stopped.said) is not None


def family_of(root: str) -> list[psutil.Process]:
    """Return the processes that have a run's folder among their words, and what they started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if any(root in word for word in process.cmdline()):
                found += [process, *process.children(recursive=True)]
    return list(set(found) - {psutil.Process()})


def num_left(family: list[psutil.Process]) -> int:
    deadline_s = time.monotonic() + LEAVE_S
    while any(map(is_alive, family)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    return sum(map(is_alive, family))


def rows_in_part(file: Path) -> int:
    start = int(file.stem.rpartition("-")[2])
    with pa.ipc.open_file(str(file)) as part:
        return int(part.schema.metadata[NEXT_ROW]) - start


Start = Callable[[list[str]], "subprocess.Popen[bytes]"]
End = Callable[["subprocess.Popen[bytes]"], None]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *words]


def on_this_machine(log: Path, way: str) -> tuple[Start, End]:
    number = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}[way]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}

    def start(words: list[str]) -> "subprocess.Popen[bytes]":
        with log.open("wb") as stream:
            return subprocess.Popen(
                words, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment
            )

    def end(process: "subprocess.Popen[bytes]") -> None:
        process.send_signal(number)
        process.wait(TIMEOUT_S)
        if way == "kill -9":
            time.sleep(5)  # its workers continue to train for a moment

    return start, end


def in_a_job(log: Path) -> tuple[Start, End]:
    job = f"chaos-{time.time_ns()}"
    ray = str(Path(sys.executable).with_name("ray"))

    def start(words: list[str]) -> "subprocess.Popen[bytes]":
        text = " ".join(f"'{word}'" for word in words)
        with log.open("wb") as stream:
            script = ["sh", "-c", f"cd {ROOT} && exec {text}"]
            return subprocess.Popen(
                [ray, "job", "submit", "--submission-id", job, "--", *script],
                stdout=stream,
                stderr=subprocess.STDOUT,
            )

    def end(process: "subprocess.Popen[bytes]") -> None:
        subprocess.run([ray, "job", "stop", job], check=True, capture_output=True)
        process.wait(TIMEOUT_S)

    return start, end


def rows(bench: Bench, times: int, stages: list[str]) -> Iterator[str]:
    yield (
        "| stage | stopped by | times | lost, each time | said a wrong step | processes left "
        "| longest stop |"
    )
    yield "|---|---|---|---|---|---|---|"
    ways = [
        way for way in WAYS if way != "ray job stop" or os.environ.get("RAY_API_SERVER_ADDRESS")
    ]
    for stage in stages:
        for way in ways:
            found = [bench.stop(stage, way) for _ in range(times)]
            lost = ", ".join(str(max(x.reached - x.saved, 0)) for x in found)
            if stage == "embed" and way == "kill -9":
                lost = f"of one file, at most {ROWS_PER_FILE} images"
            wrong = sum(not is_true(x) for x in found if x.said)
            longest = max(x.seconds for x in found)
            left = sum(x.left for x in found)
            yield f"| {stage} | {way} | {times} | {lost} | {wrong} | {left} | {longest:.1f} s |"


def main(words: list[str]) -> None:
    times = int(words[0]) if words else 3
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Bench(Path(folder)), times, words[1:] or list(STAGES)):
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
