"""The configs of pretraining and of packing, and the errors that a user's config can cause.

Imports no torch, Ray or MLflow: a mistake in a config is reported within a second.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from infra.config import StorageConfig, TrackingConfig
from mae_core.config import LossConfig, MaskingConfig, ModelConfig, OptimConfig, StrictConfig
from pipelines.config.roles import identity_digest

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of what becomes a folder


class ConfigError(ValueError):
    """The user's config can't run; says what, where, and what to try."""


class RefusedError(RuntimeError):
    """A gate refused; says what was found, as a table."""


class StageResult(NamedTuple):
    """What a stage made. Printed as the last line of stdout."""

    stage: str
    status: Literal["done", "reused", "evaluated"]  # evaluated: trained before, measured anew
    run_id: str | None  # MLflow's
    output: str  # URI of what the stage made
    metrics: dict[str, float]


class DataConfig(StrictConfig):
    train: str | tuple[str, ...]
    """Training shards: a folder, an s3://bucket/prefix, a pattern with {000000..000099}.tar, a tar,
    or a list of these."""
    val: str | tuple[str, ...] | None = None
    """Shards with labels (.cls) for the kNN evaluation at the end; likewise."""
    decode: Literal["worker", "cluster"] = "worker"
    """Where images are decoded: in the training workers, or in Ray Data tasks on CPU nodes."""
    shuffle_window: int = Field(default=1024, gt=0)
    """Samples permuted together, after the shards are permuted; a multiple of the micro batch. The
    default is rounded up to one."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Share of the image's area that a random crop covers, from and to."""
    flip: bool = True
    """Mirror half of the images."""
    crops_per_image: int = Field(default=1, gt=0)
    """Views of an image that is read and decoded once (repeated sampling, Hoffer et al. 2020,
    https://arxiv.org/abs/1901.09335). Batches and `optim.epochs` count views; divides the micro
    batch."""
    stats: Literal["data", "imagenet"] = "data"
    """Channel mean and standard deviation: the data's own, or ImageNet's."""
    max_bad_ratio: float = Field(default=0.01, ge=0, le=1)
    """The run stops when a larger share of the samples can't be decoded."""


class ScalingConfig(StrictConfig):
    num_workers: int = Field(default=1, gt=0)
    """Training processes; one GPU each with `use_gpu`."""
    use_gpu: bool = False
    """Train on GPUs."""
    cpus_per_worker: int = Field(default=1, gt=0)
    """CPUs that a worker reserves: its compute threads without a GPU, its decoding threads."""
    max_failures: int = Field(default=3, ge=0)
    """How many lost workers a run survives before it gives up; the same command then resumes."""


class SavingConfig(StrictConfig):
    every_minutes: float = Field(default=10, gt=0)
    """Most minutes between two savings of what is done."""
    grace_s: float = Field(default=30, gt=0)
    """Seconds that a run which is stopped may take to finish its step and save it. In a Ray job
    `ray job stop` kills after RAY_JOB_STOP_WAIT_TIME_S, three seconds unless the cluster sets
    another; the run then ends just before that."""


class CheckpointConfig(SavingConfig):
    every_steps: int = Field(default=500, gt=0)
    """Optimizer steps between checkpoints; there is always one at the end."""
    keep: int = Field(default=2, gt=0)
    """The newest checkpoints kept."""


class ReportingConfig(StrictConfig):
    every_steps: int = Field(default=10, gt=0)
    """Optimizer steps between metrics."""
    picture_every_steps: int = Field(default=500, gt=0)
    """Optimizer steps between reconstruction pictures; there is always one at the end."""


class KnnConfig(StrictConfig):
    k: int = Field(default=20, gt=0)
    """Neighbours that vote."""
    max_train: int = Field(default=10_000, gt=0)
    """About how many labelled training images to look for neighbours among, evenly spread."""
    max_val: int = Field(default=5_000, gt=0)
    """About how many validation images to classify, evenly spread."""


class DebugConfig(StrictConfig):
    sample_trace: str | None = None
    """Folder that gets rank-R.jsonl: a line for each sample trained on."""

    @field_validator("sample_trace")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        """The workers have a working folder of their own."""
        return None if path is None else str(Path(path).absolute())


ModelT = TypeVar("ModelT", bound=StrictConfig)


