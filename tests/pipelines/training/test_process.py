"""The step loop that every stage trains by, with a tiny model and without Ray."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mae_core import checkpoint_manifest
from mae_core.checkpoint_manifest import CheckpointRecord
from mae_core.config import LossConfig, MaskingConfig, ModelConfig
from mae_core.data.samples import DataError
from mae_core.train_step import BatchLoss, StepMetrics
from mae_core.training_error import NonFiniteLossError
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.batches import BadSample
from pipelines.training import process
from pipelines.training.checkpoints import StartAgainError, find_checkpoint, list_steps
from pipelines.training.process import Process, StepOptions, Trained, TrainingProcess
from pipelines.training.reporting import After, RunSize
from pipelines.training.run_folder import RunFolder
from pipelines.training.stopping import Phase, Told

WORDS = [
    "data.train=t",
    "data.shuffle_window=8",
    "optim.global_batch_size=4",
    "optim.micro_batch_size=2",
    "checkpoint.every_steps=3",
    "reporting.every_steps=1",
]


class Rows(NamedTuple):
    rows: pa.Table
    bad: list[BadSample]
    came: list[bool]


class Part(NamedTuple):
    label: str
    seed: int
    steps: int
    first_step: int

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps


class Channel:
    """Notes what the workers tell."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    def tell(self, told: Told) -> None:
        self.phases.append(told.phase)

    def is_asked(self) -> bool:
        return False


class FakeTask:
    """Fits one number a part to the positions of the samples."""

    options = StepOptions()

    def __init__(self, parts: tuple[Part, ...], bad: frozenset[int]) -> None:
        self.parts = parts
        self.bad = bad
        self.measured: list[tuple[str, float]] = []
        self.rates: list[float] = []
        self.saved_at_once: tuple[int, ...] = ()
        self.draws: list[float] = []

    def size(self, part: Part) -> RunSize:
        return RunSize(part.steps, 4, 8, 1)

    def after(self, part: Part) -> After:
        return After()

    def is_measured(self, part: Part) -> bool:
        return False

    def build(self, part: Part, *, is_resumed: bool) -> Trained:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return Trained(model, torch.optim.AdamW(model.parameters(), lr=0.0))

    def learning_rate(self, part: Part, step: int) -> float:
        self.rates.append(step / 10)
        return step / 10

    def decoded(self, tables: Iterable[pa.Table]) -> Iterator[Rows]:
        for table in tables:
            positions = table["position"].to_pylist()
            came = [place not in self.bad for place in positions]
            bad = [
                BadSample(0, "a.tar", str(p), "empty", "why") for p in positions if p in self.bad
            ]
            yield Rows(table, bad, came)

    def batch(self, decoded: Rows, part: Part, *, step: int, number: int) -> Tensor:
        positions: list[int] = decoded.rows["position"].to_pylist()
        noise = torch.rand(1)  # the same after every start: each step has a seed
        self.draws.append(noise.item())
        return torch.tensor(positions)[:, None] / 100 + noise

    def loss(self, model: nn.Module, batch: Tensor, part: Part) -> BatchLoss:
        return BatchLoss(((model(batch) - 1) ** 2).mean(), torch.tensor(float(len(batch))))

    def show(self, model: nn.Module, part: Part, step: int, writer: object) -> None:
        pass

    def watch(self, model: nn.Module, part: Part, step: int, writer: object) -> bool:
        return step in self.saved_at_once

    def best_step(self, step: int) -> int | None:
        return max((s for s in self.saved_at_once if s <= step), default=None)

    def record(self, part: Part, step: int) -> CheckpointRecord:
        return CheckpointRecord(
            step=step,
            samples_seen=step * 4,
            epoch=0.0,
            total_steps=self.parts[-1].last_step,
            seed=0,
            data_digest="d",
            channel_mean=(0.5,) * 3,
            channel_std=(0.5,) * 3,
            model=ModelConfig(),
            masking=MaskingConfig(),
            loss=LossConfig(),
        )

    def measure(self, part: Part, model: nn.Module) -> None:
        (weight,) = model.parameters()
        self.measured.append((part.label, weight.item()))


