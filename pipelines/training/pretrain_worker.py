"""One training process: from its stream of blocks to optimizer steps and checkpoints."""

import io
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from infra import tracking
from mae_core.checkpoint import (
    CheckpointRecord,
    load_training_state,
    load_weights,
    save_checkpoint,
)
from mae_core.data.manifest import ShardInfo
from mae_core.data.order import RunOrder
from mae_core.data.pixels import Pixels
from mae_core.data.views import normalize
from mae_core.evaluation.reconstruction import reconstruct, reconstruction_picture
from mae_core.model.mae import MaskedAutoencoder, build_mae
from mae_core.optim import build_optimizer, warmup_cosine
from mae_core.train_step import MicroBatch, pretrain_step
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.batches import (
    BatchDecoder,
    DecodedBatch,
    autocast_dtype,
    check_place,
    decode_block,
    view_spec,
)
from pipelines.reading.class_names import Numbers
from pipelines.reading.sample_trace import SampleTrace
from pipelines.reading.sequence import (
    SequencePlan,
    configure_ray_data,
    micro_batches,
    passes_per_block,
    sequence_dataset,
)
from pipelines.training.checkpoints import (
    commit_checkpoint,
    fetch_checkpoint,
    find_checkpoint,
    resume_position,
)
from pipelines.training.knn import ImageReader, knn_metrics
from pipelines.training.reporting import (
    After,
    RunSize,
    StepReporter,
    bad_samples_error,
    too_many_bad,
)
from pipelines.training.run_folder import RunFolder
from pipelines.training.stopping import Decision, Phase, StepEnds, StopChannel

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
EXPORT_S = 10.0  # about what it takes to log the encoder to MLflow
LOSS_METRIC = "train/loss"


class Pictures(NamedTuple):
    """What the reconstruction picture shows."""

    pixels: Pixels  # (B, H, W, C)
    noise: npt.NDArray[np.float32]  # (B, L)


class TrainTask(NamedTuple):
    """All that a worker is told."""

    raw_config: dict[str, Any]
    run_uri: str
    init_uri: str | None  # of the checkpoint whose weights the run starts from
    start: str  # see RunFolder
    run_id: str | None  # MLflow's
    size: RunSize
    data_digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pictures: Pictures
    train_shards: tuple[ShardInfo, ...]
    val_shards: tuple[ShardInfo, ...]  # empty: no kNN evaluation
    class_numbers: Numbers
    evaluation_key: str  # see RunFolder.write_evaluation

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_uri, self.start)

    @property
    def channel(self) -> StopChannel:
        return StopChannel(self.start)


def remaining_data(task: TrainTask) -> ray.data.Dataset:
    """The run's sequence from the newest whole checkpoint on."""
    task.folder.check_start()
    task.folder.raise_failure()
    task.folder.check_writable()
    configure_ray_data()
    config = PretrainConfig.model_validate(task.raw_config)
    order = RunOrder(
        counts=np.asarray([shard.num_samples for shard in task.train_shards], dtype=np.int64),
        seed=config.seed,
        window=config.data.shuffle_window,
        num_samples=task.size.num_images,
    )
    start = resume_position(task.run_uri) // config.data.crops_per_image
    plan = SequencePlan(
        task.train_shards,
        order,
        start,
        config.images_per_micro_batch,
        num_workers=config.scaling.num_workers,
    )
    plan = replace(plan, passes_per_block=passes_per_block(plan, _bytes_per_image(task, config)))
    in_cluster = config.data.decode == "cluster"
    return sequence_dataset(
        plan,
        decode=partial(decode_block, spec=view_spec(config), num_views=config.data.crops_per_image)
        if in_cluster
        else None,
    )


def _bytes_per_image(task: TrainTask, config: PretrainConfig) -> float:
    """On its way from a read task to a worker."""
    if config.data.decode == "cluster":
        height, width = config.model.img_size
        return height * width * config.model.in_chans * config.data.crops_per_image
    shards = task.train_shards
    return sum(s.num_bytes for s in shards) / sum(s.num_samples for s in shards)


def train_worker(arguments: dict[str, TrainTask]) -> None:
    """Ray Train's entry: runs in each worker, and again in each after one was lost."""
    task = arguments["task"]
    try:
        _Worker(task).train()
    except Exception as error:
        task.folder.record_failure(error)
        raise


