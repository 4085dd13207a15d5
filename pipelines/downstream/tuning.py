"""Define classify, detect and segment as one task of a training process."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import torch
from torch import Tensor, nn

from infra import tracking, transfers
from infra.scratch import scratch_folder
from mae_core.checkpoint import load_encoder, save_checkpoint
from mae_core.checkpoint_manifest import CheckpointManifest, CheckpointRecord
from mae_core.config import ModelConfig
from mae_core.data.manifest import ShardInfo
from mae_core.data.order import ChainedOrder, RunOrder
from mae_core.data.pixels import CorruptSampleError
from mae_core.model.family import build_encoder
from mae_core.optim import warmup_cosine
from mae_core.train_step import BatchLoss
from pipelines.config.downstream import DownstreamConfig
from pipelines.config.steps import warmup_steps
from pipelines.downstream.arm_start import fit_start
from pipelines.downstream.arms import Arm, arm_of_step
from pipelines.downstream.measuring import Measurer, NotMeasuredError, to_images, write_evaluation
from pipelines.downstream.task import (
    Batch,
    EncodedSample,
    Evaluation,
    Example,
    PredictionT,
    Task,
    TruthT,
    WantedT,
)
from pipelines.downstream.trials import best_rate, held_rows, trials_of
from pipelines.outcome import ConfigError
from pipelines.reading.batches import BadSample, ahead
from pipelines.reading.sequence import SequencePlan, passes_per_block, sequence_dataset
from pipelines.reading.shards import Rows
from pipelines.training.checkpoints import resume_position
from pipelines.training.process import Process, StepOptions, Trained, torch_seed
from pipelines.training.ray_channel import RayChannel
from pipelines.training.reporting import After, RunSize
from pipelines.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
FORWARD_SPEED = 3  # times the speed of a training step on the same images


class TuningJob(NamedTuple, Generic[WantedT, TruthT, PredictionT]):
    """Everything that a worker must know."""

    config: DownstreamConfig
    make_task: Callable[[], Task[WantedT, TruthT, PredictionT]]
    targets: tuple[str, ...]  # extensions that hold an image's label
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]  # of each class, if labels have one
    init_uri: str  # of the pretrained checkpoint
    run_uri: str
    start: str  # see RunFolder
    run_id: str | None  # in MLflow
    arms: tuple[Arm, ...]
    rows: tuple[tuple[Rows, ...], ...]  # of each arm, of each training shard
    train_shards: tuple[ShardInfo, ...]
    val_shards: tuple[ShardInfo, ...]
    data_digest: str
    encoder: CheckpointManifest  # with the size of this run's images
    pretrained: ModelConfig  # as it was pretrained; for other sizes its positions are interpolated

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_uri, self.start)

    @property
    def channel(self) -> RayChannel:
        return RayChannel(self.start)

    def measuring_steps(self, arm: Arm) -> float:
        """Estimate how many steps take as long as measuring this arm and all after it."""
        images = sum(shard.num_samples for shard in self.val_shards)
        left = len(self.arms) - self.arms.index(arm)
        return left * images / (FORWARD_SPEED * self.config.optim.global_batch_size)

    @property
    def is_trained(self) -> bool:
        return any(arm.steps for arm in self.arms)

    @property
    def total_steps(self) -> int:
        return self.arms[-1].last_step

    def build_task(self, process: Process) -> "TuningTask[WantedT, TruthT, PredictionT]":
        return TuningTask(self, process)


def remaining_data(job: TuningJob[WantedT, TruthT, PredictionT]) -> ray.data.Dataset:
    """Return the rest of all arms' sequences, from the newest complete checkpoint on."""
    # While an arm is measured, nothing is read, however long that takes.
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = -1
    config = job.config
    trained = [(arm, rows) for arm, rows in zip(job.arms, job.rows, strict=True) if arm.steps]
    order = ChainedOrder(
        tuple(
            RunOrder(
                counts=np.asarray([len(part) for part in rows], dtype=np.int64),
                seed=arm.seed,
                window=config.data.shuffle_window,
                num_samples=arm.steps * config.optim.global_batch_size,
            )
            for arm, rows in trained
        )
    )
    plan = SequencePlan(
        job.train_shards,
        order,
        resume_position(job.run_uri),
        config.optim.micro_batch_size,
        num_workers=config.scaling.num_workers,
        rows=tuple(part for _, rows in trained for part in rows),
        targets=job.targets,
    )
    size = sum(s.num_bytes for s in job.train_shards) / sum(s.num_samples for s in job.train_shards)
    return sequence_dataset(replace(plan, passes_per_block=passes_per_block(plan, size)))


class DecodedExamples(NamedTuple, Generic[WantedT]):
    examples: list[Example[WantedT] | None]  # None for a hole
    bad: list[BadSample]
    rows: pa.Table

    @property
    def came(self) -> list[bool]:
        return [example is not None for example in self.examples]


