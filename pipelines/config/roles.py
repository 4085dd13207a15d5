"""Which role each field of a stage's config plays for its result.

A test requires that every field of every stage is listed here exactly once. An unlisted field
counts as part of the result, so that forgetting one costs time but never gives a wrong number.
"""

import hashlib
import json
from collections.abc import Iterator
from enum import Enum
from typing import Any


class Role(Enum):
    IDENTITY = "identity"  # changes the result: another value is another run
    EVALUATION = "evaluation"  # changes how the trained model is measured: it is measured again
    NO_EFFECT = "no effect"  # how or where to run, or what to refuse: the result is the same


_SCALING = (
    "scaling.num_workers",
    "scaling.use_gpu",
    "scaling.cpus_per_worker",
    "scaling.max_failures",
)
_PLACES = ("storage.root", "tracking.uri", "tracking.experiment", "tracking.parent_run_id")
_SAVING = ("checkpoint.every_minutes", "checkpoint.grace_s")
_TRAINING = (*_SAVING, "checkpoint.every_steps", "checkpoint.keep", "reporting.every_steps")
_TRAINING_PLACES = (
    "name",
    *_SCALING,
    "scaling.checkpoint_activations",
    *_PLACES,
    *_TRAINING,
    "debug.sample_trace",
)

_START = ("init_from", "in_chans", "channel_mean", "channel_std")
_TUNING_IDENTITY = (
    *_START,
    "data.train",
    "data.val",
    "data.shuffle_window",
    "img_size",
    "optim.base_lr",
    "optim.global_batch_size",
    "optim.epochs",
    "optim.max_steps",
    "optim.warmup_epochs",
    "optim.min_lr_ratio",
    "optim.weight_decay",
    "optim.betas",
    "optim.layer_decay",
    "optim.head_lr_scale",
    "optim.drop_path_rate",
    "optim.max_grad_norm",
    "optim.precision",
)
_TUNING_NO_EFFECT = (*_TRAINING_PLACES, "optim.micro_batch_size", "data.max_bad_ratio")

