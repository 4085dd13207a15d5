"""Train in one process: the code that pretraining and the downstream stages share.

The step loop of every stage is `TrainingProcess._train`. A stage adds a `TrainingTask`, which says
what is built, what a batch is, what the loss is and what is measured.

A run trains one or several parts, one after another, as one sequence of samples and steps.
Pretraining is one part; a downstream run has a part for each arm.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import ray.train
import torch
import torch.distributed
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from infra import tracking
from infra.scratch import scratch_folder
from mae_core.activation_checkpointing import checkpointed_activations
from mae_core.checkpoint import load_training_state, load_weights, save_checkpoint
from mae_core.checkpoint_manifest import CheckpointRecord, UnreportedLoss
from mae_core.data.randomness import named_generator
from mae_core.train_step import BatchLoss, optimizer_step
from pipelines.config.downstream import DownstreamConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.batches import BadSample, autocast_dtype, check_place, too_many_bad
from pipelines.reading.sample_trace import SampleTrace
from pipelines.reading.sequence import micro_batches
from pipelines.training import local_mode
from pipelines.training.checkpoints import (
    FoundCheckpoint,
    commit_checkpoint,
    fetch_checkpoint,
    fetch_found,
    find_checkpoint,
)
from pipelines.training.reporting import (
    After,
    RunSize,
    StepReporter,
    bad_samples_error,
)
from pipelines.training.run_folder import RunFolder
from pipelines.training.stopping import AfterStep, Channel, Phase, StepEnds

logger = logging.getLogger(__name__)

LOSS_METRIC = "train/loss"


class Part(Protocol):
    """A model that is trained from a first step to a last one."""

    @property
    def label(self) -> str:
        """Name in logs, metrics and files."""

    @property
    def seed(self) -> int: ...

    @property
    def steps(self) -> int:
        """Number of optimizer steps; 0 if nothing is trained."""

    @property
    def first_step(self) -> int:
        """Number of steps of all parts before this one."""

    @property
    def last_step(self) -> int: ...


class DecodedRows(Protocol):
    """A micro batch that a task has decoded, still on the CPU."""

    @property
    def rows(self) -> pa.Table:
        """The samples' places in the run's sequence, without their images."""

    @property
    def bad(self) -> list[BadSample]: ...

    @property
    def came(self) -> list[bool]:
        """Whether each sample of `rows` can be used; False makes it a hole."""


class Process(NamedTuple):
    """What a task knows about the process that it runs in."""

    rank: int
    world_size: int
    device: torch.device
    tell_measured: Callable[[str, int, int], None]  # what is measured, pieces done, all pieces
    fetch: Callable[[str], Path]  # copies a checkpoint once for all workers of a node


class Trained(NamedTuple):
    model: nn.Module  # not wrapped, on the device
    optimizer: torch.optim.Optimizer


class StepOptions(NamedTuple):
    """How a step is computed."""

    max_grad_norm: float | None = None
    compiles: bool = False  # only on a GPU
    keeps_activations: bool = True  # for the backward pass; otherwise they are computed again


PartT = TypeVar("PartT", bound=Part)
DecodedT = TypeVar("DecodedT", bound=DecodedRows)
BatchT = TypeVar("BatchT")
T = TypeVar("T")


class TrainingTask(Protocol[PartT, DecodedT, BatchT]):
    """What a stage adds to a training process. Every worker calls every method."""

    @property
    def parts(self) -> Sequence[PartT]: ...

    @property
    def options(self) -> StepOptions: ...

    def size(self, part: PartT) -> RunSize: ...

    def after(self, part: PartT) -> After:
        """Estimate the work after the part's last step, for the remaining time that is shown."""

    def is_measured(self, part: PartT) -> bool:
        """Return whether the part's measurements exist already."""

    def build(self, part: PartT, *, is_resumed: bool) -> Trained:
        """Build the model and its optimizer, the same on every worker and after every start.

        If `is_resumed`, the weights are replaced by those of a checkpoint afterwards.
        """

    def learning_rate(self, part: PartT, step: int) -> float:
        """Return the learning rate of a step; steps count from 1 at the part's own start."""

    def decoded(self, tables: Iterable[pa.Table]) -> Iterator[DecodedT]:
        """Decode this worker's micro batches, ahead of the step that needs them."""

    def batch(self, decoded: DecodedT, part: PartT, *, step: int, number: int) -> BatchT:
        """Move a micro batch to the device; it is this worker's `number`th of the step, from 0.

        Steps count from 1 at the part's own start.
        """

    def loss(self, model: nn.Module, batch: BatchT, part: PartT) -> BatchLoss: ...

    def show(self, model: nn.Module, part: PartT, step: int, writer: tracking.MetricWriter) -> None:
        """Draw what the model does after a step, if that is due; only rank 0 calls this."""

    def watch(
        self, model: nn.Module, part: PartT, step: int, writer: tracking.MetricWriter | None
    ) -> bool:
        """Measure the model after a step, if due; return whether to save a checkpoint at once."""

    def best_step(self, step: int) -> int | None:
        """Return the best step up to this one, if its checkpoint must be kept."""

    def record(self, part: PartT, step: int) -> CheckpointRecord:
        """Describe the run for a checkpoint; `step` counts through all parts."""

    def measure(self, part: PartT, model: nn.Module) -> None:
        """Measure the trained model and store the result in the run's folder."""