class Job:
    """A job of two parts, 7 and 5 steps long, of 2 x 2 samples."""

    run_id = None

    def __init__(
        self, folder: Path, words: tuple[str, ...] = (), bad: frozenset[int] = frozenset()
    ) -> None:
        self.config = load_config(PretrainConfig, [], [*WORDS, *words], {})
        self.run_uri = str(folder)
        self.folder = RunFolder(str(folder))
        self.channel: Any = Channel()
        self.task = FakeTask((Part("a", 1, 7, 0), Part("b", 2, 5, 7)), bad)

    def build_task(self, process: Process) -> FakeTask:
        return self.task


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(
        get_world_rank=lambda: 0,
        get_world_size=lambda: 1,
        get_node_rank=lambda: 0,
        get_local_rank=lambda: 0,
    )
    monkeypatch.setattr(process.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(process.ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(process.ray.train, "report", lambda metrics: None)

    def stream(self: Any) -> Iterator[Rows]:
        places = range(self.first_step * 4, 12 * 4, 2)
        tables = [pa.table({"position": [x, x + 1]}) for x in places]
        found: Iterator[Rows] = self.task.decoded(tables)
        return found

    monkeypatch.setattr(TrainingProcess, "_stream", stream)


def train(job: Job, workspace: Path, stop_after: int | None = None) -> None:
    """Train; with `stop_after`, until the run is asked to stop in that step."""
    workspace.mkdir()
    worker: TrainingProcess[Any, Any, Any] = TrainingProcess(job, workspace)
    if stop_after is not None:
        original = worker._step

        def step(*arguments: Any) -> None:
            original(*arguments)
            worker.ends.is_asked = arguments[3] == stop_after

        worker._step = step  # type: ignore[method-assign]
    worker.run()


def test_each_part_is_trained_and_measured_with_steps_of_its_own(tmp_path: Path) -> None:
    job = Job(tmp_path / "run")
    train(job, tmp_path / "local")
    assert [label for label, _ in job.task.measured] == ["a", "b"]
    assert job.task.rates == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.1, 0.2, 0.3, 0.4, 0.5]
    )
    # Every three steps of a part and at its end; the two newest are kept.
    assert list_steps(job.run_uri) == [10, 12]
    phases = list(dict.fromkeys(job.channel.phases))
    assert phases == [Phase.TRAINING, Phase.MEASURING]


@pytest.mark.parametrize("keeps", [True, False])
def test_activations_are_kept_unless_the_task_says_otherwise(tmp_path: Path, keeps: bool) -> None:
    class BlockTask(FakeTask):
        options = StepOptions(keeps_activations=keeps)
        are_kept: ClassVar[set[bool]] = set()

        def build(self, part: Part, *, is_resumed: bool) -> Trained:
            model = nn.Sequential(nn.Linear(1, 4), Block(4, 1))
            return Trained(model, torch.optim.AdamW(model.parameters(), lr=0.0))

        def loss(self, model: nn.Module, batch: Tensor, part: Part) -> BatchLoss:
            self.are_kept.add("forward" not in vars(model[1]))
            return BatchLoss(model(batch[:, None]).square().mean(), torch.tensor(1.0))

        def measure(self, part: Part, model: nn.Module) -> None:
            assert "forward" not in vars(model[1])

    job = Job(tmp_path / "run")
    job.task = BlockTask(job.task.parts, frozenset())
    train(job, tmp_path / "local")
    assert job.task.are_kept == {keeps}


def test_a_step_that_is_the_best_is_saved_and_kept(tmp_path: Path) -> None:
    job = Job(tmp_path / "run")
    job.task.saved_at_once = (2,)
    train(job, tmp_path / "local")
    assert list_steps(job.run_uri) == [2, 10, 12]


def test_parts_of_the_same_seed_draw_the_same_numbers_at_the_same_steps(tmp_path: Path) -> None:
    job = Job(tmp_path / "run")
    job.task.parts = (Part("a", 1, 4, 0), Part("b", 1, 4, 4), Part("c", 2, 4, 8))
    train(job, tmp_path / "local")
    first, second, third = (job.task.draws[i : i + 8] for i in (0, 8, 16))
    assert first == second
    assert not set(first) & set(third)


