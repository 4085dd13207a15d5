"""What `mae validate` checks in shards, and the limits that it accepts."""

import hashlib
import json
from typing import Literal

from pydantic import Field

from infra.config import StorageConfig
from mae_core.config import StrictConfig
from pipelines.config.sections import NAME_PATTERN


class ValidateConfig(StrictConfig):
    name: str = Field(default="validate", pattern=NAME_PATTERN)
    """Name of the check in its output."""
    data: str | tuple[str, ...]
    """Shards to check: a folder, an s3://bucket/prefix, a pattern, a tar, or a list of these. The
    same image in two of them counts as a duplicate."""
    labels: Literal["none", "class", "boxes", "mask"] = "none"
    """What each sample must have: a number in .cls, boxes in .json, a mask in .seg.png."""
    num_classes: int | None = Field(default=None, gt=0)
    """Number of classes, N: class numbers are 0 to N - 1, and the category_ids of boxes 1 to N. By
    default they are not checked."""
    ignore_value: int | None = Field(default=255, ge=0)
    """Value of mask pixels that is not a class; null: each value is a class."""
    in_chans: int = Field(default=3, gt=0)
    """Channels to which images are decoded."""
    min_samples: int = Field(default=1, gt=0)
    """Smallest number of samples in total."""
    max_images: int = Field(default=2000, gt=0)
    """Approximate number of images to decode, from the start of each shard in proportion to its
    samples; the other images are only counted."""
    max_bad_ratio: float = Field(default=0.01, ge=0, le=1)
    """Largest accepted share of images that can't be decoded."""
    max_label_errors: float = Field(default=0.0, ge=0, le=1)
    """Largest accepted share of samples whose label is missing, unreadable or out of range."""
    max_duplicates: float = Field(default=0.01, ge=0, le=1)
    """Largest accepted share of images that repeat an earlier one byte for byte."""
    max_drift: float = Field(default=0.25, gt=0)
    """Largest accepted distance from `reference` of the channels' means (in standard deviations),
    their spreads (ratio less 1) and the class shares (half the sum of differences)."""
    reference: str | None = None
    """JSON file written by the last check that passed, and by this one if it passes: drift is
    measured against it. The first check has none."""
    workers: int = Field(default=2, gt=0)
    """Number of threads that read and decode."""
    storage: StorageConfig = StorageConfig()

    @property
    def run_name(self) -> str:
        """Name and a hash of the data to check."""
        text = json.dumps(self.data)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
