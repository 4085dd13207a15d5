import pytest
import torch

from mae_core.evaluation.feature_health import feature_health


def test_two_equal_directions_are_a_rank_of_two() -> None:
    features = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    health = feature_health(features)
    assert health.rank == pytest.approx(2.0)
    assert health.dead_share == pytest.approx(1 / 3)
    assert health.mean_share == 0.0


def test_the_rank_of_unequal_directions_by_hand() -> None:
    # Singular values 3 and 1 (times the root of 2): entropy of 3/4 and 1/4.
    features = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])
    assert feature_health(features).rank == pytest.approx(1.7547654)


def test_the_mean_takes_power_but_no_rank() -> None:
    features = torch.tensor([[1.0, 2], [-1, 2], [1, 2], [-1, 2]])
    health = feature_health(features)
    assert health.mean_share == pytest.approx(0.8)  # 4 of 5
    assert health.rank == pytest.approx(1.0)


def test_images_that_are_all_alike_have_no_rank_and_all_dimensions_are_dead() -> None:
    assert feature_health(torch.full((5, 4), 0.5)) == (0.0, 1.0, 1.0)
    assert feature_health(torch.zeros(5, 4)) == (0.0, 1.0, 1.0)


def test_a_dimension_that_hardly_moves_is_dead() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 4, generator=generator)
    features[:, 1] *= 0.001
    features[:, 2] *= 0.1
    assert feature_health(features).dead_share == 0.25