@pytest.mark.parametrize("stop_after", [2, 7, 9])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path: Path, stop_after: int) -> None:
    whole = Job(tmp_path / "whole")
    train(whole, tmp_path / "local")

    first = Job(tmp_path / "run")
    train(first, tmp_path / "first", stop_after)
    assert list_steps(first.run_uri)[-1] == stop_after
    assert first.channel.phases[-1] is Phase.STOPPED
    second = Job(tmp_path / "run")
    if stop_after == 9:  # the first part is trained; its model is kept where an arm's is
        uri = Path(second.folder.model_uri("a"))
        keep(whole, uri)
    train(second, tmp_path / "second")
    assert second.task.measured == whole.task.measured


class Writer:
    """Keeps what is reported, in the place of MLflow."""

    losses: dict[int, float]
    is_failing = False

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def write(self, metrics: dict[str, float], step: int) -> None:
        self.losses[step] = next(x for name, x in metrics.items() if name.endswith("train/loss"))

    def flush(self, timeout_s: float) -> None:
        pass

    def close(self) -> None:
        pass


def test_the_loss_that_is_reported_after_a_stop_is_that_of_a_run_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.tracking, "MetricWriter", Writer)
    words = ("reporting.every_steps=5",)
    monkeypatch.setattr(Writer, "losses", whole := {}, raising=False)
    train(Job(tmp_path / "whole", words), tmp_path / "local")

    monkeypatch.setattr(Writer, "losses", stopped := {})
    train(Job(tmp_path / "run", words), tmp_path / "first", stop_after=2)
    assert stopped == {}
    train(Job(tmp_path / "run", words), tmp_path / "second", stop_after=6)
    train(Job(tmp_path / "run", words), tmp_path / "third")
    assert stopped == whole
    assert sorted(whole) == [5, 7]  # the second part's one report, at its step 5, comes last


