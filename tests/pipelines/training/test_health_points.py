"""Which point of a health curve is the best, and what is said where something is wrong."""

import pytest

from pipelines.config.pretrain import HealthMetric
from pipelines.training.health_points import best_step, concerns

GOOD = {
    "loss": 0.5,
    "loss_untrained": 1.2,
    "knn": 0.5,
    "knn_untrained": 0.3,
    "rank": 20.0,
    "rank_untrained": 10.0,
    "dead": 0.0,
    "dead_untrained": 0.0,
    "mean_share": 0.5,
    "mean_share_untrained": 0.7,
}


@pytest.mark.parametrize(
    ("metric", "up_to", "step"),
    [
        ("health/loss", 40, 20),  # the lowest
        ("health/knn", 40, 10),  # the first of two that are equal
        ("health/rank", 40, 40),  # the highest
        ("health/rank", 30, 10),  # as it was after step 30
        ("health/rank", 5, None),
    ],
)
def test_the_best_step_by_a_metric(metric: HealthMetric, up_to: int, step: int | None) -> None:
    points = {
        10: {"loss": 0.9, "knn": 0.4, "rank": 6.0},
        20: {"loss": 0.7, "knn": 0.4, "rank": 5.0},
        40: {"loss": 0.8, "knn": 0.3, "rank": 7.0},
    }
    assert best_step(points, metric, up_to) == step


def test_a_metric_that_was_never_measured_has_no_best_step() -> None:
    assert best_step({10: {"rank": 6.0}}, "health/loss", 10) is None


def test_a_healthy_model_costs_no_words() -> None:
    assert concerns({80: GOOD, 100: {**GOOD, "loss": 0.54}}, 100, 100) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 4.9}, "effective rank is 4.9, less than half of the untrained encoder's 10.0"),
        ({"dead": 0.25}, "25% of the features' dimensions are dead"),
        ({"knn": 0.29}, "kNN accuracy is 0.290, below the untrained encoder's 0.300"),
        ({"loss": 0.56}, "held-out images has risen from 0.500 to 0.560"),
    ],
)
def test_what_is_wrong_is_said_once_half_the_steps_are_done(
    changes: dict[str, float], words: str
) -> None:
    points = {40: GOOD, 60: {**GOOD, **changes}}
    (text,) = concerns(points, 60, 100)
    assert words in text
    assert concerns(points, 60, 200) == []


def test_a_model_without_held_out_images_is_judged_by_its_features() -> None:
    features = {name: x for name, x in GOOD.items() if not name.startswith(("loss", "knn"))}
    assert concerns({100: features}, 100, 100) == []
    (text,) = concerns({100: {**features, "rank": 1.0}}, 100, 100)
    assert "effective rank" in text
