"""The stages that a pipeline is made of: config, code, data, and what does not change a result.

Imports no stage: `mae plan` needs neither torch nor Ray.
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
    """What the graph must know of a stage to name its result."""

    config_type: type[StrictConfig]
    summary: str
    modules: tuple[str, ...]
    """Whose code determines the result, besides what they import of `chain.code`'s packages."""
    data_keys: tuple[str, ...]
    """Fields that name data: what lies there counts, and not where it lies."""
    unkeyed: tuple[str, ...] = ()
    """Fields, or whole sections, that say how and where, not what."""
    version: int = 1
    """Raised by hand where the result changes and no code that counts does."""
    headline: tuple[str, ...] = ()
    """Ends of the names of the metrics that are worth a place in a table of stages."""


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
            "pipelines.training.pretrain_worker",
            "pipelines.training.knn",
        ),
        ("data.train", "data.val", "init_from"),
        without_effect("pretrain"),
        headline=("knn/top1", "knn/top1_untrained"),
    ),
    "classify": StageKind(
        ClassifyConfig,
        "Classify with a pretrained encoder, beside one from scratch.",
        ("pipelines.classify",),
        TUNING_DATA,
        without_effect("classify"),
        headline=("/top1", "/auroc"),
    ),
    "detect": StageKind(
        DetectConfig,
        "Train a detector on a pretrained encoder.",
        ("pipelines.detect",),
        TUNING_DATA,
        without_effect("detect"),
        headline=("/ap", "/ap50"),
    ),
    "embed": StageKind(
        EmbedConfig,
        "Write an encoder's features, or search IMAGE: find what is like it.",
        ("pipelines.embed",),
        ("data", "init_from"),
        without_effect("embed"),
        headline=("num_rows",),
    ),
    "segment": StageKind(
        SegmentConfig,
        "Train a segmenter on a pretrained encoder.",
        ("pipelines.segment",),
        TUNING_DATA,
        without_effect("segment"),
        headline=("/miou",),
    ),
}