class TrainingJob(Protocol[PartT, DecodedT, BatchT]):
    """Everything that the driver tells a worker."""

    @property
    def config(self) -> PretrainConfig | DownstreamConfig: ...

    @property
    def run_uri(self) -> str: ...

    @property
    def run_id(self) -> str | None:
        """Id of the run in MLflow."""

    @property
    def folder(self) -> RunFolder: ...

    @property
    def channel(self) -> Channel: ...

    def build_task(self, process: Process) -> TrainingTask[PartT, DecodedT, BatchT]:
        """Build the stage's task."""


def training_worker(arguments: dict[str, TrainingJob[PartT, DecodedT, BatchT]]) -> None:
    """Train in this process. Ray Train calls this in each worker, also after a worker was lost."""
    job = arguments["job"]
    try:
        with scratch_folder() as workspace:
            TrainingProcess(job, workspace).run()
    except Exception as error:
        job.folder.record_failure(error)
        raise


class TrainingProcess(Generic[PartT, DecodedT, BatchT]):
    def __init__(self, job: TrainingJob[PartT, DecodedT, BatchT], workspace: Path) -> None:
        self.job = job
        self.workspace = workspace
        self.config = config = job.config
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.node, self.local_rank = context.get_node_rank(), context.get_local_rank()
        self.device = local_mode.training_device(config.scaling)
        if self.device.type == "cpu":
            torch.set_num_threads(config.scaling.cpus_per_worker)
        self.autocast_dtype = autocast_dtype(config.optim.precision, self.device)
        self.ends = StepEnds(
            job.channel,
            every_minutes=config.checkpoint.every_minutes,
            rank=self.rank,
            world_size=self.world_size,
        )
        process = Process(self.rank, self.world_size, self.device, self.ends.measured, self._fetch)
        self.task = job.build_task(process)
        self.first_step = 0  # number of steps that earlier starts completed
        self.unreported = UnreportedLoss()  # loss since the last report before that checkpoint
        self.num_passes = 0  # number of this worker's micro batches since it started

    def run(self) -> None:
        """Train and measure each part, starting from the newest complete checkpoint."""
        with ExitStack() as stack:
            stack.callback(self.ends.close)
            found = self._once_a_node(self._found)
            self.first_step = done = found.manifest.step if found else 0
            self.unreported = found.manifest.unreported if found else UnreportedLoss()
            trace = stack.enter_context(SampleTrace(self.config.debug.sample_trace, self.rank))
            stream = self._stream()
            if isinstance(stream, Generator):  # so that no thread of the driver goes on reading
                stack.callback(stream.close)
            # Checked once, before any worker waits for another, so that all agree. The data
            # continues from the checkpoint, so a part after it is trained again.
            finished = [
                part
                for part in self.task.parts
                if self.task.is_measured(part) and (not part.steps or done >= part.last_step)
            ]
            for part in (part for part in self.task.parts if part not in finished):
                trained = self._build(part, found, done)
                if not self._train(part, trained, stream, trace, max(done, part.first_step)):
                    return
                self.ends.tell(Phase.MEASURING)
                self.task.measure(part, trained.model)
                if self.world_size > 1:  # the result exists before any worker looks for it
                    torch.distributed.barrier()

    def _build(self, part: PartT, found: FoundCheckpoint | None, done: int) -> Trained:
        """Build the part's model and load what is trained of it already."""
        is_begun = part.steps > 0 and done > part.first_step
        trained = self.task.build(part, is_resumed=is_begun)
        if not is_begun:
            return trained
        if found is not None and done <= part.last_step:
            load_weights(found.folder, trained.model, is_verified=True)
            load_training_state(found.folder, trained.model, trained.optimizer, is_verified=True)
        else:  # trained, but not measured yet
            kept = self._fetch(self.job.folder.model_uri(part.label))
            load_weights(kept, trained.model, is_verified=True)
        return trained

    def _found(self) -> FoundCheckpoint | None:
        """Copy the newest complete checkpoint of this run; None if there is none."""
        newest = find_checkpoint(self.job.run_uri)
        if newest is None:
            return None
        return fetch_found(self.job.run_uri, newest.step, self.workspace / "own")

    def _fetch(self, uri: str) -> Path:
        """Copy a checkpoint once for all workers of a node, and return its verified folder."""
        local = Path(tempfile.mkdtemp(dir=self.workspace)) / "checkpoint"
        return self._once_a_node(lambda: fetch_checkpoint(uri, local).folder)

    def _once_a_node(self, fetch: Callable[[], T]) -> T:
        """Call `fetch` in one worker of each node, and return the result in all of them."""
        results = [(self.node, [fetch()] if self.local_rank == 0 else [])]
        if self.world_size > 1:
            results *= self.world_size
            torch.distributed.all_gather_object(results, results[0])
        return next(found for node, fetched in results if node == self.node for found in fetched)

    def _train(
        self,
        part: PartT,
        trained: Trained,
        stream: Iterator[DecodedT],
        trace: SampleTrace,
        done: int,
    ) -> bool:
        """Train a part to its end: the step loop. Return False if the run was stopped before."""
        if done >= part.last_step:
            return True
        model = self._wrap(trained.model)
        model.train()
        with ExitStack() as stack:
            if not self.task.options.keeps_activations:
                stack.enter_context(checkpointed_activations(trained.model))
            reporter = self._reporter(part, done, stack)
            self.ends.tell(Phase.TRAINING)
            for step in range(done + 1, part.last_step + 1):
                own_step = step - part.first_step
                # By the part's own step, so that arms with the same seed get the same draws.
                torch.manual_seed(torch_seed(part.seed, "step", own_step, self.rank))
                batches = self._batches(part, step, stream, reporter, trace)
                self._step(part, model, trained.optimizer, step, batches, reporter)
                if reporter.writer is not None:
                    self.task.show(trained.model, part, own_step, reporter.writer)
                since = time.monotonic()
                is_due = self.task.watch(trained.model, part, own_step, reporter.writer)
                reporter.pause(time.monotonic() - since)
                every = self.config.checkpoint.every_steps
                is_due |= step == part.last_step or own_step % every == 0
                decision = self.ends.agree(is_due=is_due)
                if decision is not AfterStep.GO_ON:
                    hurried = decision is AfterStep.STOP
                    reporter.settle(self.job.folder, self.rank, self.world_size, is_hurried=hurried)
                    self._checkpoint(part, trained, step, reporter.unreported())
                if decision is AfterStep.STOP:
                    self.ends.tell(Phase.STOPPED, step)
                    return False
        if self.world_size > 1:  # all measure with the kept model's buffers
            for buffer in trained.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return True

    def _step(
        self,
        part: PartT,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        batches: Iterator[BatchT],
        reporter: StepReporter,
    ) -> None:
        """Do one optimizer step and report it.

        Raises:
            DataError: too many samples can't be used.
        """
        optim, own_step = self.config.optim, step - part.first_step
        learning_rate = self.task.learning_rate(part, own_step)
        metrics = optimizer_step(
            model,
            optimizer,
            batches,
            partial(self.task.loss, part=part),
            grad_accum_steps=optim.global_batch_size // (optim.micro_batch_size * self.world_size),
            learning_rate=learning_rate,
            autocast_dtype=self.autocast_dtype,
            max_grad_norm=self.task.options.max_grad_norm,
        )
        reporter.add(own_step, metrics)
        if self.device.type == "cpu":  # on a GPU, checking now would delay the next steps
            reporter.check()
        if not reporter.is_due(own_step):
            return
        totals = reporter.report(own_step, learning_rate=learning_rate, metrics=metrics)
        seen = (own_step - reporter.first_step) * reporter.size.images_per_step
        ratio = self.config.data.max_bad_ratio
        if too_many_bad(totals.num_bad, seen, ratio):
            reporter.save_bad_samples(self.job.folder, self.rank, self.world_size)
            raise bad_samples_error(totals, seen, ratio, self.job.folder)

    def _wrap(self, model: nn.Module) -> nn.Module:
        wrapped = model
        if self.task.options.compiles and self.device.type == "cuda":
            compiled = torch.compile(model)
            assert isinstance(compiled, nn.Module)
            wrapped = compiled
        if self.world_size > 1 and any(p.requires_grad for p in model.parameters()):
            wrapped = DistributedDataParallel(
                wrapped,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                # Only the statistics of batch norms change; all other buffers stay as they are.
                forward_sync_buffers=any(isinstance(m, _BatchNorm) for m in model.modules()),
            )
        return wrapped

    def _reporter(self, part: PartT, done: int, stack: ExitStack) -> StepReporter:
        """Create a reporter; it counts from the part's own start, so that arms can be compared."""
        job, uri = self.job, self.config.tracking.uri
        prefix = f"{part.label}/" if sum(p.steps > 0 for p in self.task.parts) > 1 else ""
        writer = None
        if self.rank == 0:
            writer = tracking.MetricWriter(
                uri,
                job.run_id,
                after_step=tracking.last_logged_step(uri, job.run_id, prefix + LOSS_METRIC),
                is_superseded=job.folder.is_superseded,
            )
            stack.callback(writer.close)
        size = self.task.size(part)
        if self.rank == 0:
            logger.info(
                "%s: training from step %d to %d on %d images: workers=%d device=%s precision=%s",
                part.label,
                done - part.first_step,
                part.steps,
                size.samples_per_epoch,
                self.world_size,
                self.device.type,
                "bf16" if self.autocast_dtype else "fp32",
            )
        reporter = StepReporter(
            size,
            self.config.reporting.every_steps,
            done - part.first_step,
            writer,
            self.ends,
            prefix,
            self.task.after(part),
        )
        if done > part.first_step:
            reporter.take_over(self.unreported, self.rank, self.world_size)
        return reporter

    def _stream(self) -> Iterator[DecodedT]:
        """Yield this worker's share of the rest of the run's sequence."""
        if not any(part.steps for part in self.task.parts):
            return iter(())
        shard = ray.train.get_dataset_shard("train")
        rows = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2)
        return self.task.decoded(micro_batches(rows))

    def _batches(
        self,
        part: PartT,
        step: int,
        stream: Iterator[DecodedT],
        reporter: StepReporter,
        trace: SampleTrace,
    ) -> Iterator[BatchT]:
        """Yield the micro batches of one step, and record what each one contains."""
        size = reporter.size
        images = self.config.optim.micro_batch_size // size.crops_per_image
        number = 0
        while True:
            since = time.monotonic()
            decoded = next(stream, None)
            reporter.waited_s += time.monotonic() - since
            if decoded is None:
                return
            place = self.num_passes * self.world_size + self.rank
            expected = self.first_step * size.images_per_step + place * images
            check_place(decoded.rows, expected, images, self.rank)
            self.num_passes += 1
            reporter.count_bad(decoded.bad)
            trace.write(decoded.rows, decoded.came, step)
            yield self.task.batch(decoded, part, step=step - part.first_step, number=number)
            number += 1

    def _checkpoint(
        self, part: PartT, trained: Trained, step: int, unreported: UnreportedLoss
    ) -> None:
        """Write a checkpoint on rank 0, then report on every rank, which waits for all of them."""
        if self.rank == 0:
            with scratch_folder() as local:
                save_checkpoint(
                    local,
                    self.task.record(part, step).model_copy(update={"unreported": unreported}),
                    model=trained.model,
                    optimizer=trained.optimizer,
                )
                uri = commit_checkpoint(
                    local,
                    self.job.run_uri,
                    step=step,
                    keep=self.config.checkpoint.keep,
                    spared=self.task.best_step(step),
                    check=self.job.folder.check_start,
                )
            logger.info("checkpoint: %s", uri)
        # Without the checkpoint: the run's folder is the only list of them (docs/adr/0005).
        ray.train.report({"step": step})


def torch_seed(seed: int, *names: int | str) -> int:
    """Return a seed for torch's global generator, derived from a name for its purpose."""
    return int(named_generator(seed, *names).integers(2**62))
