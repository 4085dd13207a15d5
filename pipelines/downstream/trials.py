"""Choose a learning rate of `optim.base_lr` by trials on a part of an arm's labels.

A trial trains like its arm, but without a held part of the arm's labelled images, and is then
measured on that part. The rate with the best mean over the seeds is used for that kind of arm with
that share of the labels. The validation set takes no part.

A trial is an arm of its own in the run's sequence, so a run that was stopped can resume within it,
and the choice depends only on stored results.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mae_core.data.samples import DataError
from pipelines.downstream.arms import Arm
from pipelines.reading.shards import Rows

Scores = Mapping[Arm, Mapping[str, float]]


def trials_of(arms: Sequence[Arm], arm: Arm) -> list[Arm]:
    """Return the trials of all seeds that decide an arm's learning rate."""
    return [
        other
        for other in arms
        if other.is_trial and (other.kind, other.budget) == (arm.kind, arm.budget)
    ]


def mean_scores(trials: Sequence[Arm], scores: Scores, metric: str) -> dict[float, float]:
    """Return the mean score of each rate that has a score for every seed."""
    by_rate: dict[float, list[float]] = {}
    lost: set[float] = set()
    for trial in trials:
        assert trial.tried_rate is not None
        score = scores.get(trial, {}).get(metric)
        if score is None:
            lost.add(trial.tried_rate)
        else:
            by_rate.setdefault(trial.tried_rate, []).append(score)
    return {rate: float(np.mean(x)) for rate, x in by_rate.items() if rate not in lost}


def best_rate(trials: Sequence[Arm], scores: Scores, metric: str) -> float:
    """Return the rate with the best mean score; of equal ones, the first in the config.

    Raises:
        DataError: no rate has a score for every seed.
    """
    means = mean_scores(trials, scores, metric)
    if not means:
        raise DataError(
            f"{trials[0].label}: no learning rate has a {metric} on the held images, so none can "
            "be chosen: give one optim.base_lr"
        )
    return max(means, key=lambda rate: means[rate])


def held_rows(
    arms: Sequence[Arm], rows: Sequence[tuple[Rows, ...]], trial: Arm
) -> tuple[Rows, ...]:
    """Return the rows of a trial's arm on which the trial does not train."""
    arm = trial._replace(tried_rate=None)
    whole = next(r for a, r in zip(arms, rows, strict=True) if a.label == arm.label)
    kept = rows[arms.index(trial)]
    return tuple(
        np.setdiff1d(np.asarray(all_rows), np.asarray(part))
        for all_rows, part in zip(whole, kept, strict=True)
    )


def rates_table(arms: Sequence[Arm], scores: Scores, metric: str) -> str:
    """Write a table of the rates and their scores on the held images; "" without trials."""
    lines = []
    for arm in dict.fromkeys(a._replace(seed=0, first_step=0, steps=0) for a in arms):
        trials = trials_of(arms, arm)
        if arm.is_trial or not trials:
            continue
        means = mean_scores(trials, scores, metric)
        tried = ", ".join(f"{rate:g}: {mean:.3f}" for rate, mean in means.items())
        best = f"{best_rate(trials, scores, metric):g}" if means else "none"
        lines.append(f"| {arm.kind} | {arm.budget.text} | {best} | {tried} |")
    if not lines:
        return ""
    head = (
        f"| arm | labels | chosen base_lr | {metric} on held labels, by rate |\n|---|---|---|---|\n"
    )
    return "\n" + head + "\n".join(dict.fromkeys(lines)) + "\n"
