"""Report a training worker's progress: a progress line, metrics and pictures in MLflow.

Only rank 0 reports. Nothing here waits for MLflow, because the writer has its own thread.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from infra.tracking import MetricWriter
from mae_core.checkpoint_manifest import UnreportedLoss
from mae_core.data.samples import DataError
from mae_core.train_step import StepMetrics
from pipelines.reading.batches import LEAST_JUDGED, BadSample
from pipelines.terminal.progress import format_seconds, has_bar
from pipelines.training.run_folder import RunFolder
from pipelines.training.stopping import Phase, StepEnds, Told

logger = logging.getLogger(__name__)

SHOWN_BAD_SAMPLES = 20  # per worker, in the log
# The moving average of the step time covers the last twenty steps, or the last minute if that has
# more steps: a few seconds are a bad estimate for the minutes that are left.
PACE_WEIGHT = 0.05
PACE_OVER_S = 60.0
# How long a checkpoint waits for a slow MLflow. For a server that is down it waits once.
FLUSH_TIMEOUT_S = 5.0
# For a run that is being stopped, because `ray job stop` kills it after three seconds.
HURRIED_FLUSH_TIMEOUT_S = 0.5
# Number of samples that one worker keeps for bad_samples.jsonl between two checkpoints.
MAX_UNSAVED_BAD = 10_000


class RunSize(NamedTuple):
    """The size of a run.

    Samples are views, `crops_per_image` of each image; positions in the sequence count images.
    """

    total_steps: int
    global_batch_size: int
    samples_per_epoch: int
    crops_per_image: int

    @property
    def images_per_step(self) -> int:
        return self.global_batch_size // self.crops_per_image

    @property
    def num_images(self) -> int:
        """Length of the run's sequence."""
        return self.total_steps * self.images_per_step


class Totals(NamedTuple):
    """Sums over all workers."""

    loss: float  # mean over the samples since the last report
    num_bad: int  # number of samples since this start that could not be decoded


class After(NamedTuple):
    """The work after the last step, such as evaluation and export, for the remaining time."""

    steps: float = 0.0  # number of steps that would take as long
    seconds: float = 0.0


NOTHING = After()


@dataclass
class Pace:
    """Seconds per step, as a moving average without the first step, which includes the start."""

    mean_s: float = 0.0
    num_steps: int = -1
    _ended_at_s: float = 0.0

    def step_ended(self) -> None:
        now_s = time.monotonic()
        self.num_steps += 1
        if self.num_steps > 0:
            # At first a plain mean, then a moving one.
            weight = max(1 / self.num_steps, min(PACE_WEIGHT, self.mean_s / PACE_OVER_S))
            self.mean_s += weight * (now_s - self._ended_at_s - self.mean_s)
        self._ended_at_s = now_s

    def pause(self, seconds: float) -> None:
        """Exclude a time in which nothing was trained."""
        self._ended_at_s += seconds


