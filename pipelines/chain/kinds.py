"""The kinds of stages in pipelines: config, code, data, and fields that do not change a result.

Imports no stage, so `mae plan` needs neither torch nor Ray.
"""

from typing import NamedTuple

from mae_core.config import StrictConfig
from pipelines.config.downstream import ClassifyConfig, DetectConfig, SegmentConfig
from pipelines.config.embed import EmbedConfig
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.roles import without_effect
from pipelines.config.validate import ValidateConfig


class StageKind(NamedTuple):
    """What the graph must know about a kind of stage to name its results."""

    config_type: type[StrictConfig]
    summary: str
    modules: tuple[str, ...]
    """Modules whose code determines the result, besides their imports from `chain.code`'s
    packages."""
    data_keys: tuple[str, ...]
    """Fields that name data: the content counts, not its location."""
    unkeyed: tuple[str, ...] = ()
    """Fields or whole sections that do not change the result."""
    version: int = 1
    """Increased by hand when the result changes although no counted code does."""
    headline: tuple[str, ...] = ()
    """Endings of the names of metrics that are shown in a table of stages."""


STEP_LOOP = "pipelines.training.process"
NUM_STEPS = "pipelines.config.steps"
TUNING_CODE = (STEP_LOOP, NUM_STEPS, "pipelines.config.arms")
TUNING_DATA = ("data.train", "data.val", "init_from")

KINDS: dict[str, StageKind] = {
    "prepare": StageKind(
        PrepareConfig,
        "Pack images into shards, or draw a small data set.",
        ("pipelines.prepare",),
        ("source", "annotations", "classes"),
        without_effect("prepare"),
    ),
    "validate": StageKind(
        ValidateConfig,
        "Check shards before they are trained on: schema, decoding, duplicates, labels, drift.",
        ("pipelines.validate",),
        ("data",),
        without_effect("validate"),
    ),
    "pretrain": StageKind(
        PretrainConfig,
        "Pretrain a masked autoencoder on shards.",
        (
            "pipelines.pretrain",
            "pipelines.training.pretrain_run",
            "pipelines.training.pretrain_task",
            STEP_LOOP,
            NUM_STEPS,
            "pipelines.training.knn",
        ),
        ("data.train", "data.val", "init_from"),
        without_effect("pretrain"),
        headline=("linear/top1", "linear/top1_untrained", "linear/top1_pixels"),
    ),
    "classify": StageKind(
        ClassifyConfig,
        "Classify with a pretrained encoder, compared with one trained from scratch.",
        ("pipelines.classify", *TUNING_CODE),
        TUNING_DATA,
        without_effect("classify"),
        headline=("/top1", "/auroc"),
    ),
    "detect": StageKind(
        DetectConfig,
        "Train a detector on a pretrained encoder.",
        ("pipelines.detect", *TUNING_CODE),
        TUNING_DATA,
        without_effect("detect"),
        headline=("/ap", "/ap50"),
    ),
    "embed": StageKind(
        EmbedConfig,
        "Write an encoder's features, or search the images most similar to IMAGE.",
        ("pipelines.embed",),
        ("data", "init_from"),
        without_effect("embed"),
        headline=("num_images",),
    ),
    "segment": StageKind(
        SegmentConfig,
        "Train a segmenter on a pretrained encoder.",
        ("pipelines.segment", *TUNING_CODE),
        TUNING_DATA,
        without_effect("segment"),
        headline=("/miou",),
    ),
}
