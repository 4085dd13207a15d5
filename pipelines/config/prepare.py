"""The config of `mae prepare`."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mae_core.config import StrictConfig


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