class _Worker:
    def __init__(self, task: TrainTask) -> None:
        self.task = task
        self.config = config = PretrainConfig.model_validate(task.raw_config)
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(config.scaling.cpus_per_worker)
        torch.manual_seed(config.seed)
        self.mae = build_mae(config.model, config.masking, config.loss).to(self.device)
        self.optimizer = build_optimizer(self.mae, config.optim, fused=True)
        self.mean = torch.tensor(task.mean, device=self.device)
        self.std = torch.tensor(task.std, device=self.device)
        self.autocast_dtype = autocast_dtype(config.optim.precision, self.device)

    def train(self) -> None:
        first_step = self._restore()
        model = self._wrap(self.mae)
        task, config = self.task, self.config
        writer = None
        if self.rank == 0:
            logged = tracking.last_logged_step(config.tracking.uri, task.run_id, LOSS_METRIC)
            writer = tracking.MetricWriter(
                config.tracking.uri,
                task.run_id,
                after_step=logged,
                is_superseded=task.folder.is_superseded,
            )
            logger.info(
                "training from step %d on: %d workers, device=%s precision=%s",
                first_step,
                self.world_size,
                self.device.type,
                "bf16" if self.autocast_dtype else "fp32",
            )
        ends = StepEnds(
            task.channel,
            every_minutes=config.checkpoint.every_minutes,
            rank=self.rank,
            world_size=self.world_size,
        )
        reporter = StepReporter(
            task.size,
            config.reporting.every_steps,
            first_step,
            writer,
            ends,
            after=After(self._evaluation_steps(), EXPORT_S),
        )
        with ExitStack() as stack:
            if writer is not None:
                stack.callback(writer.close)
            trace = stack.enter_context(SampleTrace(config.debug.sample_trace, self.rank))
            batches = self._micro_batches(first_step, reporter, trace)
            ends.tell(Phase.TRAINING)
            for step in range(first_step + 1, task.size.total_steps + 1):
                self._step(model, step, batches, reporter)
                if writer is not None and self._is_due(step, config.reporting.picture_every_steps):
                    self._show(writer, step)
                decision = ends.decide(is_due=self._is_due(step, config.checkpoint.every_steps))
                if decision is not Decision.GO_ON:
                    hurried = decision is Decision.STOP
                    reporter.settle(task.folder, self.rank, self.world_size, is_hurried=hurried)
                    self._checkpoint(step)
                if decision is Decision.STOP:
                    ends.tell(Phase.STOPPED, step)
                    return
            ends.tell(Phase.MEASURING)
            if task.val_shards:
                self._evaluate(ends)

    def _evaluation_steps(self) -> float:
        """How many steps the closing evaluation about takes: its images seen as training ones."""
        task, config = self.task, self.config
        if not task.val_shards:
            return 0.0
        limits = ((task.train_shards, config.knn.max_train), (task.val_shards, config.knn.max_val))
        images = sum(min(sum(s.num_samples for s in shards), limit) for shards, limit in limits)
        return images / task.size.global_batch_size

    def _is_due(self, step: int, every_steps: int) -> bool:
        return step % every_steps == 0 or step == self.task.size.total_steps

    def _wrap(self, mae: MaskedAutoencoder) -> nn.Module:
        model: nn.Module = mae
        if self.config.optim.compile and self.device.type == "cuda":
            model = torch.compile(model)  # type: ignore[assignment]
        if self.world_size > 1:
            on_gpu = [self.device] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=on_gpu, forward_sync_buffers=False)
        return model

    def _restore(self) -> int:
        """Load the newest whole checkpoint, or the weights to start from; steps done so far."""
        with tempfile.TemporaryDirectory() as workspace:
            found = find_checkpoint(self.task.run_uri, Path(workspace))
            if found is not None:
                load_weights(found.folder, self.mae)
                load_training_state(found.folder, self.mae, self.optimizer)
                return found.manifest.step
            if self.task.init_uri is not None:
                start = fetch_checkpoint(self.task.init_uri, Path(workspace) / "init")
                load_weights(start.folder, self.mae)
        return 0

    def _step(
        self,
        model: nn.Module,
        step: int,
        batches: Iterator[MicroBatch],
        reporter: StepReporter,
    ) -> None:
        size, config = self.task.size, self.config
        learning_rate = warmup_cosine(
            step - 1,
            peak=config.optim.learning_rate,
            warmup_steps=config.optim.warmup_epochs
            * size.samples_per_epoch
            / size.global_batch_size,
            total_steps=size.total_steps,
        )
        metrics = pretrain_step(
            model,
            self.optimizer,
            batches,
            grad_accum_steps=size.global_batch_size
            // (config.optim.micro_batch_size * self.world_size),
            learning_rate=learning_rate,
            autocast_dtype=self.autocast_dtype,
        )
        reporter.add(step, metrics)
        if not reporter.is_due(step):
            return
        totals = reporter.report(
            step,
            learning_rate=learning_rate,
            grad_norm=metrics.grad_norm,
        )
        seen = (step - reporter.first_step) * size.images_per_step
        if too_many_bad(totals, seen, config.data.max_bad_ratio):
            reporter.save_bad_samples(self.task.folder, self.rank, self.world_size)
            raise bad_samples_error(totals, seen, config.data.max_bad_ratio, self.task.folder)

    def _micro_batches(
        self, first_step: int, reporter: StepReporter, trace: SampleTrace
    ) -> Iterator[MicroBatch]:
        config = self.config
        decoder = BatchDecoder(
            view_spec(config),
            config.masking,
            config.model.grid_size,
            config.scaling.cpus_per_worker,
            config.data.crops_per_image,
        )
        shard = ray.train.get_dataset_shard("train")
        rows = shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2)
        batches = decoder.batches(micro_batches(rows), BATCHES_AHEAD)
        size = self.task.size
        seen = first_step * size.images_per_step
        passes = 0
        while True:
            since = time.monotonic()
            batch = next(batches, None)
            reporter.waited_s += time.monotonic() - since
            if batch is None:
                return
            place = seen + (passes * self.world_size + self.rank) * config.images_per_micro_batch
            check_place(batch.rows, place, config.images_per_micro_batch, self.rank)
            reporter.count_bad(batch.bad)
            passes += 1
            per_pass = config.images_per_micro_batch * self.world_size
            came = batch.weights[:: config.data.crops_per_image] > 0  # of each one's first view
            step = 1 + (seen + (passes - 1) * per_pass) // size.images_per_step
            trace.write(batch.rows, came.tolist(), step)
            yield self._to_device(batch)

    def _to_device(self, batch: DecodedBatch) -> MicroBatch:
        """Whole numbers until here; floats come on the device."""
        on_gpu = self.device.type == "cuda"

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(self.device, non_blocking=True) if on_gpu else tensor

        full_scale = torch.iinfo(batch.pixels.dtype).max
        scaled = move(batch.pixels).float().div_(full_scale)
        images = ((scaled - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()
        return MicroBatch(images, move(batch.noise), move(batch.weights))

    def _evaluate(self, ends: StepEnds) -> None:
        """Nearest neighbours of the frozen encoder, and of the one that the run began with."""
        task, config = self.task, self.config
        torch.manual_seed(config.seed)
        untrained = build_mae(config.model, config.masking, config.loss).encoder.to(self.device)
        metrics = knn_metrics(
            {"top1": self.mae.encoder, "top1_untrained": untrained},
            task.train_shards,
            task.val_shards,
            ImageReader(
                config.model,
                task.mean,
                task.std,
                config.scaling.cpus_per_worker,
                task.class_numbers,
            ),
            config.knn,
            partial(ends.measured, "kNN evaluation"),
        )
        if metrics is not None:
            task.folder.write_evaluation(task.evaluation_key, metrics)

    def _show(self, writer: tracking.MetricWriter, step: int) -> None:
        """The reconstruction picture, to MLflow and into the run's folder."""
        picture = self._picture(step)
        writer.picture(picture, "reconstruction", step)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        self.task.folder.write_picture(buffer.getvalue())

    def _picture(self, step: int) -> npt.NDArray[np.uint8]:
        task = self.task
        images = torch.from_numpy(normalize(task.pictures.pixels, task.mean, task.std))
        noise = torch.from_numpy(task.pictures.noise.copy())  # Ray hands out read-only arrays
        result = reconstruct(self.mae, images.to(self.device), noise.to(self.device))
        return reconstruction_picture(
            images,
            result.pred.float().cpu(),
            result.mask.cpu(),
            patch_size=self.config.model.patch_size,
            norm_pix=self.config.loss.norm_pix,
            channel_mean=task.mean,
            channel_std=task.std,
            title=f"step {step}, loss {result.loss:.3f} on these training images",
        )

    def _checkpoint(self, step: int) -> None:
        """Commit on rank 0, then report on every rank, which waits for all of them."""
        size, config = self.task.size, self.config
        if self.rank == 0:
            record = CheckpointRecord(
                step=step,
                samples_seen=step * size.global_batch_size,
                epoch=step * size.global_batch_size / size.samples_per_epoch,
                total_steps=size.total_steps,
                seed=config.seed,
                data_digest=self.task.data_digest,
                channel_mean=self.task.mean,
                channel_std=self.task.std,
                model=config.model,
                masking=config.masking,
                loss=config.loss,
            )
            with tempfile.TemporaryDirectory() as local:
                save_checkpoint(Path(local), record, model=self.mae, optimizer=self.optimizer)
                uri = commit_checkpoint(
                    Path(local),
                    self.task.run_uri,
                    step=step,
                    keep=config.checkpoint.keep,
                    check=self.task.folder.check_start,
                )
            logger.info("checkpoint: %s", uri)
        # Without the checkpoint: the run's folder is the one list of them (docs/adr/0005).
        ray.train.report({"step": step, "samples_seen": step * size.global_batch_size})
