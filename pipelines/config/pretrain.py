"""The config of `mae pretrain`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from infra.config import StorageConfig, TrackingConfig
from mae_core.config import LossConfig, MaskingConfig, ModelConfig, OptimConfig, StrictConfig
from pipelines.config.roles import identity_digest
from pipelines.config.sections import (
    NAME_PATTERN,
    CheckpointConfig,
    DebugConfig,
    TrainScalingConfig,
    fitted_batches,
    fitted_window,
)


class DataConfig(StrictConfig):
    train: str | tuple[str, ...]
    """Training shards: a folder, an s3://bucket/prefix, a pattern with {000000..000099}.tar, a tar,
    or a list of these."""
    val: str | tuple[str, ...] | None = None
    """Held-out shards, in the same form: the model's health is measured on them and, if they and
    the training shards have labels (.cls), the kNN accuracy."""
    decode: Literal["worker", "cluster"] = "worker"
    """Where images are decoded: in the training workers, or by Ray Data tasks on CPU nodes."""
    shuffle_window: int = Field(default=1024, gt=0)
    """Number of samples that are shuffled together, after the shards; a multiple of the micro
    batch. The default is rounded up to one."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the image's area that a random crop covers."""
    flip: bool = True
    """Mirror half of the images."""
    crops_per_image: int = Field(default=1, gt=0)
    """Number of views cut from an image that is read and decoded once (repeated sampling, Hoffer
    et al. 2020, https://arxiv.org/abs/1901.09335). Batches and `optim.epochs` count views. Must
    divide the micro batch."""
    stats: Literal["data", "imagenet"] = "data"
    """Channel mean and standard deviation: the data's own, or ImageNet's."""
    max_bad_ratio: float = Field(default=0.01, ge=0, le=1)
    """The run stops if a larger share of the samples can't be decoded."""


class ReportingConfig(StrictConfig):
    every_steps: int = Field(default=10, gt=0)
    """Optimizer steps between metrics."""
    picture_every_steps: int = Field(default=500, gt=0)
    """Optimizer steps between reconstruction pictures; there is always one at the end."""


class KnnConfig(StrictConfig):
    k: int = Field(default=20, gt=0)
    """Number of neighbours that vote."""
    max_train: int = Field(default=10_000, gt=0)
    """Approximate number of labelled training images to search for neighbours, evenly spread."""
    max_val: int = Field(default=5_000, gt=0)
    """Approximate number of validation images to classify, evenly spread."""
    max_linear: int = Field(default=1000, ge=0)
    """Largest number of those training images that a linear probe is fitted to: on the features of
    the trained and the untrained encoder, and on the raw pixels. 0: no linear probe."""


HEALTH_PREFIX = "health/"  # of the names of its metrics
HealthMetric = Literal["health/loss", "health/knn", "health/rank"]


class HealthConfig(StrictConfig):
    every_epochs: float = Field(default=100, ge=0)
    """Epochs between two measurements of the model's health; there is always one at the end. 0
    measures nothing."""
    max_images: int = Field(default=1000, gt=0)
    """Approximate number of images that are measured: of data.val, or of data.train without it. For
    the kNN accuracy, as many labelled training images are searched."""


class KeepingConfig(CheckpointConfig):
    keep_best: HealthMetric | None = None
    """Also keep the checkpoint that is best by this metric: health/loss (the lowest), health/knn or
    health/rank (the highest). A run that starts from this one still takes its newest
    checkpoint."""


