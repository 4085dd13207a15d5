"""Define pretraining as a task of a training process: its model, batches, loss and pictures."""

import io
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch
from PIL import Image
from torch import Tensor, nn

from infra import tracking
from mae_core.checkpoint import load_starting_weights
from mae_core.checkpoint_manifest import CheckpointRecord
from mae_core.data.manifest import ShardInfo
from mae_core.data.order import RunOrder
from mae_core.data.pixels import Pixels
from mae_core.data.views import normalize
from mae_core.evaluation.reconstruction import reconstruct, reconstruction_picture
from mae_core.model.mae import MaskedAutoencoder, build_mae
from mae_core.optim import build_optimizer, warmup_cosine
from mae_core.train_step import BatchLoss, MicroBatch, pretrain_loss
from pipelines.config.pretrain import HEALTH_PREFIX, PretrainConfig
from pipelines.config.steps import warmup_steps
from pipelines.reading.batches import BatchDecoder, DecodedBatch, decode_block, view_spec
from pipelines.reading.class_names import Numbers
from pipelines.reading.sequence import SequencePlan, passes_per_block, sequence_dataset
from pipelines.training.checkpoints import resume_position
from pipelines.training.health import HealthData, HealthWatch
from pipelines.training.knn import ImageReader, knn_metrics
from pipelines.training.process import Process, StepOptions, Trained
from pipelines.training.ray_channel import RayChannel
from pipelines.training.reporting import After, RunSize
from pipelines.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 2
EXPORT_S = 10.0  # about what logging the encoder to MLflow takes


class Pictures(NamedTuple):
    """The images and masks of the reconstruction picture."""

    pixels: Pixels  # (B, H, W, C)
    noise: npt.NDArray[np.float32]  # (B, L)


class WholeRun(NamedTuple):
    """The one part that pretraining trains."""

    seed: int
    steps: int
    label: str = "pretrain"
    first_step: int = 0

    @property
    def last_step(self) -> int:
        return self.steps


class PretrainJob(NamedTuple):
    """Everything that a worker must know."""

    config: PretrainConfig
    run_uri: str
    init_uri: str | None  # checkpoint whose weights the run starts from
    start: str  # see RunFolder
    run_id: str | None  # in MLflow
    size: RunSize
    data_digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pictures: Pictures
    train_shards: tuple[ShardInfo, ...]
    val_shards: tuple[ShardInfo, ...]  # held out; may be empty
    class_numbers: Numbers
    has_labels: bool  # whether the held-out and the training images have labels
    evaluation_key: str  # see RunFolder.write_evaluation

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run_uri, self.start)

    @property
    def channel(self) -> RayChannel:
        return RayChannel(self.start)

    def build_task(self, process: Process) -> "PretrainTask":
        return PretrainTask(self, process)


def remaining_data(job: PretrainJob) -> ray.data.Dataset:
    """Return the rest of the run's sequence, from the newest complete checkpoint on."""
    config = job.config
    order = RunOrder(
        counts=np.asarray([shard.num_samples for shard in job.train_shards], dtype=np.int64),
        seed=config.seed,
        window=config.data.shuffle_window,
        num_samples=job.size.num_images,
    )
    start = resume_position(job.run_uri) // config.data.crops_per_image
    plan = SequencePlan(
        job.train_shards,
        order,
        start,
        config.images_per_micro_batch,
        num_workers=config.scaling.num_workers,
    )
    plan = replace(plan, passes_per_block=passes_per_block(plan, _bytes_per_image(job)))
    decode = None
    if config.data.decode == "cluster":
        views = config.data.crops_per_image
        decode = partial(decode_block, spec=view_spec(config), num_views=views)
    return sequence_dataset(plan, decode=decode)


def _bytes_per_image(job: PretrainJob) -> float:
    """Return the size of an image on its way from a read task to a worker."""
    config, shards = job.config, job.train_shards
    if config.data.decode == "cluster":
        height, width = config.model.img_size
        return height * width * config.model.in_chans * config.data.crops_per_image
    return sum(s.num_bytes for s in shards) / sum(s.num_samples for s in shards)


