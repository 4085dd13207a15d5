"""Measure the model's health during training, and compare it with that of the untrained model.

The workers measure it after a step, always on the same images and with the same masks; rank 0
stores the results in the run's folder. A run that was stopped finds its earlier results there, so
its curve is the same as without the stop.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from mae_core.config import MaskingConfig
from mae_core.data.manifest import ShardInfo
from mae_core.data.randomness import named_generator
from mae_core.evaluation.feature_health import feature_health
from mae_core.evaluation.reconstruction import reconstruction_losses
from mae_core.masking import draw_noise
from mae_core.model.mae import MaskedAutoencoder
from pipelines.config.pretrain import PretrainConfig
from pipelines.training.health_points import UNTRAINED, best_step, concerns
from pipelines.training.knn import (
    ROWS_PER_READ,
    ImageReader,
    LabelledFeatures,
    Measure,
    accuracy_of,
    features_of,
    shared_features,
    spread_slices,
)
from pipelines.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

T = TypeVar("T")


class HealthData(NamedTuple):
    """The images on which health is measured."""

    train: Sequence[ShardInfo]
    # Held out; if empty, neither the loss nor the kNN accuracy is measured.
    val: Sequence[ShardInfo]
    has_labels: bool  # if False, no kNN accuracy is measured
    reader: ImageReader


class HealthWatch:
    """Measures a run's health and keeps its points. Every rank has one and calls it alike.

    Args:
        config: the run's.
        folder: the run's, where the points are kept.
        key: names all that the points are computed from, besides the model.
        data: see `HealthData`.
        build_untrained: builds the model that the run's seed gives.
    """

    def __init__(
        self,
        config: PretrainConfig,
        folder: RunFolder,
        key: str,
        data: HealthData,
        build_untrained: Callable[[], MaskedAutoencoder],
    ) -> None:
        self._config = config
        self._folder = folder
        self._key = key
        self._data = data
        self._build_untrained = build_untrained
        self._points: dict[int, dict[str, float]] | None = None  # loaded at the first measurement

    def measure(self, mae: MaskedAutoencoder, step: int, total_steps: int) -> dict[str, float]:
        """Measure the model after a step and store the result; return it on every rank."""
        points = self._known_points()
        found = next((x for x in points.values()), {})
        untrained = {name: x for name, x in found.items() if name.endswith(UNTRAINED)}
        models = {"": mae} if untrained else {"": mae, UNTRAINED: self._build_untrained()}
        measured = measure_health(models, self._data, self._config)
        point = from_first_rank(None if measured is None else untrained | measured)
        points[step] = point
        if measured is not None:
            self._folder.write_health(self._key, points)
            logger.info(
                "health at step %d (untrained): %s",
                step,
                ", ".join(
                    f"{name}={value:.3f} ({point[name + UNTRAINED]:.3f})"
                    for name, value in point.items()
                    if not name.endswith(UNTRAINED)
                ),
            )
            for text in concerns(points, step, total_steps):
                logger.warning("%s", text)
        return point

    def best_step(self, step: int) -> int | None:
        """Return the best step up to this one, if the config asks to keep its checkpoint."""
        metric = self._config.checkpoint.keep_best
        return None if metric is None else best_step(self._points or {}, metric, step)

    def _known_points(self) -> dict[int, dict[str, float]]:
        if self._points is None:
            is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
            there = self._folder.read_health(self._key) if is_first else None
            self._points = from_first_rank(there)
        return self._points


def from_first_rank(value: T | None) -> T:
    """Return rank 0's value on every rank. Every rank must call this."""
    values = [value]
    if torch.distributed.is_initialized():
        world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        values = [None] * world_size
        torch.distributed.all_gather_object(values, value if rank == 0 else None)
    assert values[0] is not None
    return values[0]


def measure_health(
    models: Mapping[str, MaskedAutoencoder], data: HealthData, config: PretrainConfig
) -> dict[str, float] | None:
    """Measure each model; return None on all ranks but the first.

    Args:
        models: by what is appended to the names of their metrics.
        data: see `HealthData`.
        config: the run's.
    """
    limit = config.health.max_images
    reader = data.reader._replace(needs_labels=data.has_labels)
    encoders = {f"features{end}": features_of(mae.encoder) for end, mae in models.items()}
    measures = dict(encoders)
    if data.val:
        noise = fixed_noise(config)
        measures |= {f"loss{end}": _losses_of(mae, noise) for end, mae in models.items()}
    seen = shared_features(
        measures, spread_slices(data.val or data.train, limit), reader, lambda _: None
    )
    bank = None
    if data.has_labels:
        slices = spread_slices(data.train, limit)
        bank = shared_features(encoders, slices, reader, lambda _: None)
    if seen is None:
        return None
    return {
        name + end: value for end in models for name, value in _metrics(end, seen, bank, config)
    }


def _metrics(
    end: str, seen: LabelledFeatures, bank: LabelledFeatures | None, config: PretrainConfig
) -> list[tuple[str, float]]:
    """Return the metrics whose names end with the model's suffix."""
    metrics: list[tuple[str, float]] = []
    losses = seen.features.get(f"loss{end}")
    if losses is not None:
        metrics.append(("loss", float(losses.double().mean())))
    if bank is not None:
        k = min(config.knn.k, len(bank.labels))
        metrics.append(("knn", accuracy_of(f"features{end}", bank, seen, k=k)))
    health = feature_health(seen.features[f"features{end}"])
    return [
        *metrics,
        ("rank", health.rank),
        ("dead", health.dead_share),
        ("mean_share", health.mean_share),
    ]


def fixed_noise(config: PretrainConfig) -> Tensor:
    """Draw the noise of the masks, (ROWS_PER_READ, L), which is the same at every step of a run."""
    masking: MaskingConfig = config.masking
    rows = [
        draw_noise(
            named_generator(config.seed, "health", i),
            config.model.grid_size,
            kind=masking.kind,
            mask_ratio=masking.last_ratio,
            cell=masking.cell,
        )
        for i in range(ROWS_PER_READ)
    ]
    return torch.from_numpy(np.stack(rows))


def _losses_of(mae: MaskedAutoencoder, noise: Tensor) -> Measure:
    device = next(mae.parameters()).device
    moved = noise.to(device)
    return lambda images: reconstruction_losses(mae, images.to(device), moved[: len(images)])