def fitted_batches(optim: ModelT, num_workers: int, crops_per_image: int) -> ModelT:
    """The section with the batch sizes that were not set such that they divide.

    A global batch is rounded up; a micro batch is the largest of at most its default.
    """
    values: Any = optim
    is_set, micro, batch = (
        optim.model_fields_set,
        values.micro_batch_size,
        values.global_batch_size,
    )
    if "micro_batch_size" not in is_set and micro % crops_per_image:
        micro = max(micro // crops_per_image, 1) * crops_per_image
    if "global_batch_size" not in is_set:
        batch = -(-batch // (micro * num_workers)) * micro * num_workers
    elif "micro_batch_size" not in is_set and batch % num_workers == 0:
        share = batch // num_workers
        sizes = range(crops_per_image, micro + 1, crops_per_image)
        micro = max((size for size in sizes if share % size == 0), default=micro)
    return optim.model_copy(update={"micro_batch_size": micro, "global_batch_size": batch})


def fitted_window(data: ModelT, images_per_micro_batch: int) -> ModelT:
    """The section with a `shuffle_window` that was not set as a multiple of the micro batch."""
    if "shuffle_window" in data.model_fields_set or images_per_micro_batch < 1:
        return data
    default_window: int = data.model_dump(include={"shuffle_window"})["shuffle_window"]
    window = -(-default_window // images_per_micro_batch) * images_per_micro_batch
    return data.model_copy(update={"shuffle_window": window})


class PretrainConfig(StrictConfig):
    name: str = Field(default="pretrain", pattern=NAME_PATTERN)
    """Starts the run's name; a hash of what determines the result ends it."""
    seed: int = Field(default=0, ge=0)
    """Fixes weights, order, crops, flips and masks."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    scaling: ScalingConfig = ScalingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    reporting: ReportingConfig = ReportingConfig()
    knn: KnnConfig = KnnConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    init_from: str | None = None
    """Checkpoint whose weights (only) the run starts from, or a run's folder, whose newest
    checkpoint is taken; a folder or URI."""
    debug: DebugConfig = DebugConfig()

    @model_validator(mode="after")
    def _defaults_fit(self) -> Self:
        """Fit what the user did not set to what they did: a default is never the mistake."""
        optim = fitted_batches(self.optim, self.scaling.num_workers, self.data.crops_per_image)
        object.__setattr__(self, "optim", optim)  # the model is frozen from here on
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
        if int(self.model.num_patches * (1 - self.masking.mask_ratio)) == self.model.num_patches:
            raise ValueError(
                f"masking.mask_ratio={self.masking.mask_ratio} removes none of "
                f"{self.model.num_patches} patches"
            )
        return self

    @property
    def images_per_micro_batch(self) -> int:
        return self.optim.micro_batch_size // self.data.crops_per_image

    @property
    def grad_accum_steps(self) -> int:
        """Forward passes of each worker in one optimizer step."""
        return self.optim.global_batch_size // (
            self.optim.micro_batch_size * self.scaling.num_workers
        )

    @property
    def run_name(self) -> str:
        """Name and a hash of all that determines the result: the same command, the same run."""
        return f"{self.name}-{identity_digest('pretrain', self.model_dump(mode='json'))}"


class PrepareConfig(StrictConfig):
    source: str | None = None
    """Images to pack: a folder, with or without one subfolder a class, or a list file with a path
    and, after a tab or a comma, a label on each line."""
    synthetic: Literal["shapes"] | None = None
    """Draw the images instead; makes the folders train and val in `output`."""
    annotations: str | None = None
    """Boxes of the images in `source`: a COCO file (instances_train.json), or a folder of the .xml
    files of PASCAL VOC."""
    classes: str | None = None
    """A folder that `mae prepare` has packed, whose numbers of classes and of boxes' categories
    this set gets too; so a validation set that lacks a class agrees with the training set."""
    existing: Literal["index", "stats"] | None = None
    """Pack nothing: read the tars that lie in `output`, and write their manifest with checksums and
    indexes beside them (index), with channel statistics over all images too (stats)."""
    output: str
    """Folder or s3://bucket/prefix for the shards."""
    split: str = Field(default="train", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Starts the names of the shards: train-000000.tar."""
    seed: int = Field(default=0, ge=0)
    """Fixes the order in which samples are packed, and the drawn images."""
    samples_per_shard: int = Field(default=1000, gt=0)
    """Most images in a shard."""
    max_shard_bytes: int = Field(default=256 * 2**20, gt=0)
    """Most bytes in a shard, unless one image is larger; each worker holds one shard in memory."""
    workers: int = Field(default=2, gt=0)
    """Processes that pack; the shards do not depend on it."""
    max_bad_ratio: float = Field(default=0.1, ge=0, le=1)
    """Packing fails when a larger share of the images can't be decoded."""
    transcode_short_side: int | None = Field(default=None, gt=0)
    """Pack JPEGs with the shorter side at most this many pixels, instead of the images' own
    bytes."""
    transcode_quality: int = Field(default=90, ge=1, le=100)
    """JPEG quality of transcoded images; full colour resolution from 90 on."""
    in_chans: int = Field(default=3, gt=0)
    """Channels that the images are decoded to and measured in: 1 grey, 3 colour, else their own."""
    img_size: int = Field(default=64, ge=16, le=1024)
    """Side of a drawn image, in pixels."""
    num_train: int = Field(default=3000, gt=0)
    """Images drawn for training."""
    num_val: int = Field(default=600, gt=0)
    """Images drawn for validation."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if [self.source, self.synthetic, self.existing].count(None) != 2:
            raise ValueError("give one of source=FOLDER, synthetic=shapes, existing=index or stats")
        if self.annotations is not None and self.source is None:
            raise ValueError("annotations needs source: the folder of the images")
        if self.classes is not None and self.source is None:
            raise ValueError("classes needs source: the folder of the images")
        return self