class PretrainTask:
    """See `pipelines.training.process.TrainingTask`."""

    def __init__(self, job: PretrainJob, process: Process) -> None:
        self.job = job
        self.config = config = job.config
        self.process = process
        self.parts = (WholeRun(config.seed, job.size.total_steps),)
        self.options = StepOptions(
            config.optim.max_grad_norm,
            config.optim.compile,
            keeps_activations=not config.scaling.checkpoint_activations,
        )
        self.mean = torch.tensor(job.mean, device=process.device)
        self.std = torch.tensor(job.std, device=process.device)
        reader = ImageReader(
            config.model, job.mean, job.std, config.scaling.cpus_per_worker, job.class_numbers
        )
        self.reader = reader
        self.health = HealthWatch(
            config,
            job.folder,
            job.evaluation_key,
            HealthData(job.train_shards, job.val_shards, job.has_labels, reader),
            self._build_untrained,
        )
        self._logged_step: int | None = None  # last step whose health is in MLflow; looked up once

    def size(self, part: WholeRun) -> RunSize:
        return self.job.size

    def after(self, part: WholeRun) -> After:
        """Count the images of the final evaluation as if they were trained on."""
        job, knn, health = self.job, self.config.knn, self.config.health
        limits = []
        if job.has_labels:
            limits = [(job.train_shards, knn.max_train), (job.val_shards, knn.max_val)]
        if health.every_epochs:
            limits += [(job.train_shards, health.max_images), (job.val_shards, health.max_images)]
        images = sum(min(sum(s.num_samples for s in shards), limit) for shards, limit in limits)
        return After(images / job.size.global_batch_size, EXPORT_S)

    def is_measured(self, part: WholeRun) -> bool:
        """Return False, because the driver starts workers only if there is work left."""
        return False

    def build(self, part: WholeRun, *, is_resumed: bool) -> Trained:
        mae = self._build_untrained()
        if self.job.init_uri is not None and not is_resumed:
            folder = self.process.fetch(self.job.init_uri)
            load_starting_weights(folder, mae, is_verified=True)
        return Trained(mae, build_optimizer(mae, self.config.optim, fused=True))

    def _build_untrained(self) -> MaskedAutoencoder:
        """Build the model that the seed determines, the same on every worker."""
        config = self.config
        torch.manual_seed(config.seed)
        mae = build_mae(config.model, config.masking, config.loss)
        return mae.to(self.process.device)

    def learning_rate(self, part: WholeRun, step: int) -> float:
        size, optim = self.job.size, self.config.optim
        return warmup_cosine(
            step - 1,
            peak=optim.learning_rate,
            warmup_steps=warmup_steps(optim, size.samples_per_epoch, size.total_steps),
            total_steps=size.total_steps,
        )

    def decoded(self, tables: Iterable[pa.Table]) -> Iterator[DecodedBatch]:
        config = self.config
        decoder = BatchDecoder(
            view_spec(config),
            config.masking,
            config.model.grid_size,
            config.scaling.cpus_per_worker,
            config.data.crops_per_image,
            self._ratio_at_position,
        )
        return decoder.batches(tables, BATCHES_AHEAD)

    def batch(self, decoded: DecodedBatch, part: WholeRun, *, step: int, number: int) -> MicroBatch:
        """Move the integers to the device, and convert them to normalised floats there."""
        device = self.process.device

        def move(tensor: Tensor) -> Tensor:
            is_gpu = device.type == "cuda"
            return tensor.pin_memory().to(device, non_blocking=True) if is_gpu else tensor

        full_scale = torch.iinfo(decoded.pixels.dtype).max
        scaled = move(decoded.pixels).float().div_(full_scale)
        images = ((scaled - self.mean) / self.std).permute(0, 3, 1, 2).contiguous()
        ratio = None
        if self.config.masking.is_scheduled:
            ratio = self.config.masking.ratio_at(step, self.job.size.total_steps)
        return MicroBatch(images, move(decoded.noise), move(decoded.weights), ratio)

    def _ratio_at_position(self, position: int) -> float:
        """Return the share of patches that is removed at the step that reads this position."""
        size = self.job.size
        step = position // size.images_per_step + 1
        return self.config.masking.ratio_at(step, size.total_steps)

    def loss(self, model: nn.Module, batch: MicroBatch, part: WholeRun) -> BatchLoss:
        return pretrain_loss(model, batch)

    def show(
        self, model: nn.Module, part: WholeRun, step: int, writer: tracking.MetricWriter
    ) -> None:
        """Write the reconstruction picture to MLflow and into the run's folder."""
        if step % self.config.reporting.picture_every_steps and step != part.last_step:
            return
        picture = self._picture(model, step)
        writer.picture(picture, "reconstruction", step)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        self.job.folder.write_picture(buffer.getvalue())

    def _picture(self, model: nn.Module, step: int) -> npt.NDArray[np.uint8]:
        job, device = self.job, self.process.device
        assert isinstance(model, MaskedAutoencoder)
        images = torch.from_numpy(normalize(job.pictures.pixels, job.mean, job.std))
        noise = torch.from_numpy(job.pictures.noise.copy())  # Ray hands out read-only arrays
        result = reconstruct(model, images.to(device), noise.to(device))
        return reconstruction_picture(
            images,
            result.pred.float().cpu(),
            result.mask.cpu(),
            patch_size=self.config.model.patch_size,
            norm_pix_floor=self.config.loss.target_floor,
            channel_mean=job.mean,
            channel_std=job.std,
            title=f"step {step}, loss {result.loss:.3f} on these training images",
        )

    def watch(
        self, model: nn.Module, part: WholeRun, step: int, writer: tracking.MetricWriter | None
    ) -> bool:
        """Measure the model's health at its interval; `measure` does it after the last step."""
        size, every_epochs = self.job.size, self.config.health.every_epochs
        every = max(1, round(every_epochs * size.samples_per_epoch / size.global_batch_size))
        if every_epochs == 0 or step % every or step == part.last_step:
            return False
        assert isinstance(model, MaskedAutoencoder)
        point = self.health.measure(model, step, part.steps)
        if writer is not None:
            metrics = {HEALTH_PREFIX + name: value for name, value in point.items()}
            writer.write(metrics, step, after_step=self._last_logged())
        return self.health.best_step(step) == step

    def _last_logged(self) -> int:
        """Return the last step whose health an earlier start logged to MLflow.

        A worker that was killed may have logged the loss of later steps than the health.
        """
        if self._logged_step is None:
            uri, run_id = self.config.tracking.uri, self.job.run_id
            metric = f"{HEALTH_PREFIX}rank"
            self._logged_step = tracking.last_logged_step(uri, run_id, metric)
        return self._logged_step

    def best_step(self, step: int) -> int | None:
        return self.health.best_step(step)

    def record(self, part: WholeRun, step: int) -> CheckpointRecord:
        size, config = self.job.size, self.config
        samples_seen = step * size.global_batch_size
        return CheckpointRecord(
            step=step,
            samples_seen=samples_seen,
            epoch=samples_seen / size.samples_per_epoch,
            total_steps=size.total_steps,
            seed=config.seed,
            data_digest=self.job.data_digest,
            channel_mean=self.job.mean,
            channel_std=self.job.std,
            model=config.model,
            masking=config.masking,
            loss=config.loss,
        )

    def measure(self, part: WholeRun, model: nn.Module) -> None:
        """Compare the frozen encoder with the untrained one by nearest neighbours and by health."""
        job, config = self.job, self.config
        if not job.evaluation_key:
            return
        assert isinstance(model, MaskedAutoencoder)
        metrics: dict[str, float] = {}
        if config.health.every_epochs:
            point = self.health.measure(model, part.last_step, part.steps)
            metrics |= {HEALTH_PREFIX + name: value for name, value in point.items()}
        if job.has_labels:
            found = knn_metrics(
                {"top1": model.encoder, "top1_untrained": self._build_untrained().encoder},
                job.train_shards,
                job.val_shards,
                self.reader,
                config.knn,
                partial(self.process.tell_measured, "kNN evaluation"),
            )
            metrics |= found or {}
        if self.process.rank == 0:
            job.folder.write_evaluation(job.evaluation_key, metrics)