_IDENTITY: dict[str, tuple[str, ...]] = {
    "prepare": (
        "source",
        "synthetic",
        "annotations",
        "classes",
        "existing",
        "split",
        "seed",
        "samples_per_shard",
        "max_shard_bytes",
        "transcode_short_side",
        "transcode_quality",
        "in_chans",
        "img_size",
        "num_train",
        "num_val",
    ),
    "validate": (
        "data",
        "labels",
        "num_classes",
        "ignore_value",
        "in_chans",
        "min_samples",
        "max_images",
        "max_bad_ratio",
        "max_label_errors",
        "max_duplicates",
        "max_drift",
        "reference",
    ),
    "pretrain": (
        "seed",
        "data.train",
        "data.shuffle_window",
        "data.crop_scale",
        "data.flip",
        "data.crops_per_image",
        "data.stats",
        "model.encoder",
        "model.img_size",
        "model.patch_size",
        "model.in_chans",
        "model.class_tokens",
        "model.decoder.kind",
        "model.decoder.dim",
        "model.decoder.depth",
        "model.decoder.num_heads",
        "model.decoder.prediction_ratio",
        "masking.kind",
        "masking.mask_ratio",
        "masking.cell",
        "loss.kind",
        "loss.fourier_weight",
        "loss.ssim_weight",
        "loss.norm_pix",
        "loss.norm_pix_floor",
        "optim.base_lr",
        "optim.global_batch_size",
        "optim.epochs",
        "optim.max_steps",
        "optim.warmup_epochs",
        "optim.weight_decay",
        "optim.betas",
        "optim.max_grad_norm",
        "optim.precision",
        "init_from",
    ),
    "classify": (
        *_TUNING_IDENTITY,
        "classify.label_fraction",
        "classify.labels_per_class",
        "classify.seeds",
        "classify.arms",
        "classify.labels",
        "classify.label_key",
        "classify.names",
        "classify.pool",
        "classify.head_start",
        "classify.trainable_blocks",
        "classify.linear_base_lr",
        "classify.k",
        "classify.crop_scale",
        "classify.eval_crop",
        "classify.flip",
        "classify.rand_augment",
        "classify.random_erase",
        "classify.mixup",
        "classify.cutmix",
        "classify.smoothing",
    ),
    "detect": (
        *_TUNING_IDENTITY,
        "detect.label_fraction",
        "detect.seeds",
        "detect.arms",
        "detect.head",
        "detect.categories",
        "detect.strides",
        "detect.channels",
        "detect.num_convs",
        "detect.conditioning",
        "detect.window",
        "detect.scale",
        "detect.flip",
    ),
    "segment": (
        *_TUNING_IDENTITY,
        "segment.label_fraction",
        "segment.seeds",
        "segment.arms",
        "segment.head",
        "segment.masks",
        "segment.names",
        "segment.values",
        "segment.ignore_value",
        "segment.boundary",
        "segment.stride",
        "segment.channels",
        "segment.conditioning",
        "segment.window",
        "segment.scale",
        "segment.flip",
        "segment.class_weights",
        "segment.overlap",
    ),
    "embed": (*_START, "data", "features", "img_size", "rows_per_file"),
}
_EVALUATION: dict[str, tuple[str, ...]] = {
    "pretrain": (
        "data.val",
        "knn.k",
        "knn.max_train",
        "knn.max_linear",
        "knn.max_val",
        "health.every_epochs",
        "health.max_images",
    ),
}
_NO_EFFECT: dict[str, tuple[str, ...]] = {
    "prepare": ("output", "workers", "max_bad_ratio"),
    "validate": ("name", "workers", "storage.root"),
    "pretrain": (
        *_TRAINING_PLACES,
        "data.decode",
        "data.max_bad_ratio",
        "optim.micro_batch_size",
        "optim.compile",
        "checkpoint.keep_best",
        "reporting.picture_every_steps",
    ),
    "classify": _TUNING_NO_EFFECT,
    "detect": _TUNING_NO_EFFECT,
    "segment": _TUNING_NO_EFFECT,
    "embed": (
        "name",
        *_SCALING,
        *_PLACES,
        *_SAVING,
        "query",
        "num_neighbours",
        "batch_size",
        "max_bad_ratio",
    ),
}
# Fields that were added after runs had been named, with the value that changes nothing. That value
# is left out of the hash, so that those runs keep their name.
_ADDED_LATER: dict[str, Any] = {
    "model.class_tokens": 1,
    "model.decoder.kind": "transformer",
    "loss.kind": "mse",
    "loss.fourier_weight": 0.0,
    "loss.ssim_weight": 0.0,
    "optim.head_lr_scale": 1.0,
    "segment.values": None,
    "segment.ignore_value": 255,
    "in_chans": None,
    "channel_mean": None,
    "channel_std": None,
}


def roles(kind: str) -> Iterator[tuple[str, Role]]:
    """Yield each listed field of a stage's config by its dotted key, with its role."""
    for role, table in (
        (Role.IDENTITY, _IDENTITY),
        (Role.EVALUATION, _EVALUATION),
        (Role.NO_EFFECT, _NO_EFFECT),
    ):
        for key in table.get(kind, ()):
            yield key, role


def without_effect(kind: str) -> tuple[str, ...]:
    """Return the fields that affect neither the stage's result nor how it is measured."""
    return _NO_EFFECT[kind]


def identity_digest(kind: str, config: dict[str, Any]) -> str:
    """Name the result that a config asks for, in 8 hex digits.

    Args:
        kind: Name of the stage.
        config: The model's JSON dump.
    """
    no_part = {key for key, role in roles(kind) if role is not Role.IDENTITY}
    text = json.dumps(_identity(config, "", no_part), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _identity(values: dict[str, Any], prefix: str, no_part: set[str]) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in no_part or (key in _ADDED_LATER and _ADDED_LATER[key] == value):
            continue
        if isinstance(value, dict):
            below = _identity(value, f"{key}.", no_part)
            # A section without fields that count is treated as absent.
            if below or not value:
                kept[name] = below
        else:
            kept[name] = value
    return kept
