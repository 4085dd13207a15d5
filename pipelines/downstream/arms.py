"""The arms of a run: which there are, on which samples they train, and how they are compared.

One run compares several arms. They are trained one after another, as one sequence of samples and
steps.
"""

import logging
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from mae_core.data.label_subset import stratified_subset
from mae_core.data.manifest import Manifest
from pipelines.config.arms import PREFERRED_OUTPUT, ArmKind
from pipelines.config.downstream import DownstreamConfig
from pipelines.config.steps import needed_steps
from pipelines.reading.shards import Rows

logger = logging.getLogger(__name__)


class Arm(NamedTuple):
    """One way to train, with one share of the labels and one seed."""

    kind: ArmKind
    fraction: float  # share of the labelled samples
    seed: int
    num_samples: int  # chosen
    steps: int  # optimizer steps; 0 where nothing is trained
    first_step: int  # steps of the arms before

    @property
    def label(self) -> str:
        """The arm's name in files and metrics, such as `finetune-0.1-seed0`."""
        return f"{self.kind}-{self.fraction:g}-seed{self.seed}"

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps


def arm_of_step(arms: Sequence[Arm], step: int) -> Arm:
    """Return the arm that an optimizer step is of; steps count from 1, through all arms."""
    return next(arm for arm in arms if arm.first_step < step <= arm.last_step)


def plan_arms(
    config: DownstreamConfig, train: Manifest, strata: Sequence[Hashable]
) -> list[tuple[Arm, tuple[Rows, ...]]]:
    section, optim = config.section, config.optim
    planned: list[tuple[Arm, tuple[Rows, ...]]] = []
    step = 0
    for fraction in sorted(section.label_fraction):
        for seed in section.seeds:
            rows = _rows(train, strata, fraction, seed)
            num_samples = sum(map(len, rows))
            for kind in section.kinds:
                is_trained = section.takes_steps(kind)
                is_fixed = kind.is_pretrained and not is_trained and fraction == 1
                if is_fixed and seed != section.seeds[0]:
                    continue  # nothing in it depends on the seed
                steps = 0
                if is_trained:
                    steps = needed_steps(config.optim, num_samples, "labelled samples")
                planned.append((Arm(kind, fraction, seed, num_samples, steps, step), rows))
                step += steps
    logger.info(
        "plan: %d arms, %d steps in all of global batch %d = micro batch %d x %d workers x %d",
        len(planned),
        step,
        optim.global_batch_size,
        optim.micro_batch_size,
        config.scaling.num_workers,
        optim.global_batch_size // (optim.micro_batch_size * config.scaling.num_workers),
    )
    return planned


def _rows(
    train: Manifest, strata: Sequence[Hashable], fraction: float, seed: int
) -> tuple[Rows, ...]:
    counts = [shard.num_samples for shard in train.shards]
    if fraction == 1:
        return tuple(range(count) for count in counts)
    chosen = stratified_subset(strata, fraction, seed)
    ends = np.cumsum(counts)
    return tuple(
        chosen[(chosen >= end - count) & (chosen < end)] - (end - count)
        for count, end in zip(counts, ends, strict=True)
    )


def kept_arm(arms: Sequence[Arm]) -> Arm | None:
    """Choose the arm whose model is the run's output: the one with the most labels of its kind."""
    for kind in PREFERRED_OUTPUT:
        if candidates := [arm for arm in arms if arm.kind is kind]:
            return max(candidates, key=lambda arm: arm.fraction)
    return None


def mean_metrics(found: dict[Arm, dict[str, float]]) -> dict[str, float]:
    """`arm/metric`, or `arm-fraction/metric` where there are several: the mean over the seeds.

    With `_std` of several seeds' standard deviation (n - 1).
    """
    several = len({arm.fraction for arm in found}) > 1
    values: dict[str, list[float]] = {}
    for arm, metrics in found.items():
        name = f"{arm.kind}-{arm.fraction:g}" if several else str(arm.kind)
        for metric, value in metrics.items():
            values.setdefault(f"{name}/{metric}", []).append(value)
    means = {key: float(np.mean(seeds)) for key, seeds in values.items()}
    spreads = {
        f"{key}_std": float(np.std(seeds, ddof=1))
        for key, seeds in values.items()
        if len(seeds) > 1
    }
    return means | spreads


def arms_table(found: dict[Arm, dict[str, float]]) -> str:
    """Return a row for each arm and share of the labels: mean and deviation over the seeds."""
    metrics = list(dict.fromkeys(metric for values in found.values() for metric in values))
    grouped: dict[tuple[ArmKind, float], list[dict[str, float]]] = {}
    for arm, values in found.items():
        grouped.setdefault((arm.kind, arm.fraction), []).append(values)
    lines = [f"| arm | labels | {' | '.join(metrics)} |", "|---|---|" + "---|" * len(metrics)]
    for (kind, fraction), seeds in grouped.items():
        cells = [_mean_and_spread([s[m] for s in seeds if m in s]) for m in metrics]
        lines.append(f"| {kind} | {100 * fraction:g} % | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"
