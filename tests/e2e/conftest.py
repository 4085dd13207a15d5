"""A data set and a model that train in seconds, and what a run leaves behind."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from pipelines import prepare, pretrain
from pipelines.config.loading import load_config
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import StageResult
from pipelines.training import pretrain_run

ROOT = Path(__file__).parents[2]
# 96 samples in global batches of 16: 6 steps an epoch, 30 in all.
WORDS = [
    "name=tiny",
    "data.shuffle_window=32",
    "model.encoder=vit_micro",
    "model.img_size=16",
    "model.patch_size=4",
    "model.decoder={dim: 32, depth: 1, num_heads: 2}",
    "optim.base_lr=1e-3",
    "optim.global_batch_size=16",
    "optim.micro_batch_size=8",
    "optim.epochs=5",
    "optim.warmup_epochs=1",
    "checkpoint.every_steps=5",
    "reporting.every_steps=1",
    "reporting.picture_every_steps=15",
    "health.every_epochs=1",
]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 training images in shards of 20, 20, 20, 20 and 16, and 24 validation images."""
    folder = tmp_path_factory.mktemp("shapes")
    config = PrepareConfig(
        synthetic="shapes",
        output=str(folder),
        img_size=16,
        num_train=96,
        num_val=24,
        samples_per_shard=20,
        workers=1,
    )
    prepare.run(config, fresh=False)
    return folder


@dataclass(frozen=True)
class Place:
    """Where a test's runs live, and the commands and configs that run there."""

    folder: Path
    shapes: Path

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    @property
    def trace_folder(self) -> Path:
        return self.folder / "trace"

    def words(self, *more: str) -> list[str]:
        return [
            *WORDS,
            f"data.train={self.shapes}/train",
            f"storage.root={self.folder}/runs",
            f"tracking.uri={self.tracking_uri}",
            f"debug.sample_trace={self.trace_folder}",
            *more,
        ]

    def config(self, *more: str) -> PretrainConfig:
        return load_config(PretrainConfig, [], self.words(*more), {})

    def run(self, *more: str, fresh: bool = False) -> StageResult:
        return pretrain.run(self.config(*more), fresh=fresh)

    def start(self, *more: str) -> subprocess.Popen[str]:
        """Pretraining as a command, in a process of its own."""
        return self.start_stage("pretrain", self.words(*more))

    def start_stage(self, stage: str, words: list[str]) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MAE__"))}
        environment["RAY_worker_niceness"] = "0"
        with (self.folder / "stderr.txt").open("a") as stderr:
            return subprocess.Popen(
                [sys.executable, str(ROOT / f"pipelines/{stage}.py"), *words],
                cwd=self.folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def stderr(self) -> str:
        return (self.folder / "stderr.txt").read_text()

    def trace(self) -> list[dict[str, object]]:
        """What was trained on: a line for each sample."""
        files = sorted(self.trace_folder.glob("rank-*.jsonl"))
        lines = [line for file in files for line in file.read_text().splitlines()]
        # The last line of a killed worker may be cut.
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_step(self, step: int, attempt: int = 1, timeout_s: float = 300) -> None:
        """Until a worker has begun a step of an attempt."""
        deadline_s = time.monotonic() + timeout_s
        while not any(x["step"] >= step and x["attempt"] == attempt for x in self.trace()):
            assert time.monotonic() < deadline_s, f"no step {step} within {timeout_s} s"
            time.sleep(0.01)

    def losses(self, run_id: str | None, metric: str = "train/loss") -> dict[int, float]:
        """Loss of each step as MLflow has it; each step is there once."""
        assert run_id is not None
        history = MlflowClient(self.tracking_uri).get_metric_history(run_id, metric)
        steps = [point.step for point in history]
        assert len(set(steps)) == len(steps), "a step has two values"
        return {point.step: point.value for point in history}


GOLDEN_FILE = Path(__file__).parent / "golden_curves.json"


def assert_golden(name: str, curve: dict[int, float]) -> None:
    """Compare a curve's first 20 steps with those that are committed, to six digits.

    Where a change means to move numbers, MAE_WRITE_GOLDEN=1 writes the new curves: commit them
    with the reason.
    """
    golden = json.loads(GOLDEN_FILE.read_text()) if GOLDEN_FILE.exists() else {}
    first_20 = [value for _, value in sorted(curve.items())[:20]]
    if os.environ.get("MAE_WRITE_GOLDEN") == "1":
        golden[name] = first_20
        GOLDEN_FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    assert first_20 == pytest.approx(golden[name], rel=1e-6)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path: Path, shapes: Path) -> Place:
    return Place(tmp_path, shapes)


@pytest.fixture
def no_model_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the ten seconds in which MLflow and torch.export write the encoder."""
    monkeypatch.setattr(pretrain_run, "log_encoder", lambda *_: None)


@dataclass(frozen=True)
class Undisturbed:
    place: Place
    result: StageResult
    losses: dict[int, float]
    ranks: dict[int, float]  # of the features: the curve of the model's health
    weights_sha256: str


@pytest.fixture(scope="session")
def undisturbed(
    session_ray: Path, tmp_path_factory: pytest.TempPathFactory, shapes: Path
) -> Undisturbed:
    """A run of one worker that nothing happened to."""
    place = Place(tmp_path_factory.mktemp("undisturbed"), shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_run, "log_encoder", lambda *_: None)
        result = place.run()
    return Undisturbed(
        place,
        result,
        place.losses(result.run_id),
        place.losses(result.run_id, "health/rank"),
        sha256(Path(result.output) / "model.safetensors"),
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that were started; whatever still runs at the test's end is killed."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


@pytest.fixture
def started(
    place: Place, processes: list[subprocess.Popen[str]]
) -> Callable[..., subprocess.Popen[str]]:
    """Starts pretraining as a command."""

    def start(*more: str) -> subprocess.Popen[str]:
        processes.append(place.start(*more))
        return processes[-1]

    return start


@pytest.fixture
def started_downstream(
    place: Place, processes: list[subprocess.Popen[str]]
) -> Callable[..., subprocess.Popen[str]]:
    """Starts another stage as a command."""

    def start(stage: str, *words: str) -> subprocess.Popen[str]:
        processes.append(place.start_stage(stage, list(words)))
        return processes[-1]

    return start
