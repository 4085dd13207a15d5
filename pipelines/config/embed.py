"""The config of `mae embed`."""

from typing import Literal

from pydantic import Field, field_validator

from infra.config import StorageConfig, TrackingConfig
from mae_core.config import as_square
from pipelines.config.roles import identity_digest
from pipelines.config.sections import NAME_PATTERN, SavingConfig, ScalingConfig, StartConfig


class EmbedConfig(StartConfig):
    name: str = Field(default="embed", pattern=NAME_PATTERN)
    """Prefix of the run's name; a hash of all that determines the result follows."""
    data: str | tuple[str, ...]
    """Shards whose images are encoded."""
    features: Literal["mean", "cls", "grid"] = "mean"
    """Output per image: the mean of the patch tokens, the class token, or every patch token."""
    img_size: tuple[int, int] | None = None
    """Height and width to which images are resized; by default the checkpoint's."""
    query: str | None = None
    """An image file whose most similar images are searched (`mae embed search FILE`)."""
    num_neighbours: int = Field(default=10, gt=0)
    """Number of images shown for a query."""
    rows_per_file: int = Field(default=4096, gt=0)
    """Number of images in a Parquet file."""
    batch_size: int = Field(default=64, gt=0)
    """Images per forward pass."""
    max_bad_ratio: float = Field(default=0.01, ge=0, le=1)
    """The stage fails if a larger share of the images can't be used."""
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
