"""The oracle is right where the grid of the head can be, and wrong where it can't."""

import numpy as np

from mae_core.data.label_maps import IGNORE, LabelMap
from mae_core.evaluation.segmentation_ceiling import oracle_classes


def oracle(truth: LabelMap, output_stride: int, **options: object) -> LabelMap:
    return oracle_classes(
        truth, output_stride=output_stride, crop=(16, 16), stride=(12, 12), **options
    )


def make_halves(height: int = 32, width: int = 40) -> LabelMap:
    truth = np.zeros((height, width), np.uint8)
    truth[:, width // 2 :] = 7
    return truth


def make_lines() -> LabelMap:
    """A line of one pixel in every four, whose class has a quarter of each cell of four pixels."""
    truth = np.zeros((16, 16), np.uint8)
    truth[:, ::4] = 1
    return truth


def test_a_grid_of_single_pixels_loses_nothing() -> None:
    truth = np.random.default_rng(0).integers(0, 5, (37, 21)).astype(np.uint8)
    assert np.array_equal(oracle(truth, 1), truth)


def test_areas_larger_than_a_place_are_right_but_for_their_edge() -> None:
    wrong = np.argwhere(oracle(make_halves(), 4) != make_halves())
    assert set(wrong[:, 1].tolist()) <= set(range(16, 24))


def test_what_is_finer_than_a_place_is_lost() -> None:
    truth = make_lines()
    assert (oracle(truth, 4) == 0).all()
    assert np.array_equal(oracle(truth, 1), truth)


def test_a_class_weight_lets_the_rarer_class_win() -> None:
    truth = make_lines()
    assert (oracle(truth, 4, class_weights=[1.0, 2.9]) == 0).all()
    assert (oracle(truth, 4, class_weights=[1.0, 3.1]) == 1).all()


def test_ignored_pixels_have_no_share() -> None:
    truth = make_halves()
    truth[::2] = IGNORE
    found = oracle(truth, 4)
    assert set(np.unique(found)) == {0, 7}
    assert (found[:, :16] == 0).all()
    assert (found[:, 24:] == 7).all()
    nothing = np.full((9, 9), IGNORE, np.uint8)
    assert np.array_equal(oracle(nothing, 4), nothing)


def test_a_picture_smaller_than_a_window_has_its_own_size() -> None:
    truth = make_halves(5, 11)
    assert oracle(truth, 4).shape == (5, 11)
