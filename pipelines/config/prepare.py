"""The config of `mae prepare`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mae_core.config import StrictConfig


class PrepareConfig(StrictConfig):
    source: str | None = None
    """Images to pack: a folder, with or without one subfolder per class, or a list file. Each line
    of a list has a path and optionally, after a tab or a comma, a label."""
    synthetic: Literal["shapes"] | None = None
    """Draw the images instead of packing existing ones, into the folders train and val in
    `output`."""
    annotations: str | None = None
    """Boxes of the images in `source`: a COCO file (instances_train.json), or a folder of the .xml
    files of PASCAL VOC."""
    classes: str | None = None
    """A folder packed by `mae prepare`, whose numbers of classes and box categories this set
    reuses. So a validation set that lacks a class agrees with the training set."""
    existing: Literal["index", "stats"] | None = None
    """Pack nothing, but read the tars in `output` and write beside them a manifest with checksums
    and indexes (index), and also channel statistics over all images (stats)."""
    output: str
    """Folder or s3://bucket/prefix for the shards."""
    split: str = Field(default="train", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """Prefix of the shards' names: train-000000.tar."""
    seed: int = Field(default=0, ge=0)
    """Determines the order in which samples are packed, and the drawn images."""
    samples_per_shard: int = Field(default=1000, gt=0)
    """Largest number of images in a shard."""
    max_shard_bytes: int = Field(default=256 * 2**20, gt=0)
    """Largest size of a shard in bytes, unless a single image is larger; each worker holds one
    shard in memory."""
    workers: int = Field(default=2, gt=0)
    """Number of packing processes; the shards do not depend on it."""
    max_bad_ratio: float = Field(default=0.1, ge=0, le=1)
    """Packing fails if a larger share of the images can't be decoded."""
    transcode_short_side: int | None = Field(default=None, gt=0)
    """Pack JPEGs whose shorter side has at most this many pixels, instead of the original
    files."""
    transcode_quality: int = Field(default=90, ge=1, le=100)
    """JPEG quality of transcoded images, with full colour resolution from 90 on."""
    in_chans: int = Field(default=3, gt=0)
    """Channels to which images are decoded for statistics: 1 grey, 3 colour, other numbers must
    match the images."""
    img_size: int = Field(default=64, ge=16, le=1024)
    """Side of a drawn image, in pixels."""
    num_train: int = Field(default=3000, gt=0)
    """Number of images drawn for training."""
    num_val: int = Field(default=600, gt=0)
    """Number of images drawn for validation."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if [self.source, self.synthetic, self.existing].count(None) != 2:
            raise ValueError("give one of source=FOLDER, synthetic=shapes, existing=index or stats")
        if self.annotations is not None and self.source is None:
            raise ValueError("annotations needs source: the folder of the images")
        if self.classes is not None and self.source is None:
            raise ValueError("classes needs source: the folder of the images")
        return self
