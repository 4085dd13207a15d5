"""What `mae validate` checks of shards, and what it lets pass."""

import hashlib
import json
from typing import Literal

from pydantic import Field

from infra.config import StorageConfig
from mae_core.config import StrictConfig
from pipelines.config.sections import NAME_PATTERN


class ValidateConfig(StrictConfig):
    name: str = Field(default="validate", pattern=NAME_PATTERN)
    """Of the check, in its output."""
    data: str | tuple[str, ...]
    """Shards to check: a folder, an s3://bucket/prefix, a pattern, a tar, or a list of these. An
    image that is in two of them counts as a duplicate."""
    labels: Literal["none", "class", "boxes", "mask"] = "none"
    """What each sample must have: a number in .cls, boxes in .json, a mask in .seg.png."""
    num_classes: int | None = Field(default=None, gt=0)
    """Classes are 0 to this less 1, category_id of boxes 1 to this; unchecked where left out."""
    ignore_value: int | None = Field(default=255, ge=0)
    """Value of a mask's pixels that is no class; null: each value is one."""
    in_chans: int = Field(default=3, gt=0)
    """Channels that images are decoded to."""
    min_samples: int = Field(default=1, gt=0)
    """Fewest samples in all."""
    max_images: int = Field(default=2000, gt=0)
    """About how many images are decoded, evenly from all shards; sizes of the rest count."""
    max_bad_ratio: float = Field(default=0.01, ge=0, le=1)
    """Largest share of images that can't be decoded."""
    max_label_errors: float = Field(default=0.0, ge=0, le=1)
    """Largest share of samples whose label is missing, can't be read or is out of range."""
    max_duplicates: float = Field(default=0.01, ge=0, le=1)
    """Largest share of images that are byte for byte one that came before."""
    max_drift: float = Field(default=0.25, gt=0)
    """Farthest that the channels' means (in standard deviations), their spreads (as a ratio less
    1) and the shares of the classes (half the sum of differences) may be from `reference`."""
    reference: str | None = None
    """JSON file that the last check that passed left, and this one will: drift is measured from
    there. The first check has none."""
    workers: int = Field(default=2, gt=0)
    """Threads that read and decode."""
    storage: StorageConfig = StorageConfig()

    @property
    def run_name(self) -> str:
        """Name and a hash of which data is checked."""
        text = json.dumps(self.data)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
