"""Scores are checked by hand or by slow code; pictures by their pixels."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mae_core.data.label_maps import IGNORE, LabelMap, instances_to_classes
from mae_core.evaluation.segmentation import (
    InstanceMatches,
    confusion_counts,
    foreground_iou,
    instance_f1,
    scores_from_counts,
    segmentation_picture,
)

NAMES = ("ground", "house", "tree")
# Of a picture of 32-pixel images: enlarged 8 times, under title and column titles.
TILE, TOP, GUTTER = 256, 65, 6
RED, WHITE = (255, 0, 0), (255, 255, 255)

Pixels = npt.NDArray[np.uint8]


def slow_counts(prediction: torch.Tensor, truth: torch.Tensor, num_classes: int) -> list[list[int]]:
    counts = [[0] * num_classes for _ in range(num_classes)]
    for p, t in zip(prediction.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if t != 255:
            counts[t][p] += 1
    return counts


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("num_classes", [1, 2, 30])
def test_counts_are_those_of_a_loop_over_the_pixels(dtype: torch.dtype, num_classes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(0, num_classes, (2, 19, 23), generator=generator)
    truth = torch.randint(0, num_classes, (2, 19, 23), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = IGNORE
    counts = confusion_counts(prediction.to(dtype), truth.to(dtype), num_classes)
    assert counts.dtype == torch.int64
    assert counts.tolist() == slow_counts(prediction, truth, num_classes)


def test_rows_are_the_truth() -> None:
    counts = confusion_counts(torch.tensor([1, 1, 1, 0]), torch.tensor([0, 0, 1, 255]), 2)
    assert counts.tolist() == [[0, 2], [0, 1]]


def test_prediction_may_be_anything_where_the_truth_is_ignored() -> None:
    counts = confusion_counts(torch.tensor([9, 0]), torch.tensor([255, 0]), 2)
    assert counts.tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ([2, 0], [0, 0], r"prediction has class 2, not 0\.\.1"),
        ([0, 0], [0, 7], r"truth has class 7, not 0\.\.1"),
        ([0, 0], [0, -1], r"truth has class -1, not 0\.\.1"),
    ],
)
def test_class_that_is_none_is_an_error(
    prediction: list[int], truth: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        confusion_counts(torch.tensor(prediction), torch.tensor(truth), 2)


def test_scores_are_those_of_a_sum_by_hand() -> None:
    counts = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 4]])
    scores = scores_from_counts(counts, NAMES)
    # ground 6 / (8 + 7 - 6), house 3 / (4 + 5 - 3), tree 4 / 4
    assert scores.iou_per_class == pytest.approx({"ground": 6 / 9, "house": 0.5, "tree": 1.0})
    assert scores.miou == pytest.approx(0.722222, abs=1e-6)
    assert scores.pixel_accuracy == pytest.approx(0.8125)


def test_absent_class_is_left_out_and_one_only_predicted_is_zero() -> None:
    scores = scores_from_counts(torch.tensor([[3, 1, 0], [0, 0, 0], [0, 0, 0]]), NAMES)
    assert scores.iou_per_class == {"ground": 0.75, "house": 0.0}
    assert scores.miou == 0.375


def test_counts_that_can_not_be_scored_are_errors() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) counts for 3 names"):
        scores_from_counts(torch.ones(2, 2, dtype=torch.int64), NAMES)
    with pytest.raises(ValueError, match="no pixel has a class"):
        scores_from_counts(torch.zeros(3, 3, dtype=torch.int64), NAMES)
    with pytest.raises(ValueError, match="the same name"):
        scores_from_counts(torch.ones(2, 2, dtype=torch.int64), ("tree", "tree"))


def make_instances() -> npt.NDArray[np.uint16]:
    """Draw two squares that touch and one alone, each of 8 x 8 pixels."""
    instances = np.zeros((30, 30), np.uint16)
    instances[2:10, 2:10] = 1000
    instances[2:10, 10:18] = 5
    instances[18:26, 18:26] = 6
    return instances


def test_perfect_classes_find_each_instance_even_where_they_touch() -> None:
    instances = make_instances()
    matches = instance_f1(instances_to_classes(instances), instances)
    assert matches == (3, 0, 0)
    assert matches.f1 == 1


def test_merged_instances_are_neither_found() -> None:
    instances = make_instances()
    merged = np.where(instances == 5, 1000, instances)
    # The one of 16 x 8 has an IoU of a half with each.
    matches = instance_f1(instances_to_classes(merged), instances, iou=0.51)
    assert matches == (1, 1, 2)
    assert matches.f1 == pytest.approx(0.4)


def test_missed_and_invented_instances_are_counted() -> None:
    instances = make_instances()
    shown = instances.copy()
    shown[shown == 6] = 0
    shown[20:26, 2:8] = 9
    assert instance_f1(instances_to_classes(shown), instances) == (2, 1, 1)


def test_overlap_decides_and_each_instance_is_matched_once() -> None:
    instances = np.zeros((20, 20), np.uint16)
    instances[5:15, 5:15] = 1
    classes = np.zeros((20, 20), np.uint8)
    # With their boundaries, rows 5 to 14 and columns 5 to 9 or 10 to 14, less a row: 45 of 100.
    classes[5:14, 5:10] = 2
    classes[5:14, 10:15] = 2
    classes[6:13, 6:9] = 1
    classes[6:13, 11:14] = 1
    assert instance_f1(classes, instances) == (0, 2, 1)
    assert instance_f1(classes, instances, iou=0.45) == (1, 1, 0)
    assert instance_f1(classes, instances, iou=0.46) == (0, 2, 1)


def test_a_wide_boundary_belongs_to_the_instance() -> None:
    instances = make_instances()
    classes = instances_to_classes(instances, 3)
    assert instance_f1(classes, instances, iou=0.9, boundary=3) == (3, 0, 0)
    # Two steps reach a part of it only: 36 to 60 of 64 pixels.
    assert instance_f1(classes, instances, iou=0.95, boundary=1) == (0, 3, 3)


def test_the_foreground_is_all_classes_but_the_first() -> None:
    counts = torch.tensor([[50, 2, 1], [3, 20, 4], [0, 5, 15]])
    assert foreground_iou(counts) == pytest.approx((20 + 4 + 5 + 15) / 50)
    assert math.isnan(foreground_iou(torch.tensor([[9, 0], [0, 0]])))


def test_best_overlap_is_matched_first() -> None:
    instances = np.zeros((12, 30), np.uint16)
    instances[1:11, 1:11] = 1
    instances[1:11, 11:21] = 2
    # The first found overlaps 1 a little and 2 much; the second overlaps 1 alone.
    classes = np.zeros((12, 30), np.uint8)
    classes[1:10, 9:20] = 1
    classes[2:10, 2:6] = 1
    assert instance_f1(classes, instances, iou=0.1) == (2, 0, 0)


def test_nothing_to_find_and_nothing_found_is_perfect() -> None:
    empty = np.zeros((8, 8), np.uint8)
    assert instance_f1(empty, empty) == (0, 0, 0)
    assert instance_f1(empty, empty).f1 == 1
    full = np.ones((8, 8), np.uint8)
    assert instance_f1(full, empty) == (0, 1, 0)
    assert instance_f1(empty, full) == (0, 0, 1)
    assert InstanceMatches(0, 1, 0).f1 == 0
    assert instance_f1(full, full) == (1, 0, 0)


def draw(pixels: npt.NDArray[np.unsignedinteger], truth: LabelMap, prediction: LabelMap) -> Pixels:
    return segmentation_picture([pixels], [truth], [prediction], NAMES, "a title")


def tile(picture: Pixels, column: int, side: int = TILE) -> Pixels:
    left = GUTTER + column * (side + GUTTER)
    return picture[TOP : TOP + side, left : left + side]


def make_scene() -> tuple[Pixels, LabelMap, LabelMap]:
    pixels = np.full((32, 32, 3), (200, 100, 220), np.uint8)
    truth, prediction = np.zeros((2, 32, 32), np.uint8)
    truth[:16] = 1
    truth[31] = IGNORE
    prediction[:, :16] = 1
    return pixels, truth, prediction


def test_columns_show_image_truth_prediction_and_errors() -> None:
    picture = draw(*make_scene())
    assert picture.dtype == np.uint8
    image, truth, prediction, errors = (tile(picture, column) for column in range(4))
    assert (image == (200, 100, 220)).all()
    ground, house = (115, 65, 125), (143, 140, 226)  # half image, half (30, 30, 30), (86, 180, 233)
    assert (truth[:128] == house).all()
    assert (truth[128:248] == ground).all()
    assert (prediction[:248, :128] == house).all()
    assert (prediction[:248, 128:] == ground).all()
    assert (errors[:128, 128:] == RED).all()
    assert (errors[128:248, :128] == RED).all()
    right = np.concatenate([errors[:128, :128], errors[128:248, 128:]])
    assert (right == 86).all()  # half of the mean, 173
    for column in (truth, prediction, errors):
        assert (column[248:] == 210).all()  # ignored


def colours_of_the_legend(picture: Pixels, height: int = TILE) -> set[tuple[int, ...]]:
    below = picture[TOP + height + GUTTER :]
    # Swatches are 13 pixels inside their outline; letters have no such runs.
    return {
        tuple(below[y, x].tolist())
        for y in range(below.shape[0] - 12)
        for x in range(below.shape[1] - 12)
        if tuple(below[y, x].tolist()) != WHITE
        and (below[y : y + 13, x : x + 13] == below[y, x]).all()
    }


def test_legend_has_the_classes_that_occur_and_what_red_means() -> None:
    """Test the legend's colours: those over a pixel of the image's mean brightness, 172."""
    assert colours_of_the_legend(draw(*make_scene())) == {
        (101, 101, 101),
        (129, 176, 202),
        (210, 210, 210),
        RED,
    }


def test_legend_that_does_not_fit_goes_on_below() -> None:
    pixels, truth, prediction = make_scene()
    names = [f"a class with the number {i}" for i in range(40)]
    prediction[:] = np.arange(32)
    picture = segmentation_picture([pixels], [truth], [prediction], names, "title")
    assert picture.shape[1] == 4 * (TILE + GUTTER) + GUTTER
    assert len(colours_of_the_legend(picture)) == 32 + 2


def test_each_class_has_a_colour_of_its_own() -> None:
    pixels = np.zeros((1, 60, 3), np.uint8)
    truth = np.arange(60, dtype=np.uint8)[None]
    names = [str(i) for i in range(60)]
    picture = segmentation_picture([pixels], [truth], [truth], names, "title")
    shown = picture[TOP, GUTTER + 246 : GUTTER + 246 + 240 : 4]
    assert len(np.unique(shown, axis=0)) == 60


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_any_channels_and_depth_are_drawn(channels: int, dtype: type) -> None:
    full = np.iinfo(dtype).max
    ramp = np.linspace(0, full, 32 * 32).reshape(32, 32, 1)
    pixels = np.repeat(ramp, channels, axis=2).astype(dtype)
    pixels[..., 3:] = 0
    _, truth, prediction = make_scene()
    image = tile(draw(pixels, truth, prediction), 0)
    assert image[0, 0].tolist() == [0, 0, 0]
    assert image[-1, -1].tolist() == [255, 255, 255]


def test_12_bits_in_16_are_not_black() -> None:
    _, truth, prediction = make_scene()
    pixels = np.linspace(1000, 4095, 32 * 32).reshape(32, 32, 1).astype(np.uint16)
    image = tile(draw(pixels, truth, prediction), 0)
    assert image.min() == 0
    assert image.max() == 255
    black = tile(draw(np.zeros((32, 32, 1), np.uint16), truth, prediction), 0)
    assert not black.any()


def test_bright_image_is_shown_as_it_is() -> None:
    pixels, truth, prediction = make_scene()
    pixels[:16] = 90
    assert (tile(draw(pixels, truth, prediction), 0)[0, 0] == 90).all()


@pytest.mark.parametrize(
    ("side", "expected"), [(10, 250), (100, 200), (200, 200), (500, 500), (600, 300), (1100, 367)]
)
def test_images_are_enlarged_or_reduced_by_a_whole_factor(side: int, expected: int) -> None:
    pixels = np.full((side, side, 1), 200, np.uint8)
    classes = np.zeros((side, side), np.uint8)
    picture = draw(pixels, classes, classes)
    image = tile(picture, 0, expected)
    assert (image == 200).all()
    assert (picture[TOP + expected, GUTTER : GUTTER + expected] == 255).all()
    assert (picture[TOP : TOP + expected, GUTTER + expected] == 255).all()


def test_images_of_several_sizes_share_a_sheet() -> None:
    shapes = [(32, 32), (10, 40), (300, 20)]
    pixels = [np.full((*shape, 3), 200, np.uint8) for shape in shapes]
    maps = [np.zeros(shape, np.uint8) for shape in shapes]
    picture = segmentation_picture(pixels, maps, maps, NAMES, "title")
    legend_px = 21 + 2 * GUTTER
    assert picture.shape[0] == TOP + (256 + 60 + 300) + 3 * GUTTER + legend_px
    assert picture.shape[1] == 4 * (256 + GUTTER) + GUTTER


def test_title_is_drawn_whole_however_long_it_is() -> None:
    pixels, truth, prediction = make_scene()
    title = "a long title " * 20
    picture = segmentation_picture([pixels], [truth], [prediction], NAMES, title)
    assert picture.shape[1] > 4 * (TILE + GUTTER) + GUTTER
    ink = np.nonzero((picture[:30] < 128).any(axis=(0, 2)))[0]
    assert ink.min() < 20
    assert 0 < picture.shape[1] - ink.max() < 20


def test_what_can_not_be_drawn_is_an_error() -> None:
    pixels, truth, prediction = make_scene()
    with pytest.raises(ValueError, match="no image to show"):
        segmentation_picture([], [], [], NAMES, "title")
    with pytest.raises(ValueError, match=r"image \(32, 32\), truth \(16, 32\)"):
        draw(pixels, truth[:16], prediction)


def test_scores_are_finite_for_one_pixel() -> None:
    scores = scores_from_counts(torch.tensor([[1, 0], [0, 0]]), ("a", "b"))
    assert math.isfinite(scores.miou)
    assert scores == (1.0, 1.0, {"a": 1.0})
