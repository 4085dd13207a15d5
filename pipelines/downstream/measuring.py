"""Compute a model's predictions for whole shards, shared among the workers."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Generic, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from mae_core.checkpoint_manifest import CheckpointManifest
from mae_core.data.manifest import ShardInfo
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.samples import DataError, Sample
from mae_core.data.transforms import stack_pixels
from mae_core.data.views import normalize
from pipelines.downstream.arms import Arm
from pipelines.downstream.task import (
    EncodedSample,
    Evaluation,
    Example,
    Measured,
    PredictionT,
    TruthT,
)
from pipelines.reading.batches import too_many_bad
from pipelines.reading.shards import BrokenSample, Rows, read_chosen, read_samples, target_of
from pipelines.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

ROWS_PER_READ = 32

Shards = tuple[ShardInfo, ...]
OutputT = TypeVar("OutputT")


class NotMeasuredError(DataError):
    """Too few samples could be measured; raised after all workers have done their share."""


def to_images(
    pixels: Sequence[Pixels], encoder: CheckpointManifest, device: torch.device
) -> Tensor:
    """Return (B, C, H, W) images on the device, normalised as in pretraining."""
    stacked = normalize(stack_pixels(pixels), encoder.channel_mean, encoder.channel_std)
    return torch.from_numpy(stacked).to(device)


@dataclass(frozen=True, eq=False)
class Measurer(Generic[TruthT, PredictionT]):
    """What a worker needs to compute its share of the predictions."""

    task: Measured[TruthT, PredictionT]
    encoder: CheckpointManifest
    targets: tuple[str, ...]  # extensions that hold an image's label
    max_bad_ratio: float
    batch_size: int
    pool: ThreadPoolExecutor
    device: torch.device
    rank: int
    world_size: int
    tell: Callable[[str, int, int], None]  # arguments: what is measured, pieces done, all pieces
    # By shards and whether the encoder is pretrained: the weights, the rows and the predictions.
    _kept: dict[
        tuple[Shards, bool],
        tuple[int | None, tuple[Rows, ...] | None, list[PredictionT] | None],
    ] = field(default_factory=dict)

    def features(
        self,
        model: nn.Module,
        weights: int | None,
        shards: Shards,
        rows: tuple[Rows, ...] | None,
    ) -> list[PredictionT] | None:
        """Return `predictions`, and reuse them until other rows or new weights are asked for.

        `weights` identifies the frozen encoder `model`: the seed of random weights, or None for the
        pretrained ones.
        """
        key = shards, weights is None
        kept = self._kept.get(key)
        if kept is None or kept[0] != weights or kept[1] is not rows:
            kept = (weights, rows, self.predictions(model, shards, rows))
            self._kept[key] = kept
        return kept[2]

    def predictions(
        self, model: nn.Module, shards: Shards, rows: tuple[Rows, ...] | None
    ) -> list[PredictionT] | None:
        """Return the task's predictions for all samples, or for some rows, on rank 0."""
        return self.outputs(model, shards, rows, self.task.predict)

    def outputs(
        self,
        model: nn.Module,
        shards: Shards,
        rows: tuple[Rows, ...] | None,
        output_of: Callable[[nn.Module, Tensor, Sequence[Example[TruthT]]], list[OutputT]],
    ) -> list[OutputT] | None:
        """Return what `output_of` returns for all samples, or for some rows, on rank 0.

        Each rank computes its part. `output_of` is called with the model, a batch of images and
        their examples, and returns one output for each example.
        """
        chosen = rows or tuple(range(shard.num_samples) for shard in shards)
        pieces = [
            (shards, number, part[start : start + ROWS_PER_READ])
            for number, part in enumerate(chosen)
            for start in range(0, len(part), ROWS_PER_READ)
        ]
        was_training = model.training
        model.eval()
        mine: list[list[OutputT]] = []
        for place, piece in enumerate(pieces[self.rank :: self.world_size]):
            self.tell("measuring", place * self.world_size, len(pieces))
            mine.append(self._outputs_of_piece(model, output_of, *piece))
        model.train(was_training)
        parts = [mine]
        if self.world_size > 1:
            parts = [[] for _ in range(self.world_size)]
            torch.distributed.all_gather_object(parts, mine)
        if self.rank != 0:
            return None
        ordered = [parts[i % self.world_size][i // self.world_size] for i in range(len(pieces))]
        outputs = [output for part in ordered for output in part]
        total = sum(map(len, chosen))
        num_bad, ratio = total - len(outputs), self.max_bad_ratio
        if too_many_bad(num_bad, total, ratio):
            raise NotMeasuredError(
                f"{num_bad} of {total} samples of {shards[0].path} and the shards beside it can't "
                f"be measured, more than data.max_bad_ratio={ratio:g}; the log names them"
            )
        if not outputs:
            raise NotMeasuredError(f"{shards[0].path}: none of the images can be decoded")
        return outputs

    def _outputs_of_piece(
        self,
        model: nn.Module,
        output_of: Callable[[nn.Module, Tensor, Sequence[Example[TruthT]]], list[OutputT]],
        shards: Shards,
        number: int,
        rows: Rows,
    ) -> list[OutputT]:
        samples = read_chosen(shards[number], rows)
        read = partial(self._whole_example, shards)
        made = list(self.pool.map(read, [(number, int(row)) for row in rows], samples))
        examples = [example for example in made if example is not None]
        size = self.batch_size
        outputs: list[OutputT] = []
        with torch.no_grad():
            for _, alike in groupby(examples, key=lambda example: example.pixels.shape):
                whole = list(alike)
                for group in (whole[i : i + size] for i in range(0, len(whole), size)):
                    images = to_images(
                        [example.pixels for example in group], self.encoder, self.device
                    )
                    outputs += output_of(model, images, group)
        return outputs

    def example_at(self, shards: Shards, place: tuple[int, int]) -> Example[TruthT]:
        """Read a sample again, by its shard and row."""
        (sample,) = read_samples(shards[place[0]], place[1], place[1] + 1)
        example = self._whole_example(shards, place, sample)
        if example is None:
            raise DataError(f"{shards[place[0]].path}: row {place[1]} changed while it was read")
        return example

    def _whole_example(
        self, shards: Shards, place: tuple[int, int], row: Sample | BrokenSample
    ) -> Example[TruthT] | None:
        """Return a sample as it is, without augmentation; None where it can't be used."""
        path = shards[place[0]].path
        if isinstance(row, BrokenSample):
            logger.warning("not measured: shard=%s key=%s reason=%s", path, row.key, row.error)
            return None
        target = target_of(row, self.targets)
        sample = EncodedSample(path, row.key, 0, row.image, target)
        try:
            return self.task.validation_example(sample)._replace(place=place)
        except CorruptSampleError as error:
            logger.warning("not measured: shard=%s key=%s reason=%s", path, row.key, error)
            return None


def write_evaluation(folder: RunFolder, arm: Arm, evaluation: Evaluation) -> None:
    """Store an arm's results; the metrics are written last and mark the arm as done."""
    for name, picture in evaluation.pictures.items():
        folder.write_arm_picture(arm.label, name, picture)
    for name, text in evaluation.texts.items():
        folder.write_arm_file(arm.label, name, text.encode())
    # NaN means that there was nothing to measure, such as a class without any sample.
    measured = {name: x for name, x in evaluation.metrics.items() if not math.isnan(x)}
    folder.write_arm(arm.label, json.dumps(measured))