class PretrainConfig(StrictConfig):
    name: str = Field(default="pretrain", pattern=NAME_PATTERN)
    """Prefix of the run's name; a hash of all that determines the result follows."""
    seed: int = Field(default=0, ge=0)
    """Determines weights, order, crops, flips and masks."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    scaling: TrainScalingConfig = TrainScalingConfig()
    checkpoint: KeepingConfig = KeepingConfig()
    reporting: ReportingConfig = ReportingConfig()
    knn: KnnConfig = KnnConfig()
    health: HealthConfig = HealthConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    init_from: str | None = None
    """Weights (and nothing else) that the run starts from: a checkpoint of ours; a run's folder,
    whose newest checkpoint is used; run:latest or run:NAME, a finished pretraining run under
    storage.root; or weights from elsewhere (a file of the MAE authors or timm, a file or folder of
    Hugging Face). A path or an s3:// URI."""
    debug: DebugConfig = DebugConfig()

    @model_validator(mode="after")
    def _defaults_fit(self) -> Self:
        """Adapt the defaults to the user's values, so that a default is never the mistake."""
        optim = fitted_batches(self.optim, self.scaling.num_workers, self.data.crops_per_image)
        object.__setattr__(self, "optim", optim)  # the model is frozen
        images = optim.micro_batch_size // self.data.crops_per_image
        object.__setattr__(self, "data", fitted_window(self.data, images))
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        optim, workers = self.optim, self.scaling.num_workers
        per_pass = optim.micro_batch_size * workers
        if optim.global_batch_size % per_pass:
            raise ValueError(
                f"optim.global_batch_size={optim.global_batch_size} is not a multiple of "
                f"optim.micro_batch_size={optim.micro_batch_size} x scaling.num_workers={workers}"
            )
        if optim.micro_batch_size % self.data.crops_per_image:
            raise ValueError(
                f"optim.micro_batch_size={optim.micro_batch_size} is not a multiple of "
                f"data.crops_per_image={self.data.crops_per_image}"
            )
        if self.data.shuffle_window % self.images_per_micro_batch:
            raise ValueError(
                f"data.shuffle_window={self.data.shuffle_window} is not a multiple of the images "
                f"of a micro batch, {self.images_per_micro_batch}: optim.micro_batch_size="
                f"{optim.micro_batch_size} / data.crops_per_image={self.data.crops_per_image}"
            )
        return self

    @model_validator(mode="after")
    def _mask_fits_the_grid(self) -> Self:
        rows, columns = self.model.grid_size
        if self.masking.kind == "grid" and (rows % 2 or columns % 2):
            raise ValueError(
                f"masking.kind=grid needs an even number of patches a side, not {rows}x{columns}; "
                "change model.img_size or model.patch_size"
            )
        num_patches, ratio = self.model.num_patches, min(self.masking.ratios)
        if max(1, int(num_patches * (1 - ratio))) == num_patches:  # see `num_patches_kept`
            raise ValueError(
                f"masking.mask_ratio={ratio} removes none of {num_patches} patches of "
                f"model.patch_size={self.model.patch_size}"
            )
        return self

    @model_validator(mode="after")
    def _what_is_best_is_measured(self) -> Self:
        metric = self.checkpoint.keep_best
        if metric is not None and self.health.every_epochs == 0:
            raise ValueError(
                f"checkpoint.keep_best={metric} is not measured: health.every_epochs is 0"
            )
        if metric in ("health/loss", "health/knn") and self.data.val is None:
            raise ValueError(
                f"checkpoint.keep_best={metric} is measured on data.val, which is not given"
            )
        return self

    @property
    def images_per_micro_batch(self) -> int:
        return self.optim.micro_batch_size // self.data.crops_per_image

    @property
    def grad_accum_steps(self) -> int:
        """Number of forward passes of each worker in one optimizer step."""
        return self.optim.global_batch_size // (
            self.optim.micro_batch_size * self.scaling.num_workers
        )

    @property
    def run_name(self) -> str:
        """Name and a hash of all that determines the result: the same command, the same run."""
        values = self.model_dump(mode="json")
        if self.model.has_batch_norm:  # whose statistics are those of a micro batch
            values["split"] = [self.optim.micro_batch_size, self.scaling.num_workers]
        return f"{self.name}-{identity_digest('pretrain', values)}"
