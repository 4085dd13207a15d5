"""Boxes are read or refused with a reason, and surround the same objects in every view."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core.data.boxes import (
    Boxes,
    collect_categories,
    detection_view,
    fitted_view,
    parse_boxes,
)
from mae_core.data.pixels import Pixels
from mae_core.data.samples import DataError
from mae_core.data.synthetic import draw_scene, encode_scene

WHERE = "train-000001.tar: key 'cat7'"
BLACK = (0.0,)


def make_json(*boxes: dict[str, Any], **rest: Any) -> bytes:
    return json.dumps({"annotations": list(boxes), **rest}).encode()


def make_boxes(*xyxy: tuple[float, float, float, float]) -> Boxes:
    count = len(xyxy)
    corners = np.asarray(xyxy, np.float32).reshape(count, 4)
    return Boxes(corners, np.arange(count), np.zeros(count, np.bool_))


def make_rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> Pixels:
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    return pixels


def bright_box(view: Pixels) -> tuple[float, float, float, float]:
    """Return the box around all pixels of at least half brightness."""
    rows = np.flatnonzero((view[..., 0] >= 128).any(axis=1))
    columns = np.flatnonzero((view[..., 0] >= 128).any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


PICTURE = (40, 48, 3)  # the shape of decoded pixels, 48 wide and 40 high


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            make_json({"bbox": [200, 200, 150, 150], "category_id": 1}, width=480, height=400),
            r"another picture size \(the \.json says 480x400, the picture is 48x40",
        ),
        (make_json(width=480, height=400), "says 480x400, the picture is 48x40"),
        (make_json(width=40, height=48), "the picture is 48x40; an EXIF orientation may turn it"),
        (
            make_json({"bbox": [200, 200, 150, 150], "category_id": 1}),
            "lies outside the picture, which is 48 x 40",
        ),
        (b'{"boxes_xywh": [[40, 30, 9.5, 2]]}', "lies outside the picture, which is 48 x 40"),
    ],
)
def test_boxes_of_another_picture_size_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        parse_boxes(data, WHERE, {1: 0}, picture=PICTURE)
    assert str(error.value).startswith(WHERE)


def test_boxes_of_the_picture_are_clipped_to_it() -> None:
    data = make_json({"bbox": [40, 30, 8.5, 10.5], "category_id": 1}, width=48, height=40)
    expected = [[40, 30, 48, 40]]
    assert parse_boxes(data, WHERE, {1: 0}, picture=PICTURE).xyxy.tolist() == expected
    bare = make_json({"bbox": [40, 30, 8.5, 10.5], "category_id": 1})
    assert parse_boxes(bare, WHERE, {1: 0}, picture=PICTURE).xyxy.tolist() == expected


def test_any_category_is_its_own_label_where_none_is_known() -> None:
    data = make_json({"bbox": [1, 1, 2, 2], "category_id": 17})
    assert parse_boxes(data, WHERE, None).labels.tolist() == [17]
    for wrong in ("17", -1, None, 2**40):
        with pytest.raises(DataError, match="is not a number from 0 on"):
            parse_boxes(make_json({"bbox": [1, 1, 2, 2], "category_id": wrong}), WHERE, None)


def test_coco_annotations_become_corners_labels_and_crowds() -> None:
    data = make_json(
        {"bbox": [10, 20, 30, 40], "category_id": 7},
        {"bbox": [0.5, 1, 2, 3], "category_id": 3, "iscrowd": 1},
        width=100,
        height=80,
    )
    boxes = parse_boxes(data, WHERE, {3: 0, 7: 1})
    np.testing.assert_array_equal(boxes.xyxy, [[10, 20, 40, 60], [0.5, 1, 2.5, 4]])
    assert boxes.labels.tolist() == [1, 0]
    assert boxes.is_crowd.tolist() == [False, True]
    assert [array.dtype for array in boxes] == [np.float32, np.int64, np.bool_]


def test_the_drawn_set_is_read() -> None:
    scene = draw_scene(seed=0, index=3, size=64)
    data = encode_scene(scene)["json"]
    boxes = parse_boxes(data, WHERE, {category: category - 1 for category in range(1, 13)})
    x, y, w, h = scene.objects[0].bbox
    assert boxes.xyxy[0].tolist() == [x, y, x + w, y + h]
    assert boxes.labels.tolist() == [item.category for item in scene.objects]


def test_bare_boxes_are_of_the_first_class() -> None:
    boxes = parse_boxes(b'{"boxes_xywh": [[1, 2, 3, 4]], "id": "a"}', WHERE, {5: 2})
    assert boxes.xyxy.tolist() == [[1, 2, 4, 6]]
    assert boxes.labels.tolist() == [0]


@pytest.mark.parametrize("data", [make_json(), b'{"objects": []}', b'{"boxes_xywh": []}'])
def test_an_image_without_boxes_is_fine(data: bytes) -> None:
    boxes = parse_boxes(data, WHERE, {})
    assert [array.shape for array in boxes] == [(0, 4), (0,), (0,)]


def test_a_box_that_sticks_out_by_a_pixel_is_clipped() -> None:
    data = make_json(
        {"bbox": [-0.75, -1, 10, 10], "category_id": 1},
        {"bbox": [91, 71, 10, 10], "category_id": 1},
        width=100,
        height=80,
    )
    boxes = parse_boxes(data, WHERE, {1: 0})
    assert boxes.xyxy.tolist() == [[0, 0, 9.25, 9], [91, 71, 100, 80]]


@pytest.mark.parametrize(
    ("bbox", "reason"),
    [
        ([1, 2, 3], "not four finite numbers"),
        ("1 2 3 4", "not four finite numbers"),
        (None, "not four finite numbers"),
        ([1, 2, 3, float("nan")], "not four finite numbers"),
        ([1, 2, float("inf"), 4], "not four finite numbers"),
        ([1, 2, True, 4], "not four finite numbers"),
        ([1, 2, 10**400, 4], "not four finite numbers"),
        ([1, 2, 0, 4], "width 0 and height 4 must be above 0"),
        ([1, 2, 3, -4], "width 3 and height -4 must be above 0"),
        ([-1.5, 2, 30, 4], "outside the picture, whose corner is 0, 0"),
        ([90, 2, 11.5, 4], "outside the picture, which is 100 x 80"),
        ([9, 2, 11.5, 79.5], "outside the picture, which is 100 x 80"),
        ([-0.9, 2, 0.5, 4], "no area inside the picture"),
    ],
)
def test_a_wrong_box_is_named_with_its_number_and_the_reason(bbox: object, reason: str) -> None:
    good = {"bbox": [0, 0, 5, 5], "category_id": 1}
    data = make_json(good, {"bbox": bbox, "category_id": 1}, width=100, height=80)
    with pytest.raises(DataError) as error:
        parse_boxes(data, WHERE, {1: 0})
    text = str(error.value)
    assert text.startswith(f"{WHERE}: box 2 (")
    assert reason in text


@pytest.mark.parametrize("category", [9, "1", None, 1.5])
def test_an_unknown_category_says_which_are_known(category: object) -> None:
    data = make_json({"bbox": [0, 0, 5, 5], "category_id": category})
    with pytest.raises(DataError, match=r"box 1 .*is not known; known are 1, 4"):
        parse_boxes(data, WHERE, {4: 1, 1: 0})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "has no .json"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\xfa", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is a list, not an object"),
        (b"{}", "no list of boxes: none of annotations, objects, boxes_xywh"),
        (b'{"annotations": {}}', "annotations is a dict, not a list"),
        (b'{"annotations": [3]}', "box 1 of annotations is 3, not an object"),
        (b'{"annotations": [], "width": 0, "height": 3}', "no picture's size"),
        (b'{"annotations": [], "width": "a", "height": 3}', "no picture's size"),
        (
            b'{"annotations": [{"bbox": [0, 0, 1, 1], "category_id": 1, "iscrowd": "no"}]}',
            "iscrowd is 'no'",
        ),
    ],
)
def test_what_is_no_list_of_boxes_is_refused_in_words(data: bytes | None, reason: str) -> None:
    with pytest.raises(DataError) as error:
        parse_boxes(data, WHERE, {1: 0})
    assert str(error.value).startswith(f"{WHERE}: ")
    assert reason in str(error.value)


def test_categories_are_labelled_in_the_order_of_their_ids() -> None:
    datas = [
        make_json({"bbox": [0, 0, 1, 1], "category_id": 17}),
        None,
        b"{",
        make_json({"bbox": [0, 0, 1, 1], "category_id": 2}, {"bbox": [], "category_id": 17}),
    ]
    assert collect_categories(datas) == {2: 0, 17: 1}
    assert collect_categories([b'{"boxes_xywh": [[1, 2, 3, 4]]}']) == {0: 0}
    assert collect_categories([make_json()]) == {}


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    height, width = draw(st.integers(40, 200)), draw(st.integers(40, 200))
    x0, y0 = draw(st.integers(0, width - 20)), draw(st.integers(0, height - 20))
    return (height, width), (
        x0,
        y0,
        draw(st.integers(x0 + 16, width)),
        draw(st.integers(y0 + 16, height)),
    )


@settings(max_examples=200)
@given(rectangles(), st.integers(0, 10**6), st.sampled_from([(96, 96), (64, 128), (120, 70)]))
def test_a_box_stays_around_its_rectangle_in_every_view(
    rectangle: tuple[tuple[int, int], tuple[int, int, int, int]],
    seed: int,
    size: tuple[int, int],
) -> None:
    picture, box = rectangle
    view, boxes = detection_view(
        make_rectangle(picture, box),
        make_boxes(box),
        np.random.default_rng(seed),
        size=size,
        fill=BLACK,
    )
    assert view.pixels.shape == (*size, 3)
    if len(boxes.labels):
        np.testing.assert_allclose(boxes.xyxy[0], bright_box(view.pixels), atol=1.5)
        assert boxes.xyxy.min() >= 0
        assert boxes.xyxy[0, 2] <= view.part[1]
        assert boxes.xyxy[0, 3] <= view.part[0]


@settings(max_examples=100)
@given(rectangles(), st.sampled_from([(96, 96), (64, 128), (256, 300)]))
def test_the_scale_of_a_fitted_view_finds_the_rectangle(
    rectangle: tuple[tuple[int, int], tuple[int, int, int, int]], size: tuple[int, int]
) -> None:
    picture, box = rectangle
    view = fitted_view(make_rectangle(picture, box), size, BLACK)
    assert view.pixels.shape == (*size, 3)
    np.testing.assert_allclose(
        np.asarray(box) * np.asarray(view.scale * 2), bright_box(view.pixels), atol=1.5
    )


def test_a_fitted_view_lies_in_the_upper_left_corner_beside_its_fill() -> None:
    pixels = np.full((10, 20, 2), 40_000, np.uint16)
    view = fitted_view(pixels, (40, 40), (0.25, 1.0))
    assert view.scale == (2.0, 2.0)
    assert view.part == (20, 40)
    assert view.pixels.dtype == np.uint16
    assert (view.pixels[:20] == 40_000).all()
    assert (view.pixels[20:] == (16_384, 65_535)).all()


def test_the_corner_of_a_picture_is_mapped_to_the_corner_of_its_part() -> None:
    # 100 rows become 33: a factor of 0.33 for y and of 1/3 for x. With the factor of x for both,
    # the last row would be 0.33 pixels off in the view, which are 1 pixel of the picture.
    view = fitted_view(np.zeros((100, 300, 1), np.uint8), (80, 100), BLACK)
    assert view.part == (33, 100)
    assert (300 * view.scale[0], 100 * view.scale[1]) == pytest.approx((100, 33))


def test_a_training_view_has_the_fill_beside_the_picture() -> None:
    generator = np.random.default_rng(0)
    pixels = np.full((20, 40, 1), 200, np.uint8)
    view, _ = detection_view(
        pixels, make_boxes(), generator, size=(40, 40), fill=(0.2,), scale=(0.5, 0.5), flip=False
    )
    assert view.part == (10, 20)
    assert (view.pixels[:10, :20] == 200).all()
    assert (view.pixels[10:] == 51).all()
    assert (view.pixels[:, 20:] == 51).all()


def test_a_view_is_a_function_of_its_generator() -> None:
    scene = draw_scene(seed=1, index=0, size=64)
    boxes = make_boxes((10, 10, 40, 40))

    def view(seed: int) -> tuple[Pixels, Boxes]:
        shown, cut = detection_view(
            scene.pixels, boxes, np.random.default_rng(seed), size=(64, 64), fill=BLACK
        )
        return shown.pixels, cut

    np.testing.assert_array_equal(view(5)[0], view(5)[0])
    np.testing.assert_array_equal(view(5)[1].xyxy, view(5)[1].xyxy)
    assert any((view(5)[0] != view(seed)[0]).any() for seed in range(5))


def test_half_of_the_views_are_mirrored_and_none_without_flip() -> None:
    pixels = make_rectangle((64, 64), (0, 0, 16, 64))
    boxes = make_boxes((0, 0, 16, 64))

    def lefts(*, flip: bool) -> list[float]:
        generator = np.random.default_rng(0)
        options: dict[str, Any] = {"size": (64, 64), "fill": BLACK, "scale": (1.0, 1.0)}
        views = [
            detection_view(pixels, boxes, generator, flip=flip, **options)[1] for _ in range(200)
        ]
        return [float(view.xyxy[0, 0]) for view in views]

    mirrored = lefts(flip=True)
    assert set(mirrored) == {0.0, 48.0}
    assert 70 < mirrored.count(48.0) < 130
    assert set(lefts(flip=False)) == {0.0}


def test_the_picture_is_smaller_and_larger_by_as_much_as_scale_says() -> None:
    pixels = np.full((64, 32, 3), 255, np.uint8)
    generator = np.random.default_rng(0)
    whole = make_boxes((0, 0, 32, 64))
    sides = []
    for _ in range(200):
        _, boxes = detection_view(
            pixels, whole, generator, size=(64, 64), fill=BLACK, scale=(0.5, 1.0), min_visible=0.0
        )
        sides.append(float(boxes.xyxy[0, 3]))
    assert 31.5 <= min(sides) < 36
    assert 60 < max(sides) <= 64


def test_a_box_mostly_out_of_view_is_left_out_with_its_label() -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    boxes = make_boxes((0, 0, 100, 100), (0, 0, 50, 100), (90, 90, 90.4, 100))
    # At twice the size, a quarter of the whole picture is in view, and the sliver is thin.
    shares = []
    for seed in range(100):
        _, kept = detection_view(
            pixels,
            boxes,
            np.random.default_rng(seed),
            size=(100, 100),
            fill=BLACK,
            scale=(2.0, 2.0),
        )
        assert 0 not in kept.labels
        assert 2 not in kept.labels
        shares += ((kept.xyxy[:, 2:] - kept.xyxy[:, :2]).prod(axis=1) / 20_000).tolist()
    assert shares
    assert min(shares) >= 0.3


def test_crowds_follow_the_same_rule_and_keep_their_mark() -> None:
    boxes = make_boxes((0, 0, 30, 30), (0, 0, 100, 100))._replace(
        is_crowd=np.asarray([False, True])
    )
    pixels = np.zeros((100, 100, 3), np.uint8)
    for scale, expected in ((1.0, [False, True]), (2.0, [False])):
        found = [
            detection_view(
                pixels,
                boxes,
                np.random.default_rng(seed),
                size=(100, 100),
                fill=BLACK,
                scale=(scale, scale),
            )[1].is_crowd.tolist()
            for seed in range(40)
        ]
        assert max(found, key=len) == expected


def test_a_view_without_boxes_and_one_of_a_single_pixel_work() -> None:
    view, boxes = detection_view(
        np.full((1, 1, 1), 9, np.uint16),
        make_boxes(),
        np.random.default_rng(0),
        size=(8, 16),
        fill=BLACK,
    )
    assert view.pixels.shape == (8, 16, 1)
    assert view.pixels.dtype == np.uint16
    assert [array.shape for array in boxes] == [(0, 4), (0,), (0,)]


@pytest.mark.realdata
def test_all_real_boxes_are_read(real_data: Path) -> None:
    with tarfile.open(real_data / "bccd/train-000000.tar") as tar:
        datas = [
            (member.name, file.read())
            for member in tar
            if member.name.endswith(".json") and (file := tar.extractfile(member))
        ]
    categories = collect_categories(data for _, data in datas)
    assert categories == {1: 0, 2: 1, 3: 2}
    counts = [len(parse_boxes(data, name, categories).labels) for name, data in datas]
    assert len(counts) == 120
    assert min(counts) >= 1
