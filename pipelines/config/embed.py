"""The config of `mae embed`."""

from typing import Literal

from pydantic import Field, field_validator

from infra.config import StorageConfig, TrackingConfig
from mae_core.config import StrictConfig, as_square
from pipelines.config.roles import identity_digest
from pipelines.config.sections import NAME_PATTERN, SavingConfig, ScalingConfig


class EmbedConfig(StrictConfig):
    name: str = Field(default="embed", pattern=NAME_PATTERN)
    """Starts the run's name; a hash of what determines the result ends it."""
    init_from: str
    """Checkpoint of the encoder, or a run's folder, whose newest is taken; a folder or URI."""
    data: str | tuple[str, ...]
    """Shards whose images are embedded."""
    features: Literal["mean", "cls", "grid"] = "mean"
    """What is kept of an image: the mean of the patch tokens, the class token, or every patch."""
    img_size: tuple[int, int] | None = None
    """Height and width that images are brought to; the checkpoint's where it is left out."""
    query: str | None = None
    """An image file whose like is looked for among the features (`mae embed search FILE`)."""
    num_neighbours: int = Field(default=10, gt=0)
    """Images that are shown for a query."""
    rows_per_file: int = Field(default=4096, gt=0)
    """Images in a Parquet file."""
    batch_size: int = Field(default=64, gt=0)
    """Images per forward pass."""
    max_bad_ratio: float = Field(default=0.01, ge=0, le=1)
    """The stage fails when a larger share of the images can't be used."""
    scaling: ScalingConfig = ScalingConfig()
    checkpoint: SavingConfig = SavingConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @field_validator("img_size", mode="before")
    @classmethod
    def _one_number_is_a_square(cls, raw: object) -> object:
        return as_square(raw)

    @property
    def run_name(self) -> str:
        return f"{self.name}-{identity_digest('embed', self.model_dump(mode='json'))}"
