"""Sections that the configs of several stages share.

The configs import no torch, Ray or MLflow, so a mistake in one is reported within a second.
"""

from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from mae_core.config import StrictConfig

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"  # for names that become folders


class ScalingConfig(StrictConfig):
    num_workers: int = Field(default=1, gt=0)
    """Number of training processes, each with its own GPU if `use_gpu` is set."""
    use_gpu: bool = False
    """Train on GPUs."""
    cpus_per_worker: int = Field(default=1, gt=0)
    """CPUs reserved by each worker, for decoding threads and, without a GPU, compute threads."""
    max_failures: int = Field(default=3, ge=0)
    """Number of lost workers, or of errors that may pass, that a run survives before it fails; the
    same command then resumes. One worker without a cluster is the command's own process: if it is
    lost, the command ends."""


class TrainScalingConfig(ScalingConfig):
    checkpoint_activations: bool = False
    """Save memory: compute the activations of transformer blocks again in the backward pass instead
    of keeping them. A step takes about a third longer, and its result is the same."""


class StartConfig(StrictConfig):
    """What a stage starts from that uses an encoder."""

    init_from: str
    """The encoder: a checkpoint of ours; a run's folder, whose newest checkpoint is used;
    run:latest or run:NAME, a finished pretraining run under storage.root; or weights from elsewhere
    (a file of the MAE authors or timm, a file or folder of Hugging Face). A path or an s3:// URI.
    It determines the encoder's size and channels."""
    in_chans: int | None = Field(default=None, gt=0)
    """Channels of the images, if the encoder takes another number: its first convolution is then
    summed or repeated, as timm does. By default the encoder's."""
    channel_mean: tuple[float, ...] | None = None
    """Mean of each channel, for pixels of 0 to 1. By default the checkpoint's, or
    ImageNet's for weights from elsewhere that do not state it."""
    channel_std: tuple[float, ...] | None = None
    """Standard deviation of each channel; give it together with `channel_mean`."""

    @model_validator(mode="after")
    def _statistics_fit(self) -> Self:
        mean, std = self.channel_mean, self.channel_std
        if (mean is None) != (std is None):
            raise ValueError("channel_mean and channel_std: give both or none")
        if mean is None or std is None:
            return self
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(
                f"channel_mean={list(mean)} and channel_std={list(std)}: give a value for each "
                "channel, and deviations above 0"
            )
        if self.in_chans is not None and len(mean) != self.in_chans:
            raise ValueError(f"channel_mean has {len(mean)} values for in_chans={self.in_chans}")
        return self


class SavingConfig(StrictConfig):
    every_minutes: float = Field(default=10, gt=0)
    """Largest number of minutes between two saves."""
    grace_s: float = Field(default=30, gt=0)
    """Seconds that a stopped run may take to finish its step and save it. In a Ray job,
    `ray job stop` kills after RAY_JOB_STOP_WAIT_TIME_S, three seconds unless the cluster sets
    another value; the run then ends just before that."""


class CheckpointConfig(SavingConfig):
    every_steps: int = Field(default=500, gt=0)
    """Optimizer steps between checkpoints; there is always one at the end."""
    keep: int = Field(default=2, gt=0)
    """Number of newest checkpoints to keep."""


class DebugConfig(StrictConfig):
    sample_trace: str | None = None
    """Folder for rank-R.jsonl, with a line for each sample trained on."""

    @field_validator("sample_trace")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        """Make the path absolute, because the workers have another working folder."""
        return None if path is None else str(Path(path).absolute())


ModelT = TypeVar("ModelT", bound=StrictConfig)


def fitted_batches(optim: ModelT, num_workers: int, crops_per_image: int) -> ModelT:
    """Return the section with batch sizes that divide, changing only those that were not set.

    A global batch is rounded up; a micro batch becomes the largest one up to its default.
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
    """Return the section with an unset `shuffle_window` made a multiple of the micro batch."""
    if "shuffle_window" in data.model_fields_set or images_per_micro_batch < 1:
        return data
    default_window: int = data.model_dump(include={"shuffle_window"})["shuffle_window"]
    window = -(-default_window // images_per_micro_batch) * images_per_micro_batch
    return data.model_copy(update={"shuffle_window": window})
