"""Evaluate a run's health curve: find the best step, and say what is wrong.

A point of the curve holds a step's metrics by their short names, such as `rank`; the names for the
untrained model end with `_untrained`. This module needs no torch, so a finished run is found at
once.
"""

from collections.abc import Mapping

from pipelines.config.pretrain import HEALTH_PREFIX, HealthMetric

UNTRAINED = "_untrained"
LOWER_IS_BETTER = ("health/loss",)

# Before this share of the steps, it is normal that features are worse than untrained ones: colour
# and brightness are learned first (docs/experiments.md).
JUDGED_FROM = 0.5
RANK_SHARE = 0.5  # share of the untrained encoder's rank, below which the rank has collapsed
DEAD_SHARE = 0.1
LOSS_RISE = 1.1  # increase over the lowest loss so far

Points = Mapping[int, Mapping[str, float]]


def best_step(points: Points, metric: HealthMetric, up_to: int) -> int | None:
    """Return the step with the best value up to a step; if several are equal, the first."""
    name = metric.removeprefix(HEALTH_PREFIX)
    values = {s: point[name] for s, point in sorted(points.items()) if name in point and s <= up_to}
    if not values:
        return None
    choose = min if metric in LOWER_IS_BETTER else max
    return choose(values, key=values.__getitem__)


def concerns(points: Points, step: int, total_steps: int) -> list[str]:
    """Describe in words what is wrong with the model after a step, and what may help."""
    if step < JUDGED_FROM * total_steps:
        return []
    point, found = points[step], []
    rank, untrained = point["rank"], point["rank" + UNTRAINED]
    if rank < RANK_SHARE * untrained:
        found.append(
            f"health: the features' effective rank is {rank:.1f}, less than half of the untrained "
            f"encoder's {untrained:.1f}: images differ in few directions. Train longer, or lower "
            "optim.base_lr"
        )
    dead = point["dead"]
    if dead > max(DEAD_SHARE, point["dead" + UNTRAINED]):
        found.append(
            f"health: {100 * dead:.0f}% of the features' dimensions are dead: they hardly differ "
            "between images. Lower optim.base_lr"
        )
    if "knn" in point and point["knn"] < point["knn" + UNTRAINED]:
        found.append(
            f"health: the kNN accuracy is {point['knn']:.3f}, below the untrained encoder's "
            f"{point['knn' + UNTRAINED]:.3f}. Train longer, or try another optim.base_lr, "
            "model.patch_size or loss.norm_pix"
        )
    earlier = [p["loss"] for s, p in points.items() if s < step and "loss" in p]
    if "loss" in point and earlier and point["loss"] > LOSS_RISE * min(earlier):
        found.append(
            f"health: the loss on held-out images has risen from {min(earlier):.3f} to "
            f"{point['loss']:.3f}: the model learns its training images by heart. Train for fewer "
            "epochs, or keep the best checkpoint by checkpoint.keep_best=health/loss"
        )
    return found
