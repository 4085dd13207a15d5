"""Average precision is checked by hand and against another library; pictures by their pixels."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from mae_core.data.boxes import Boxes
from mae_core.evaluation.detection import (
    Curve,
    DetectionScores,
    Pixels,
    best_f1_score,
    detection_picture,
    evaluate_detections,
    matched,
    precision_recall_picture,
)
from mae_core.model.detector import Detections

Box = tuple[float, float, float, float]
GREEN = (0, 255, 60)  # a true box
RED = (230, 60, 0)  # found, of the first class
BLUE = (0, 100, 220)  # found, of the second class


def make_truth(boxes: Sequence[Box], labels: Sequence[int], crowd: Sequence[bool] = ()) -> Boxes:
    return Boxes(
        np.asarray(boxes, np.float32).reshape(-1, 4),
        np.asarray(labels, np.int64),
        np.asarray(crowd or [False] * len(labels), np.bool_),
    )


def make_found(
    boxes: Sequence[Box], scores: Sequence[float], labels: Sequence[int] | None = None
) -> Detections:
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels or [0] * len(scores), dtype=torch.long),
    )


def make_random_set(seed: int, num_images: int) -> tuple[list[Detections], list[Boxes]]:
    """Draw boxes of three classes: most are detected almost in place, some not, some are false."""
    generator = np.random.default_rng(seed)

    def boxes(count: int) -> np.ndarray:
        corners = generator.uniform(0, 200, (count, 2))
        return np.concatenate([corners, corners + generator.uniform(5, 120, (count, 2))], axis=1)

    found, truths = [], []
    for _ in range(num_images):
        true_boxes, labels = boxes(6), generator.integers(0, 3, 6)
        is_crowd = generator.random(6) < 0.15
        truths.append(Boxes(true_boxes.astype(np.float32), labels, is_crowd))
        kept = generator.random(6) < 0.8
        near = true_boxes[kept] + generator.normal(0, 4, (kept.sum(), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        given = np.where(generator.random(kept.sum()) < 0.9, labels[kept], 0)
        all_boxes = np.concatenate([near, boxes(3)]).astype(np.float32)
        all_labels = np.concatenate([given, generator.integers(0, 3, 3)])
        scores = np.sort(generator.random(len(all_boxes)))[::-1].astype(np.float32).copy()
        found.append(Detections(*(torch.from_numpy(a) for a in (all_boxes, scores, all_labels))))
    return found, truths


def has_colour(picture: Pixels, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def test_all_found_where_they_are_is_one() -> None:
    truths = [make_truth([(1, 2, 30, 40), (50, 50, 90, 80)], [0, 1]), make_truth([], [])]
    found = [make_found([(1, 2, 30, 40), (50, 50, 90, 80)], [0.9, 0.4], [0, 1]), make_found([], [])]
    scores = evaluate_detections(found, truths, ["cat", "dog"])
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((1, 1, 1))
    assert scores.ap_per_class == pytest.approx({"cat": 1, "dog": 1})
    assert scores.curves["cat"].precision == pytest.approx(np.ones(101))


def test_average_precision_is_as_worked_out_by_hand() -> None:
    # Right, wrong, right (with an IoU of 0.62); one of the three true boxes is never found. At an
    # IoU of 0.5, 34 of the 101 recalls have a precision of 1, 33 more one of 2/3.
    truths = [
        make_truth([(0, 0, 100, 100)], [0]),
        make_truth([(0, 0, 9, 9), (0, 0, 50, 90)], [0] * 2),
    ]
    found = [
        make_found([(0, 0, 62, 100)], [0.7]),
        make_found([(0, 0, 50, 90), (200, 200, 300, 300)], [0.9, 0.8]),
    ]
    scores = evaluate_detections(found, truths, ["cat"])
    assert scores.ap50 == pytest.approx(56 / 101)
    assert scores.ap75 == pytest.approx(34 / 101)
    assert scores.ap == pytest.approx((3 * 56 + 7 * 34) / 1010)
    curve = scores.curves["cat"]
    assert curve.recall[[0, 33, 100]] == pytest.approx([0, 0.33, 1])
    assert curve.precision[[0, 33, 34, 66, 67]] == pytest.approx([1, 1, 2 / 3, 2 / 3, 0])
    assert curve.ap50 == pytest.approx(56 / 101)


@pytest.mark.parametrize("seed", range(4))
def test_scores_agree_with_torchmetrics(seed: int) -> None:
    found, truths = make_random_set(seed, 12)
    # Its own thresholds are float32, which moves AP by up to 0.003: a recall of 3/10 misses 0.3.
    metric = MeanAveragePrecision(
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        class_metrics=True,
        backend="faster_coco_eval",
    )
    metric.update(
        [f._asdict() for f in found],
        [
            {
                "boxes": torch.from_numpy(truth.xyxy),
                "labels": torch.from_numpy(truth.labels),
                "iscrowd": torch.from_numpy(truth.is_crowd).long(),
            }
            for truth in truths
        ],
    )
    expected = metric.compute()
    scores = evaluate_detections(found, truths, ["a", "b", "c"])
    assert scores.ap == pytest.approx(expected["map"].item(), abs=1e-6)
    assert scores.ap50 == pytest.approx(expected["map_50"].item(), abs=1e-6)
    assert scores.ap75 == pytest.approx(expected["map_75"].item(), abs=1e-6)
    assert [*scores.ap_per_class.values()] == pytest.approx(expected["map_per_class"].tolist())
    assert 0.1 < scores.ap < scores.ap50 < 0.95


@pytest.mark.parametrize(("is_crowd", "expected"), [(True, 1.0), (False, 0.5049505)])
def test_what_is_found_in_a_crowd_counts_neither_for_nor_against(
    is_crowd: bool, expected: float
) -> None:
    truths = [make_truth([(0, 0, 20, 20), (50, 50, 150, 150)], [0, 0], [False, is_crowd])]
    found = [make_found([(55, 55, 75, 75), (80, 60, 99, 99), (0, 0, 20, 20)], [0.5, 0.4, 0.9])]
    assert evaluate_detections(found, truths, ["cat"]).ap50 == pytest.approx(expected)


def test_a_class_without_a_true_box_is_left_out() -> None:
    truths = [make_truth([(0, 0, 20, 20), (0, 0, 90, 90)], [0, 2], [False, True])]
    found = [make_found([(0, 0, 20, 20), (40, 40, 60, 60)], [0.9, 0.8], [0, 1])]
    scores = evaluate_detections(found, truths, ["cat", "dog", "herd"])
    assert scores.ap == pytest.approx(1)
    assert scores.ap_per_class["cat"] == pytest.approx(1)
    assert math.isnan(scores.ap_per_class["dog"])
    assert math.isnan(scores.ap_per_class["herd"])
    assert list(scores.curves) == ["cat"]


def test_a_class_that_is_never_found_is_zero() -> None:
    truths = [make_truth([(0, 0, 20, 20), (0, 0, 90, 90)], [0, 1])]
    scores = evaluate_detections([make_found([(0, 0, 20, 20)], [0.9])], truths, ["cat", "dog"])
    assert scores.ap == pytest.approx(0.5)
    assert scores.ap_per_class["dog"] == 0
    nothing = evaluate_detections([make_found([], [])], truths, ["cat", "dog"])
    assert (nothing.ap, nothing.ap50) == (0, 0)


def test_without_any_true_box_scores_are_nan() -> None:
    found = [make_found([(0, 0, 20, 20)], [0.9])]
    scores = evaluate_detections(found, [make_truth([], [])], ["cat"])
    assert all(math.isnan(value) for value in (scores.ap, scores.ap50, scores.ap75))
    assert scores.curves == {}


def test_the_best_detections_are_taken() -> None:
    boxes: list[Box] = [(10.0 * i, 0, 10.0 * i + 8, 8) for i in range(120)]
    truths = [make_truth(boxes, [0] * 120)]
    found = [make_found(boxes, np.linspace(0.9, 0.1, 120).tolist())]
    # 100 of 120: the recalls up to 0.83, which are 84 of 101.
    assert evaluate_detections(found, truths, ["cell"]).ap == pytest.approx(84 / 101)
    scores = evaluate_detections(found, truths, ["cell"], max_detections=120)
    assert scores.ap == pytest.approx(1)


def test_evaluation_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    found, truths = make_random_set(0, 3)
    evaluate_detections(found, truths, ["a", "b", "c"])
    assert capfd.readouterr() == ("", "")


def test_what_can_not_be_evaluated_is_refused_in_words() -> None:
    truth, found = make_truth([(0, 0, 2, 2)], [1]), make_found([], [])
    with pytest.raises(ValueError, match="detections of 2 images, truths of 1"):
        evaluate_detections([found, found], [truth], ["a", "b"])
    with pytest.raises(ValueError, match="no image"):
        evaluate_detections([], [], ["a"])
    with pytest.raises(ValueError, match="named twice: a, a"):
        evaluate_detections([found], [truth], ["a", "a"])
    with pytest.raises(ValueError, match=r"labels \[1\] for 1 names"):
        evaluate_detections([found], [truth], ["a"])


def test_a_picture_shows_true_boxes_in_green_and_found_ones_by_class() -> None:
    pixels = np.full((100, 120, 3), 128, np.uint8)
    nothing = make_truth([], []), make_found([], [])
    found = make_found([(50, 50, 110, 90)], [0.8], [1])

    def picture(truth: Boxes, detections: Detections) -> Pixels:
        sheet = detection_picture([pixels], [truth], [detections], ["cat", "dog"], "a title")
        assert sheet.dtype == np.uint8
        assert sheet.shape[2] == 3
        return sheet[60:]  # without the legend

    assert not has_colour(picture(*nothing), GREEN)
    assert has_colour(picture(make_truth([(10, 10, 60, 60)], [0]), nothing[1]), GREEN)
    assert not has_colour(picture(nothing[0], found), GREEN)
    assert has_colour(picture(nothing[0], found), BLUE)
    assert not has_colour(picture(nothing[0], found), RED)


def test_an_unsure_detection_is_not_drawn() -> None:
    pixels = np.full((100, 120, 3), 128, np.uint8)
    found = make_found([(50, 50, 110, 90)], [0.29])
    nothing = make_truth([], [])
    assert not has_colour(detection_picture([pixels], [nothing], [found], ["cat"], ""), RED)
    sheet = detection_picture([pixels], [nothing], [found], ["cat"], "", min_score=0.2)
    assert has_colour(sheet, RED)


def test_a_detection_finds_one_true_box_of_its_class() -> None:
    truth = make_truth([(0, 0, 20, 20), (40, 40, 60, 60)], [0, 1])
    found = make_found(
        [(0, 0, 20, 20), (0, 0, 20, 18), (40, 40, 60, 60), (40, 40, 60, 52)],
        [0.9, 0.8, 0.7, 0.6],
        [0, 0, 0, 1],
    )
    # Found; found already; another class; an IoU of 0.6.
    assert matched(found, truth).tolist() == [True, False, False, True]
    crowd = truth._replace(is_crowd=np.array([True, True]))
    assert matched(found, crowd).tolist() == [True, True, False, True]
    assert matched(make_found([], []), truth).tolist() == []


def test_the_score_to_show_is_the_one_of_the_best_f1() -> None:
    truths = [make_truth([(0, 0, 20, 20)], [0]), make_truth([(0, 0, 20, 20)], [0])]
    found = [
        make_found([(0, 0, 20, 20), (50, 50, 60, 60)], [0.9, 0.2]),
        make_found([(0, 0, 20, 20), (50, 50, 60, 60)], [0.4, 0.3]),
    ]
    # F1 with the detections from 0.9, 0.4, 0.3 and 0.2 on: 2/3, 1, 4/5, 2/3.
    assert best_f1_score(found, truths) == pytest.approx(0.4)
    assert best_f1_score([make_found([(50, 50, 60, 60)], [0.9])], truths[:1]) == 1.0
    assert best_f1_score([make_found([], [])], truths[:1]) == 1.0


def test_a_wrong_detection_is_dashed() -> None:
    pixels = np.full((288, 300, 3), 128, np.uint8)
    box = (50, 50, 110, 110)
    found = make_found([box], [0.9])

    def red_pixels(truth: Boxes) -> int:
        sheet = detection_picture([pixels], [truth], [found], ["cat"], "")
        top_edge = sheet[-8 - 288 + 49, 8:]  # outside of the true box
        return int((top_edge == RED).all(axis=-1).sum())

    assert red_pixels(make_truth([box], [0])) == 62
    assert 20 < red_pixels(make_truth([], [])) < 45


def test_tags_do_not_overlap_and_name_the_class() -> None:
    pixels = np.full((288, 300, 3), 128, np.uint8)
    boxes = [(100 + i, 100, 200 + i, 160) for i in range(12)]
    found = make_found(boxes, [0.9 - 0.01 * i for i in range(12)])
    truth = make_truth([], [])
    short = detection_picture([pixels], [truth], [found], ["x"], "")
    long = detection_picture([pixels], [truth], [found], ["a long name"], "")

    def tag_widths(sheet: Pixels) -> list[int]:
        """Of the runs of red above the boxes, where only tags are."""
        row = (sheet[-8 - 288 + 87, 8:] == RED).all(axis=-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        return [int(stop - start) for start, stop in zip(edges[::2], edges[1::2], strict=True)]

    assert len(tag_widths(short)) >= 2  # one at each corner
    assert max(tag_widths(long)) > 2 * max(tag_widths(short))


def test_a_true_box_is_drawn_on_its_first_and_last_pixels() -> None:
    # 288 px high: as it is. 8 px to the left, the legend and title above.
    pixels = np.full((288, 300, 3), 128, np.uint8)
    truth = make_truth([(10, 20, 40, 60)], [0])
    sheet = detection_picture([pixels], [truth], [make_found([], [])], ["cat"], "")
    image = sheet[-8 - 288 : -8, 8 : 8 + 300]
    rows, columns = np.nonzero((image == GREEN).all(axis=-1))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 20, 39, 59)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((32, 32, 3), (288, 288)), ((960, 480, 3), (480, 240)), ((100, 800, 1), (80, 640))],
)
def test_images_are_brought_to_a_legible_size(
    shape: tuple[int, int, int], expected: tuple[int, int]
) -> None:
    pixels = np.full(shape, 128, np.uint8)
    sheet = detection_picture([pixels], [make_truth([], [])], [make_found([], [])], ["cat"], "")
    rows, columns = np.nonzero((sheet == 128).all(axis=-1))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == pytest.approx(expected, abs=1)


def test_dark_images_of_twelve_bits_in_sixteen_are_brightened() -> None:
    ramp = np.linspace(0, 4095, 300 * 300).reshape(300, 300, 1).astype(np.uint16)
    sheet = detection_picture([ramp], [make_truth([], [])], [make_found([], [])], ["cat"], "")
    image = sheet[-8 - 300 : -8, 8 : 8 + 300]
    assert image[0].max() < 5
    assert image[-1].min() > 250
    assert abs(int(image[150].mean()) - 128) < 5


def test_a_sheet_holds_as_many_images_as_it_was_told() -> None:
    pixels = [np.full((288, 600, 3), 128, np.uint8)] * 5
    truths, found = [make_truth([], [])] * 5, [make_found([], [])] * 5
    two = detection_picture(pixels, truths, found, ["cat"], "", max_images=2)
    five = detection_picture(pixels, truths, found, ["cat"], "")
    assert five.shape[0] - two.shape[0] == 2 * (288 + 8)
    assert five.shape[1] == two.shape[1] < 1600
    with pytest.raises(ValueError, match="no image"):
        detection_picture([], [], [], ["cat"], "")


def test_a_long_legend_is_wrapped() -> None:
    names = [f"a class with a long name {i}" for i in range(30)]
    truth = make_truth([(1, 1, 9, 9)] * 30, list(range(30)))
    pixels, found = np.full((288, 300, 3), 128, np.uint8), make_found([], [])
    wide = detection_picture([pixels], [truth], [found], names, "title")
    short = detection_picture([pixels], [make_truth([], [])], [found], names, "title")
    assert wide.shape[1] == short.shape[1]
    assert wide.shape[0] > short.shape[0] + 15 * 25


def test_precision_and_recall_are_drawn_with_a_curve_a_class() -> None:
    recall = np.linspace(0, 1, 101)

    def scores(num_classes: int) -> DetectionScores:
        names = [f"class {i}" for i in range(num_classes)]
        curves = {name: Curve(recall, 1 - recall / (i + 1)) for i, name in enumerate(names)}
        return DetectionScores(0.5, 0.5, 0.5, dict.fromkeys(names, 0.5), curves)

    pictures = [precision_recall_picture(scores(count), "a title") for count in (0, 1, 2, 40)]
    for picture in pictures:
        assert picture.dtype == np.uint8
        assert picture.shape == (600, 900, 3)
    # The first two colours of matplotlib.
    blue, orange = (31, 119, 180), (255, 127, 14)
    assert [has_colour(picture, blue) for picture in pictures[:3]] == [False, True, True]
    assert [has_colour(picture, orange) for picture in pictures[:3]] == [False, False, True]