class TuningTask(Generic[WantedT, TruthT, PredictionT]):
    """See `pipelines.training.process.TrainingTask`; its parts are the run's arms."""

    def __init__(self, job: TuningJob[WantedT, TruthT, PredictionT], process: Process) -> None:
        self.job = job
        self.config = config = job.config
        self.process = process
        self.parts = job.arms
        self.options = StepOptions(
            max_grad_norm=config.optim.max_grad_norm,
            keeps_activations=not config.scaling.checkpoint_activations,
        )
        self.task = job.make_task()
        self.pool = ThreadPoolExecutor(config.scaling.cpus_per_worker, thread_name_prefix="decode")
        self.measurer = Measurer(
            task=self.task,
            encoder=job.encoder,
            targets=job.targets,
            max_bad_ratio=config.data.max_bad_ratio,
            batch_size=config.optim.micro_batch_size,
            pool=self.pool,
            device=process.device,
            rank=process.rank,
            world_size=process.world_size,
            tell=process.tell_measured,
        )
        self._pretrained: Path | None = None
        self._chosen: dict[str, float] = {}  # base_lr by the arm's label

    def size(self, part: Arm) -> RunSize:
        return RunSize(part.steps, self.config.optim.global_batch_size, part.num_samples, 1)

    def after(self, part: Arm) -> After:
        job = self.job
        return After((job.total_steps - part.last_step) + job.measuring_steps(part))

    def is_measured(self, part: Arm) -> bool:
        return self.job.folder.has_arm(part.label)

    def build(self, part: Arm, *, is_resumed: bool) -> Trained:
        torch.manual_seed(torch_seed(part.seed, "weights"))
        rate = self.config.optim.drop_path_rate if part.kind.trains_encoder else 0.0
        if part.kind.is_pretrained:
            encoder, _ = load_encoder(self._fetched(), drop_path_rate=rate, is_verified=True)
        else:
            encoder = build_encoder(self.job.encoder.model, drop_path_rate=rate)
        try:
            model = self.task.build_model(encoder, part).to(self.process.device)
            if part.steps and not is_resumed:
                self._start(part, model)
            return Trained(model, self.task.build_optimizer(model, part))
        except ValueError as error:  # for example strides that do not tile the image
            raise ConfigError(f"arm {part.label}: {error}") from error

    def _start(self, part: Arm, model: nn.Module) -> None:
        start = self.task.start(part)
        if start is None:
            return
        rows = self.job.rows[self.job.arms.index(part)]
        fit_start(start, model, self.measurer, self.job.train_shards, rows)

    def _fetched(self) -> Path:
        """Return a local copy of the pretrained checkpoint, which is fetched once."""
        if self._pretrained is None:
            self._pretrained = self.process.fetch(self.job.init_uri)
        return self._pretrained

    def learning_rate(self, part: Arm, step: int) -> float:
        optim = self.config.optim
        peak = self.task.peak_learning_rate(part, self._base_lr(part))
        return warmup_cosine(
            step - 1,
            peak=peak,
            warmup_steps=warmup_steps(optim, part.num_samples, part.steps),
            total_steps=part.steps,
            floor=peak * optim.min_lr_ratio,
        )

    def _base_lr(self, part: Arm) -> float:
        """Return the arm's `base_lr`: the trial's, the only one, or the one that trials chose."""
        if part.tried_rate is not None:
            return part.tried_rate
        trials = trials_of(self.job.arms, part)
        if not trials:
            return self.config.optim.rates[0]
        if part.label not in self._chosen:
            folder = self.job.folder
            scores = {x: folder.read_arm(x.label) for x in trials if folder.has_arm(x.label)}
            chosen = best_rate(trials, scores, self.config.section.metric)
            logger.info("%s: base_lr=%g, chosen on held labels", part.label, chosen)
            self._chosen[part.label] = chosen
        return self._chosen[part.label]

    def decoded(self, tables: Iterable[pa.Table]) -> Iterator[DecodedExamples[WantedT]]:
        return ahead(tables, self._decode, BATCHES_AHEAD)

    def _decode(self, table: pa.Table) -> DecodedExamples[WantedT]:
        position = int(table["position"][0].as_py())
        step = position // self.config.optim.global_batch_size + 1
        arm = arm_of_step(self.job.arms, step)
        columns = [table[n].to_pylist() for n in ("shard", "key", "epoch", "image", "target")]
        samples = [EncodedSample(*values) for values in zip(*columns, strict=True)]
        made = list(
            self.pool.map(partial(self._example, arm=arm), samples, table["error"].to_pylist())
        )
        return DecodedExamples(
            [x if isinstance(x, Example) else None for x in made],
            [x for x in made if isinstance(x, BadSample)],
            table.drop_columns(["image", "target"]),
        )

    def _example(
        self, sample: EncodedSample, error: str | None, arm: Arm
    ) -> Example[WantedT] | BadSample:
        if error is not None:
            kind = error.partition(":")[0]
            return BadSample(sample.epoch, sample.shard, sample.key, kind, error)
        try:
            return self.task.training_example(sample, arm)
        except CorruptSampleError as corrupt:
            return BadSample(sample.epoch, sample.shard, sample.key, corrupt.kind, str(corrupt))

    def batch(
        self, decoded: DecodedExamples[WantedT], part: Arm, *, step: int, number: int
    ) -> Batch[WantedT]:
        process, size = self.process, self.config.optim.micro_batch_size
        first = (number * process.world_size + process.rank) * size
        return self._to_device(decoded.examples, step, first)

    def _to_device(
        self, examples: Sequence[Example[WantedT] | None], step: int, first: int
    ) -> Batch[WantedT]:
        model, device = self.job.encoder.model, self.process.device
        hole = np.zeros((*model.img_size, model.in_chans), np.uint8)
        pixels = [hole if x is None else x.pixels for x in examples]
        images: Tensor = to_images(pixels, self.job.encoder, device)
        weights = torch.tensor([float(x is not None) for x in examples], device=device)
        images = images * weights[:, None, None, None]
        targets = [None if x is None else x.target for x in examples]
        return Batch(images, targets, weights, step, first)

    def loss(self, model: nn.Module, batch: Batch[WantedT], part: Arm) -> BatchLoss:
        return self.task.loss(model, batch, part)

    def show(self, model: nn.Module, part: Arm, step: int, writer: tracking.MetricWriter) -> None:
        """Draw nothing, because an arm's pictures are made when it is measured."""

    def watch(
        self, model: nn.Module, part: Arm, step: int, writer: tracking.MetricWriter | None
    ) -> bool:
        """Measure nothing, because an arm is measured after its training."""
        return False

    def best_step(self, step: int) -> int | None:
        return None

    def record(self, part: Arm, step: int) -> CheckpointRecord:
        job, encoder, batch = self.job, self.job.encoder, self.config.optim.global_batch_size
        return CheckpointRecord(
            step=step,
            samples_seen=step * batch,
            epoch=(step - part.first_step) * batch / part.num_samples,
            total_steps=max(job.total_steps, 1),
            seed=part.seed,
            data_digest=job.data_digest,
            channel_mean=encoder.channel_mean,
            channel_std=encoder.channel_std,
            model=job.pretrained if part.kind.is_pretrained else encoder.model,
            masking=encoder.masking,
            loss=encoder.loss,
            stage=self.config.stage,
            classes=job.classes,
            category_ids=job.category_ids,
        )

    def measure(self, part: Arm, model: nn.Module) -> None:
        """Store an arm's model and measure it; a start that was stopped here does both again.

        An arm that can't be measured is recorded, and the other arms are measured all the same.
        """
        folder = self.job.folder
        if self.process.rank == 0 and part.steps:
            with scratch_folder() as local:
                record = self.record(part, part.last_step)
                save_checkpoint(local, record, model=model, optimizer=None)
                uri = folder.model_uri(part.label)
                transfers.upload_folder(
                    local, uri, last="manifest.json", before_last=folder.check_start
                )
        try:
            evaluation = self._evaluation(part, model)
        # For example too few images to choose a penalty.
        except (NotMeasuredError, ValueError) as error:
            logger.error("%s can't be measured: %s", part.label, error)
            folder.write_arm_failure(part.label, str(error))
        else:
            if evaluation is not None:
                write_evaluation(folder, part, evaluation)
                shown = ", ".join(f"{name}={x:.3f}" for name, x in evaluation.metrics.items())
                logger.info("%s: %s", part.label, shown)

    def _evaluation(self, arm: Arm, model: nn.Module) -> Evaluation | None:
        """Measure an arm; return None on all ranks but the first."""
        training: list[PredictionT] | None = []
        shards = self.job.val_shards
        if arm.is_trial:
            shards = self.job.train_shards
            held = held_rows(self.job.arms, self.job.rows, arm)
            predictions = self.measurer.predictions(model, shards, held)
        elif arm.steps:
            predictions = self.measurer.predictions(model, self.job.val_shards, None)
        else:  # these arms share the frozen encoder
            weights = None if arm.kind.is_pretrained else arm.seed
            features = partial(self.measurer.features, model, weights)
            training = features(self.job.train_shards, self.job.rows[self.job.arms.index(arm)])
            predictions = features(self.job.val_shards, None)
        if predictions is None or training is None:
            return None
        read = partial(self.measurer.example_at, shards)
        evaluation = self.task.evaluate(predictions, arm, read, training)
        return Evaluation(evaluation.metrics, {}, {}) if arm.is_trial else evaluation
