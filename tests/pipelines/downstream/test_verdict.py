"""What pretraining gives is said in one line, from differences that are paired by seed."""

import pytest

from mae_core.data.label_budget import LabelBudget
from pipelines.config.arms import ArmKind
from pipelines.downstream.arms import Arm
from pipelines.downstream.verdict import judge, verdict_picture

Found = dict[Arm, dict[str, float]]


def results(metric: str, fraction: float = 0.1, **values: list[float]) -> Found:
    """Arms by kind, with a value for each seed."""
    return {
        Arm(ArmKind[kind.upper()], LabelBudget(fraction), seed, 10, 1, 0): {metric: value}
        for kind, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    }


def test_a_clear_gain_is_said_with_its_standard_error_seeds_and_share() -> None:
    found = results("top1", finetune=[0.50, 0.62, 0.58], scratch=[0.40, 0.55, 0.47])
    verdict = judge(found, "top1", 10)
    assert verdict.texts == [
        "top1: pretraining +0.093 ± 0.012 over scratch (3 seeds, 10 % of labels)"
    ]
    assert verdict.metrics == pytest.approx(
        {"over_scratch/top1": 0.0933333, "over_scratch/top1_se": 0.0120185}, abs=1e-6
    )
    assert verdict.warnings == ()


def test_pairs_count_not_the_spread_of_the_seeds() -> None:
    """The seeds differ by 0.4, the differences by 0.02."""
    found = results("ap", 1.0, finetune=[0.11, 0.53], scratch=[0.10, 0.50])
    assert judge(found, "ap", 10).metrics == pytest.approx(
        {"over_scratch/ap": 0.02, "over_scratch/ap_se": 0.01}
    )


def test_a_difference_that_may_be_chance_is_no_gain() -> None:
    found = results("miou", finetune=[0.50, 0.62], scratch=[0.40, 0.61])
    (text,) = judge(found, "miou", 10).texts
    assert "pretraining +0.055 ± 0.045 over scratch (2 seeds, 10 % of labels): no gain" in text
    assert "what to try: pretrain longer" in text


def test_pretraining_that_does_not_help_is_told_so() -> None:
    found = results("top1", finetune=[0.40, 0.41], scratch=[0.50, 0.52])
    (text,) = judge(found, "top1", 10).texts
    assert "pretraining -0.105 ± 0.005 over scratch" in text
    assert "it does not help; what to try" in text


def test_one_seed_shows_nothing_about_the_spread() -> None:
    verdict = judge(results("top1", 1.0, finetune=[0.5], scratch=[0.4]), "top1", 10)
    assert verdict.texts == [
        "top1: pretraining +0.100 over scratch (1 seed, 100 % of labels); one seed shows nothing "
        "about the spread: give several seeds"
    ]
    assert verdict.metrics == pytest.approx({"over_scratch/top1": 0.1})


def test_untrained_is_compared_with_the_same_treatment_of_the_pretrained_encoder() -> None:
    words = {"finetune": [0.9, 0.9], "untrained": [0.3, 0.3]}
    frozen = judge(results("miou", **words, frozen=[0.5, 0.5]), "miou", 10)
    assert frozen.metrics["over_untrained/miou"] == pytest.approx(0.2)
    assert frozen.texts[0].endswith("over untrained (2 seeds, 10 % of labels), compared by frozen")
    logistic = judge(results("top1", **words, logistic=[0.6, 0.6]), "top1", 10)
    assert logistic.metrics["over_untrained/top1"] == pytest.approx(0.3)
    alone = judge(results("ap", **words), "ap", 10)
    assert alone.metrics["over_untrained/ap"] == pytest.approx(0.6)


def test_features_that_no_seed_changes_are_compared_with_every_seed() -> None:
    found = results("top1", 1.0, logistic=[0.5], untrained=[0.40, 0.44])
    assert judge(found, "top1", 10).metrics == pytest.approx(
        {"over_untrained/top1": 0.08, "over_untrained/top1_se": 0.02}
    )


def test_a_seed_that_one_arm_lacks_is_left_out() -> None:
    found = results("top1", finetune=[0.5, 0.6, 0.9], scratch=[0.4, 0.4])
    (comparison,) = judge(found, "top1", 10).compared
    assert comparison.differences == pytest.approx((0.1, 0.2))


def test_each_share_of_the_labels_has_a_verdict_of_its_own() -> None:
    found = results("top1", 0.01, finetune=[0.3], scratch=[0.1])
    found |= results("top1", 1.0, finetune=[0.8], scratch=[0.8])
    assert judge(found, "top1", 10).metrics == pytest.approx(
        {"over_scratch-0.01/top1": 0.2, "over_scratch-1/top1": 0.0}
    )


def test_arms_that_end_below_what_they_should_beat_are_named() -> None:
    found = results("top1", finetune=[0.33], logistic=[0.37], untrained=[0.44])
    warned = judge(found, "top1", 10).warnings
    assert [text.partition(" (")[0] for text in warned] == [
        "finetune ends at top1 0.330, below logistic at 0.370",
        "finetune ends at top1 0.330, below untrained at 0.440",
        "logistic ends at top1 0.370, below untrained at 0.440",
    ]
    assert "**Warning**: finetune ends at top1 0.330" in judge(found, "top1", 10).page


def test_a_run_without_a_pair_has_no_verdict() -> None:
    verdict = judge(results("top1", knn=[0.3], finetune=[0.5]), "top1", 10)
    assert (verdict.texts, verdict.metrics, verdict.page) == ([], {}, "")


def test_the_picture_shows_arms_and_differences() -> None:
    found = results("top1", finetune=[0.5, 0.6], scratch=[0.4, 0.4])
    both = verdict_picture(found, judge(found, "top1", 10), "title")
    alone = verdict_picture(results("top1", knn=[0.5]), judge({}, "top1", 10), "title")
    assert both.shape[1] > 1.3 * alone.shape[1]
    assert verdict_picture({}, judge({}, "top1", 10), "title").ndim == 3


def test_a_guess_is_not_a_result() -> None:
    found = results("top1", finetune=[0.103], logistic=[0.2])
    assert [text for text in judge(found, "top1", 10).warnings if "learned nothing" in text] == [
        "finetune ends at top1 0.103, where a guess is 0.100 (10 % of labels): it learned nothing; "
        "try more steps and other optim.base_lr"
    ]
    for metric, value in (("ap", 0.001), ("auroc", 0.502), ("miou", 0.101)):
        (text,) = judge(results(metric, frozen=[value]), metric, 10).warnings
        assert text.startswith(f"frozen ends at {metric} {value:.3f}, where a guess is")
    assert judge(results("top1", finetune=[0.103]), "top1", 100).warnings == ()


def test_a_classifier_that_ends_where_its_head_began_is_named() -> None:
    found = results("top1", finetune=[0.4005, 0.4], logistic=[0.4, 0.4], scratch=[0.38, 0.38])
    found |= results("top1", untrained=[0.35, 0.35])
    (text,) = judge(found, "top1", 10).warnings
    assert text.startswith("finetune ends where it began, at the top1 of logistic (10 % of labels)")


def test_scratch_below_untrained_is_named_because_it_flatters_pretraining() -> None:
    (text,) = judge(results("top1", scratch=[0.3], untrained=[0.4]), "top1", 10).warnings
    assert text.startswith("scratch ends at top1 0.300, below untrained at 0.400")