def keep(job: Job, uri: Path) -> None:
    """Keep a model with the weight that the job's first part was measured with."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, job.task.measured[0][1])
    process.save_checkpoint(uri, job.task.record(job.task.parts[0], 7), model=model, optimizer=None)


def test_a_part_that_is_measured_is_neither_built_nor_trained(tmp_path: Path) -> None:
    job = Job(tmp_path / "run")
    train(job, tmp_path / "local")
    again = Job(tmp_path / "run")
    again.task.is_measured = lambda part: part.label == "a"  # type: ignore[method-assign]
    train(again, tmp_path / "again")
    assert again.task.measured == job.task.measured[1:]
    assert again.task.rates == []


def test_samples_that_are_not_the_next_ones_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [pa.table({"position": [x, x + 1]}) for x in (2, 4)]
    monkeypatch.setattr(TrainingProcess, "_stream", lambda self: self.task.decoded(tables))
    with pytest.raises(RuntimeError, match=r"got samples 2 \+ 2 .* where 0 \+ 2 were due"):
        train(Job(tmp_path / "run"), tmp_path / "local")


@pytest.mark.parametrize("reports", [1, 100])
def test_a_step_that_a_gpu_left_out_ends_the_run_before_it_is_saved(
    tmp_path: Path, reports: int
) -> None:
    """The loss of a GPU is read at reports and before checkpoints, here of steps 3 and 6."""
    job = Job(tmp_path / "run", (f"reporting.every_steps={reports}",))
    build, batch = job.task.build, job.task.batch

    def fused(part: Part, *, is_resumed: bool) -> Trained:
        model = build(part, is_resumed=is_resumed).model
        return Trained(model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True))

    def poisoned(decoded: Rows, part: Part, *, step: int, number: int) -> Tensor:
        found = batch(decoded, part, step=step, number=number)
        return found * torch.nan if step == 4 else found

    job.task.build, job.task.batch = fused, poisoned  # type: ignore[method-assign]
    (tmp_path / "local").mkdir()
    worker: TrainingProcess[Any, Any, Any] = TrainingProcess(job, tmp_path / "local")
    worker.device = torch.device("cuda")  # the model stays on the CPU
    with pytest.raises(NonFiniteLossError, match="loss=nan"):
        worker.run()
    newest = find_checkpoint(job.run_uri)
    assert newest is not None
    assert newest.step == 3


def test_too_many_bad_samples_end_the_run_naming_the_first(tmp_path: Path) -> None:
    few = Job(tmp_path / "few", ("data.max_bad_ratio=0.002",), frozenset({1, 5}))
    train(few, tmp_path / "local")  # 2 of the first thousand are no more than 0.2 %
    many = Job(tmp_path / "many", ("data.max_bad_ratio=0.002",), frozenset({1, 5, 6}))
    with pytest.raises(
        DataError, match=r"3 of 1000 samples can't be used.* the first is 1 in a\.tar"
    ):
        train(many, tmp_path / "other")


def test_bad_samples_are_judged_against_what_was_read_since_the_start(tmp_path: Path) -> None:
    """Bad samples are counted since the start, so the samples of earlier starts do not count."""
    words = ("data.max_bad_ratio=0.002",)
    job = Job(tmp_path / "run", words)
    train(job, tmp_path / "local", stop_after=3)
    seen: list[int] = []

    def judge(num_bad: int, num_seen: int, ratio: float) -> bool:
        seen.append(num_seen)
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "too_many_bad", judge)
        train(Job(tmp_path / "run", words), tmp_path / "again")
    # Four samples a step; step 3 is done, and the second part begins at its own first step.
    assert seen[:4] == [4, 8, 12, 16]


def test_a_step_takes_each_workers_share_of_the_batch_and_the_tasks_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def step(*_: object, **options: Any) -> StepMetrics:
        asked.update(options)
        return StepMetrics(torch.tensor(0.0), torch.tensor(2.0), torch.tensor(1.0))

    monkeypatch.setattr(process, "optimizer_step", step)
    job = Job(tmp_path / "run", ("optim.global_batch_size=8",))
    job.task.options = StepOptions(max_grad_norm=0.5)
    worker: TrainingProcess[Any, Any, Any] = TrainingProcess(job, tmp_path)
    worker.world_size = 2
    reporter: Any = SimpleNamespace(
        add=lambda *_: None, check=lambda: None, is_due=lambda _: False, first_step=0
    )
    nothing: Any = None
    worker._step(job.task.parts[0], nothing, nothing, 1, iter(()), reporter)
    assert (asked["grad_accum_steps"], asked["max_grad_norm"]) == (2, 0.5)


def test_a_checkpoint_whose_contents_changed_is_set_aside_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Job(tmp_path / "run")
    train(whole, tmp_path / "local", stop_after=7)
    weights = tmp_path / "run/checkpoints/step-00000007/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StartAgainError, match="step-00000007 is damaged"):
        train(Job(tmp_path / "run"), tmp_path / "first")
    again = Job(tmp_path / "run")
    train(again, tmp_path / "second")
    assert again.task.rates[0] == pytest.approx(0.7)  # from step 6 on
    assert not (tmp_path / "run/failed.json").exists()


def test_a_resumed_worker_hashes_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(Job(tmp_path / "run"), tmp_path / "local", stop_after=2)
    hashed: list[str] = []
    original = checkpoint_manifest.digest_of

    def digest_of(path: Path) -> Any:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(checkpoint_manifest, "digest_of", digest_of)
    train(Job(tmp_path / "run"), tmp_path / "again")
    assert sorted(hashed) == ["model.safetensors", "training_state.safetensors"]


def test_one_worker_of_a_node_fetches_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the second worker of the second node, where the third worker of all is the first."""

    def gather(results: list[Any], mine: Any) -> None:
        assert mine == (1, [])
        results[:] = [(0, ["there"]), (0, []), (1, ["here"]), mine]

    monkeypatch.setattr(process.torch.distributed, "all_gather_object", gather)
    worker: TrainingProcess[Any, Any, Any] = TrainingProcess(Job(tmp_path / "run"), tmp_path)
    worker.world_size, worker.node, worker.local_rank = 4, 1, 1

    def fetch() -> str:
        raise AssertionError("this worker fetches")

    assert worker._once_a_node(fetch) == "here"