@dataclass
class StepReporter:
    """Collects values on every rank, and at an interval reports their sums on rank 0."""

    size: RunSize
    every_steps: int
    first_step: int
    writer: MetricWriter | None  # only on rank 0
    ends: StepEnds | None = None  # is told how far the run is
    prefix: str = ""  # prefix of the metrics' names
    after: After = NOTHING
    num_bad: int = 0
    unsaved_bad: list[BadSample] = field(default_factory=list)  # since the last checkpoint
    waited_s: float = 0.0
    pace: Pace = field(default_factory=Pace)
    _has_bar: bool = field(default_factory=has_bar)
    _detail: str = ""  # text of the last report
    _num_steps: int = 0  # since the last report
    _since: float = field(default_factory=lambda: time.monotonic())
    _since_step: int = -1
    _shown: int = 0
    # Sums since the last report; on the device, so that nothing waits for them.
    _loss: Tensor | None = None
    _num_samples: Tensor | None = None
    # Steps whose update may have been left out.
    _unchecked: deque[StepMetrics] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._since_step = self.first_step

    def count_bad(self, bad: Sequence[BadSample]) -> None:
        self.num_bad += len(bad)
        self.unsaved_bad += bad[: max(0, MAX_UNSAVED_BAD - len(self.unsaved_bad))]
        for sample in bad[: max(0, SHOWN_BAD_SAMPLES - self._shown)]:
            logger.warning(
                "left out: shard=%s key=%s reason=%s", sample.shard, sample.key, sample.reason
            )
            self._shown += 1

    def is_due(self, step: int) -> bool:
        return step % self.every_steps == 0 or step == self.size.total_steps

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Add a step's loss to the mean that is reported next, without waiting for the device."""
        self.pace.step_ended()
        if self.pace.num_steps == 0 and not self.is_due(step):
            # Speed is measured from here on, because the first step includes the start.
            self._since, self._since_step, self.waited_s = time.monotonic(), step, 0.0
        self._num_steps += 1
        self._unchecked.append(metrics)
        loss, num_samples = metrics.loss.detach().double(), metrics.num_samples.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss
        self._num_samples = (
            num_samples if self._num_samples is None else self._num_samples + num_samples
        )
        if self.writer is not None and self.ends is not None:
            what = f"training {self.prefix.rstrip('/')}".rstrip()
            detail = f"{self._detail} eta={self._eta(step)}".strip()
            total = self.size.total_steps
            self.ends.tell_progress(Told(Phase.TRAINING, step, total, what, detail))

    def check(self) -> None:
        """Wait for the device, and raise a NonFiniteLossError if a step's update was left out."""
        while self._unchecked:
            self._unchecked.popleft().check()

    def pause(self, seconds: float) -> None:
        """Exclude a time in which nothing was trained from the measured speed."""
        self._since += seconds
        self.pace.pause(seconds)

    def _eta(self, step: int) -> str:
        """Estimate the time for the remaining steps, the evaluation and the export."""
        if self.pace.num_steps < 1:
            return "?"
        steps = self.size.total_steps - step + self.after.steps
        return format_seconds(steps * self.pace.mean_s + self.after.seconds)

    def report(self, step: int, *, learning_rate: float, metrics: StepMetrics) -> Totals:
        """Sum over the ranks and report. Every rank must call this at the same steps.

        `metrics` are those of this step, whose gradient norm and terms of the loss are reported.

        Raises: NonFiniteLossError.
        """
        self.check()
        totals = self._sum_over_ranks(self._num_steps)
        self._num_steps = 0
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        images_per_s = (step - self._since_step) * self.size.global_batch_size / elapsed
        wait_share = min(1.0, self.waited_s / elapsed)
        self._since, self._since_step, self.waited_s = now, step, 0.0
        if self.writer is not None:
            seen = step * self.size.global_batch_size
            epoch = seen / self.size.samples_per_epoch
            shown = {
                "train/loss": totals.loss,
                **{f"train/loss_{name}": float(x) for name, x in metrics.terms.items()},
                "train/learning_rate": learning_rate,
                "train/grad_norm": float(metrics.grad_norm),
                "train/epoch": epoch,
                "train/samples_seen": seen,
                "worker/images_per_s": images_per_s,
                "worker/wait_share": wait_share,
                "worker/bad_samples": totals.num_bad,
            }
            self.writer.write({self.prefix + key: x for key, x in shown.items()}, step)
            self._detail = (
                f"epoch={epoch:.2f} loss={totals.loss:.4f} lr={learning_rate:.2e} "
                f"images/s={images_per_s:.0f} data_wait={100 * wait_share:.0f}% "
                f"bad={totals.num_bad}"
            )
            if not self._has_bar:
                total, eta = self.size.total_steps, self._eta(step)
                logger.info("%sstep %d/%d %s eta=%s", self.prefix, step, total, self._detail, eta)
        return totals

    def unreported(self) -> UnreportedLoss:
        """Return the sums over the ranks with which the next report starts.

        Every rank must call this.
        """
        if self._loss is None or self._num_samples is None:
            return UnreportedLoss()
        sums = torch.stack([self._loss, self._num_samples])
        world_size = 1
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            world_size = torch.distributed.get_world_size()
        loss, num_samples = sums.tolist()
        return UnreportedLoss(
            loss=loss / world_size, num_samples=num_samples, num_steps=self._num_steps
        )

    def take_over(self, earlier: UnreportedLoss, rank: int, world_size: int) -> None:
        """Continue from the sums that a checkpoint holds. Every rank must call this."""
        self._num_steps = earlier.num_steps
        if rank == 0 and earlier.num_steps:
            self._loss = torch.tensor(earlier.loss * world_size, dtype=torch.float64)
            self._num_samples = torch.tensor(earlier.num_samples, dtype=torch.float64)

    def _sum_over_ranks(self, num_steps: int) -> Totals:
        assert self._loss is not None
        assert self._num_samples is not None
        num_bad = torch.tensor(float(self.num_bad), device=self._loss.device, dtype=torch.float64)
        sums = torch.stack([self._loss, self._num_samples, num_bad])
        self._loss = self._num_samples = None
        world_size = 1
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            world_size = torch.distributed.get_world_size()
        loss_sum, counted, all_bad = sums.tolist()
        # The step divides by the nominal batch size; the report shows the mean over the samples
        # that could be used.
        share_that_came = counted / (num_steps * self.size.global_batch_size)
        mean = loss_sum / num_steps / world_size / max(share_that_came, 1e-9)
        return Totals(mean, int(all_bad))

    def settle(self, folder: RunFolder, rank: int, world_size: int, *, is_hurried: bool) -> None:
        """Send metrics, and store bad samples, before a checkpoint is written.

        Every rank must call this.

        The steps before a checkpoint are not trained again after a resume, so nothing would report
        them again.

        Raises: NonFiniteLossError; nothing of such a step may be kept.
        """
        self.check()
        if self.writer is not None and not self.writer.is_failing:
            self.writer.flush(HURRIED_FLUSH_TIMEOUT_S if is_hurried else FLUSH_TIMEOUT_S)
        self.save_bad_samples(folder, rank, world_size)

    def save_bad_samples(self, folder: RunFolder, rank: int, world_size: int) -> None:
        """Gather the samples that all ranks left out since the last call.

        Every rank must call this.
        """
        found = [[sample._asdict() for sample in self.unsaved_bad]]
        self.unsaved_bad.clear()
        if world_size > 1:
            found *= world_size
            torch.distributed.all_gather_object(found, found[rank])
        if rank == 0 and any(found):
            folder.add_bad_samples(sample for part in found for sample in part)
        if world_size > 1:  # so that the file exists when the first rank reads it
            torch.distributed.barrier()


def bad_samples_error(
    totals: Totals, seen: int, max_bad_ratio: float, folder: RunFolder
) -> DataError:
    """Build the error about too many bad samples; call it after `StepReporter.save_bad_samples`."""
    bad = folder.read_bad_samples()
    return DataError(
        f"{totals.num_bad} of {max(seen, LEAST_JUDGED)} samples can't be used, more than "
        f"data.max_bad_ratio={max_bad_ratio:g} ({count_kinds(bad)}); the first is "
        f"{bad[0]['key']} in {bad[0]['shard']}: {bad[0]['reason']}; all of them: "
        f"{folder.bad_samples_uri}"
    )


def count_kinds(bad: Iterable[Mapping[str, str]]) -> str:
    """Count the samples by kind, such as "2 x truncated, 1 x empty"."""
    counts = Counter(sample["kind"] for sample in bad)
    return ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
