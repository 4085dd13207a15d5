"""What a training worker says about itself: a progress line, metrics and pictures in MLflow.

Only rank 0 speaks. Nothing here waits for MLflow: the writer has a thread of its own.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from infra.tracking import MetricWriter
from mae_core.data.samples import DataError
from pipelines.batches import BadSample
from pipelines.run_folder import RunFolder

logger = logging.getLogger(__name__)

SHOWN_BAD_SAMPLES = 20  # in the log, of one worker
MAX_UNSAVED_BAD = 10_000  # kept for bad_samples.jsonl between two checkpoints, of one worker


class RunSize(NamedTuple):
    """Samples are views, `crops_per_image` of each image; places in the sequence are images."""

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

    loss: float  # mean over the samples of the last step
    num_bad: int  # samples that could not be decoded, since this start


@dataclass
class StepReporter:
    """Collects on every rank, sums over the ranks at an interval, tells on rank 0."""

    size: RunSize
    every_steps: int
    first_step: int
    writer: MetricWriter | None  # rank 0 has one
    prefix: str = ""  # of the metrics' names
    num_bad: int = 0
    unsaved_bad: list[BadSample] = field(default_factory=list)  # since the last checkpoint
    waited_s: float = 0.0
    _since: float = field(default_factory=time.monotonic)
    _since_step: int = -1
    _shown: int = 0

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

    def report(
        self,
        step: int,
        *,
        loss: Tensor,
        num_samples: Tensor,
        learning_rate: float,
        grad_norm: Tensor,
    ) -> Totals:
        """Sum over the ranks and tell. Every rank calls it at the same steps.

        `loss` is the rank's share of the global batch's mean, as `StepMetrics` has it.
        """
        totals = self._sum_over_ranks(loss, num_samples)
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        images_per_s = (step - self._since_step) * self.size.global_batch_size / elapsed
        wait_share = min(1.0, self.waited_s / elapsed)
        self._since, self._since_step, self.waited_s = now, step, 0.0
        if self.writer is not None:
            seen = step * self.size.global_batch_size
            epoch = seen / self.size.samples_per_epoch
            metrics = {
                "train/loss": totals.loss,
                "train/learning_rate": learning_rate,
                "train/grad_norm": float(grad_norm),
                "train/epoch": epoch,
                "train/samples_seen": seen,
                "worker/images_per_s": images_per_s,
                "worker/wait_share": wait_share,
                "worker/bad_samples": totals.num_bad,
            }
            self.writer.write({self.prefix + key: x for key, x in metrics.items()}, step)
            left_s = (self.size.total_steps - step) * self.size.global_batch_size / images_per_s
            logger.info(
                "%sstep %d/%d epoch=%.2f loss=%.4f lr=%.2e images/s=%.0f data_wait=%.0f%% bad=%d "
                "eta=%s",
                self.prefix,
                step,
                self.size.total_steps,
                epoch,
                totals.loss,
                learning_rate,
                images_per_s,
                100 * wait_share,
                totals.num_bad,
                format_seconds(left_s),
            )
        return totals

    def _sum_over_ranks(self, loss: Tensor, num_samples: Tensor) -> Totals:
        sums = torch.stack(
            [
                loss.detach().double(),
                num_samples.detach().double(),
                torch.tensor(float(self.num_bad), device=loss.device, dtype=torch.float64),
            ]
        )
        world_size = 1
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
            world_size = torch.distributed.get_world_size()
        loss_sum, counted, num_bad = sums.tolist()
        # The step divides by the nominal batch; shown is the mean over the samples that came.
        share_that_came = counted / self.size.global_batch_size
        return Totals(loss_sum / world_size / max(share_that_came, 1e-9), int(num_bad))


def too_many_bad(totals: Totals, seen: int, max_bad_ratio: float) -> bool:
    """Judged against a thousand samples at least: one bad one of the first ten is no 10 %."""
    return totals.num_bad > max_bad_ratio * max(seen, 1000)


def bad_samples_error(
    totals: Totals, seen: int, max_bad_ratio: float, folder: RunFolder
) -> DataError:
    """Say what is wrong with how many, after `save_bad_samples`."""
    bad = folder.read_bad_samples()
    return DataError(
        f"{totals.num_bad} of {max(seen, 1000)} samples can't be used, more than "
        f"data.max_bad_ratio={max_bad_ratio:g} ({count_kinds(bad)}); the first is "
        f"{bad[0]['key']} in {bad[0]['shard']}: {bad[0]['reason']}; all of them: "
        f"{folder.bad_samples_uri}"
    )


def save_bad_samples(reporter: StepReporter, folder: RunFolder, rank: int, world_size: int) -> None:
    """What was left out since the last call, of all ranks. Every rank calls it."""
    found = [[sample._asdict() for sample in reporter.unsaved_bad]]
    reporter.unsaved_bad.clear()
    if world_size > 1:
        found *= world_size
        torch.distributed.all_gather_object(found, found[rank])
    if rank == 0 and any(found):
        folder.add_bad_samples(sample for part in found for sample in part)
    if world_size > 1:  # the file is there when the first rank reads it
        torch.distributed.barrier()


def count_kinds(bad: Iterable[Mapping[str, str]]) -> str:
    """Such as "2 x truncated, 1 x empty"."""
    counts = Counter(sample["kind"] for sample in bad)
    return ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
