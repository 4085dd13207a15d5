"""Plan the arms of a run: what is trained on which samples, and how results are compared.

One run compares several arms. They are trained one after another, as one sequence of samples and
steps.
"""

import logging
from collections.abc import Hashable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.data.label_budget import LabelBudget
from mae_core.data.label_subset import stratified_subset
from mae_core.data.manifest import Manifest
from mae_core.data.randomness import named_generator
from pipelines.config.arms import PREFERRED_OUTPUT, ArmKind
from pipelines.config.downstream import DownstreamConfig
from pipelines.config.steps import HELD_SHARE, needed_steps
from pipelines.outcome import ConfigError
from pipelines.reading.shards import Rows

logger = logging.getLogger(__name__)


class Arm(NamedTuple):
    """One way to train, with some of the labels and one seed."""

    kind: ArmKind
    budget: LabelBudget
    seed: int
    num_samples: int  # number of samples chosen
    steps: int  # optimizer steps; 0 where nothing is trained
    first_step: int  # number of steps of all arms before this one
    tried_rate: float | None = None  # only for a trial: see `pipelines.downstream.trials`

    @property
    def label(self) -> str:
        """The arm's name in files and metrics, such as `finetune-0.1-seed0`."""
        name = f"{self.kind}-{self.budget}-seed{self.seed}"
        return name if self.tried_rate is None else f"{name}-lr{self.tried_rate:g}"

    @property
    def is_trial(self) -> bool:
        return self.tried_rate is not None

    @property
    def last_step(self) -> int:
        return self.first_step + self.steps


def arm_of_step(arms: Sequence[Arm], step: int) -> Arm:
    """Return the arm to which an optimizer step belongs; steps count from 1 through all arms."""
    return next(arm for arm in arms if arm.first_step < step <= arm.last_step)


def plan_arms(
    config: DownstreamConfig, train: Manifest, strata: Sequence[Hashable]
) -> list[tuple[Arm, tuple[Rows, ...]]]:
    """List the arms in the order in which they are trained, with their rows of each shard.

    With several learning rates, the trials of a label budget come before its arms.
    """
    section, optim = config.section, config.optim
    planned: list[tuple[Arm, tuple[Rows, ...]]] = []
    step = 0

    def add(arm: Arm, rows: tuple[Rows, ...]) -> None:
        nonlocal step
        planned.append((arm._replace(num_samples=sum(map(len, rows)), first_step=step), rows))
        step += arm.steps

    for budget in sorted(section.label_budgets):
        chosen = {seed: stratified_subset(strata, budget, seed) for seed in section.seeds}
        if len(optim.rates) > 1:
            for seed, kind, rate in product(section.seeds, section.kinds, optim.rates):
                if section.uses_base_lr(kind):
                    kept = np.setdiff1d(chosen[seed], held_part(strata, chosen[seed], seed))
                    steps = needed_steps(optim, len(kept), "labelled samples without the held ones")
                    rows = _rows(train, kept)
                    add(Arm(kind, budget, seed, 0, steps, 0, rate), rows)
        for seed in section.seeds:
            rows = _rows(train, chosen[seed])
            for kind in section.kinds:
                is_trained = section.takes_steps(kind)
                is_fixed = kind.is_pretrained and not is_trained and budget.is_all
                if is_fixed and seed != section.seeds[0]:
                    continue  # nothing in this arm depends on the seed
                steps = 0
                if is_trained:
                    steps = needed_steps(optim, len(chosen[seed]), "labelled samples")
                add(Arm(kind, budget, seed, 0, steps, 0), rows)
    _tell_plan(config, [arm for arm, _ in planned])
    return planned


def _tell_plan(config: DownstreamConfig, arms: Sequence[Arm]) -> None:
    optim, total = config.optim, sum(arm.steps for arm in arms)
    logger.info(
        "plan: %d arms, %d steps in all of global batch %d = micro batch %d x %d workers x %d",
        sum(not arm.is_trial for arm in arms),
        total,
        optim.global_batch_size,
        optim.micro_batch_size,
        config.scaling.num_workers,
        optim.global_batch_size // (optim.micro_batch_size * config.scaling.num_workers),
    )
    if trials := [arm for arm in arms if arm.is_trial]:
        logger.info(
            "plan: %d of the steps (%.0f %%) are %d trials, which choose the learning rate of each "
            "arm from %s on a held fifth of its labels",
            sum(arm.steps for arm in trials),
            100 * sum(arm.steps for arm in trials) / total,
            len(trials),
            ", ".join(f"{rate:g}" for rate in optim.rates),
        )


def held_part(
    strata: Sequence[Hashable], chosen: npt.NDArray[np.int64], seed: int
) -> npt.NDArray[np.int64]:
    """Choose the samples on which learning rates are compared: a fifth of each class.

    A class of two to four samples gives one, and a class of one sample none.

    Raises:
        ConfigError: no sample can be held.
    """
    members: dict[Hashable, list[int]] = {}
    for place in chosen.tolist():
        members.setdefault(strata[place], []).append(place)
    held: list[int] = []
    for stratum, places in members.items():
        count = max(int(HELD_SHARE * len(places)), int(len(places) > 1))
        shuffled = named_generator(seed, "held", str(stratum)).permutation(places)
        held += shuffled[:count].tolist()
    if not held:
        raise ConfigError(
            "optim.base_lr lists several rates, and choosing one needs two labelled samples of a "
            "class or more: give one rate"
        )
    return np.sort(np.asarray(held, dtype=np.int64))


def _rows(train: Manifest, chosen: npt.NDArray[np.int64]) -> tuple[Rows, ...]:
    """Split the places of samples in all shards into rows of each shard."""
    counts = [shard.num_samples for shard in train.shards]
    if len(chosen) == sum(counts):
        return tuple(range(count) for count in counts)
    ends = np.cumsum(counts)
    return tuple(
        chosen[(chosen >= end - count) & (chosen < end)] - (end - count)
        for count, end in zip(counts, ends, strict=True)
    )


def kept_arm(arms: Sequence[Arm]) -> Arm | None:
    """Choose the arm whose model is the run's output: of its kind, the one with most labels."""
    for kind in PREFERRED_OUTPUT:
        if candidates := [arm for arm in arms if arm.kind is kind]:
            return max(candidates, key=lambda arm: arm.budget)
    return None


def mean_metrics(found: dict[Arm, dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the seeds.

    It is named `arm/metric`, or `arm-budget/metric` if there are several budgets. For several
    seeds, their standard deviation (n - 1) is added with the suffix `_std`.
    """
    several = len({arm.budget for arm in found}) > 1
    values: dict[str, list[float]] = {}
    for arm, metrics in found.items():
        name = f"{arm.kind}-{arm.budget}" if several else str(arm.kind)
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
    """Return a table with a row for each arm and budget: mean and deviation over the seeds."""
    metrics = list(dict.fromkeys(metric for values in found.values() for metric in values))
    grouped: dict[tuple[ArmKind, LabelBudget], list[dict[str, float]]] = {}
    for arm, values in found.items():
        grouped.setdefault((arm.kind, arm.budget), []).append(values)
    lines = [f"| arm | labels | {' | '.join(metrics)} |", "|---|---|" + "---|" * len(metrics)]
    for (kind, budget), seeds in grouped.items():
        cells = [_mean_and_spread([s[m] for s in seeds if m in s]) for m in metrics]
        lines.append(f"| {kind} | {budget.text} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{np.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.3f}"
