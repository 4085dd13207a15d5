"""Learning rates are chosen on held labels, never on the validation set."""

import pytest

from mae_core.data.label_budget import LabelBudget
from mae_core.data.samples import DataError
from pipelines.config.arms import ArmKind
from pipelines.downstream.arms import Arm
from pipelines.downstream.trials import best_rate, held_rows, rates_table, trials_of


def make_arm(seed: int, rate: float | None = None, kind: ArmKind = ArmKind.FINETUNE) -> Arm:
    return Arm(kind, LabelBudget(0.1), seed, 10, 1, 0, rate)


TRIALS = [make_arm(seed, rate) for seed in (0, 1) for rate in (0.1, 0.3)]
SCORES = {
    trial: {"top1": top1} for trial, top1 in zip(TRIALS, (0.50, 0.40, 0.30, 0.60), strict=True)
}


def test_the_rate_with_the_best_mean_over_the_seeds_is_chosen() -> None:
    assert best_rate(TRIALS, SCORES, "top1") == 0.3  # 0.5 against 0.4


def test_of_equal_rates_the_first_is_chosen() -> None:
    equal = {trial: {"top1": 0.5} for trial in TRIALS}
    assert best_rate(TRIALS, equal, "top1") == 0.1


def test_a_rate_that_a_seed_could_not_measure_is_not_chosen() -> None:
    fewer = {trial: x for trial, x in SCORES.items() if trial != TRIALS[1]}
    assert best_rate(TRIALS, fewer, "top1") == 0.1
    with pytest.raises(DataError, match=r"finetune-0\.1-seed0-lr0\.1: no learning rate has a top1"):
        best_rate(TRIALS, {}, "top1")


def test_trials_are_of_the_same_kind_and_share() -> None:
    other = make_arm(0, 0.1, ArmKind.SCRATCH)
    share = make_arm(0, 0.1)._replace(budget=LabelBudget(1.0))
    assert trials_of([*TRIALS, other, share, make_arm(0)], make_arm(1)) == TRIALS


def test_the_held_rows_are_those_that_the_trial_does_not_train_on() -> None:
    arms = [make_arm(0, 0.1), make_arm(0)]
    held = held_rows(arms, [(range(2), [0, 4]), (range(3), [0, 2, 4])], arms[0])
    assert [part.tolist() for part in held] == [[2], [2]]


def test_the_table_says_what_was_chosen_and_why() -> None:
    arms = [*TRIALS, make_arm(0), make_arm(1), make_arm(0, kind=ArmKind.LOGISTIC)]
    assert rates_table(arms, SCORES, "top1").splitlines() == [
        "",
        "| arm | labels | chosen base_lr | top1 on held labels, by rate |",
        "|---|---|---|---|",
        "| finetune | 10 % | 0.3 | 0.1: 0.400, 0.3: 0.500 |",
    ]
    assert rates_table([make_arm(0)], {}, "top1") == ""
