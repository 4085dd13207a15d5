"""Drawn scenes are reproducible, correctly labelled, and not separable by colour."""

import hashlib
import io
import json
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mae_core.data.decode import decode_image
from mae_core.data.synthetic import SHAPE_CLASSES, Scene, draw_scene, encode_scene

CLASSES = (
    "disc",
    "ring",
    "crescent",
    "heart",
    "triangle",
    "square",
    "star",
    "cross",
    "arrow",
    "bowtie",
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(0, i, 64) for i in range(300)]


def test_classes_keep_their_numbers() -> None:
    assert SHAPE_CLASSES == CLASSES


def test_scene_is_a_function_of_seed_and_index() -> None:
    one, again = draw_scene(3, 17, 48), draw_scene(3, 17, 48)
    assert encode_scene(one) == encode_scene(again)
    others = [draw_scene(3, 18, 48), draw_scene(4, 17, 48)]
    assert all(not np.array_equal(one.pixels, other.pixels) for other in others)


def test_labels_and_places_never_change() -> None:
    # The values when this was written: a half-packed set must be continued with the same images.
    scenes = [draw_scene(0, i, 64) for i in range(6)]
    assert [scene.label for scene in scenes] == [4, 3, 4, 9, 6, 8]
    assert [scene.objects[0].bbox for scene in scenes] == [
        (12, 5, 36, 36),
        (22, 0, 42, 38),
        (24, 13, 40, 46),
        (25, 16, 39, 37),
        (24, 15, 37, 35),
        (17, 0, 47, 36),
    ]
    digest = hashlib.sha256(b"".join(scene.segmentation.tobytes() for scene in scenes))
    assert digest.hexdigest()[:16] == "6b800e80afd28725"


@pytest.mark.parametrize("size", [16, 64, 97, 224])
def test_scene_has_the_size_asked_for(size: int) -> None:
    for index in range(5):
        scene = draw_scene(0, index, size)
        assert scene.pixels.shape == (size, size, 3)
        assert scene.pixels.dtype == np.uint8
        assert scene.segmentation.shape == (size, size)
        assert scene.objects


def test_boxes_and_mask_agree(scenes: list[Scene]) -> None:
    for scene in scenes:
        covered = np.zeros((64, 64), bool)
        for item in scene.objects:
            x, y, width, height = item.bbox
            assert 0 <= x < x + width <= 64
            assert 0 <= y < y + height <= 64
            inside = scene.segmentation[y : y + height, x : x + width] == item.category + 1
            # The box is tight: each of its sides is touched.
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()
            covered[y : y + height, x : x + width] |= inside
        np.testing.assert_array_equal(covered, scene.segmentation > 0)


def test_label_is_the_large_object_s(scenes: list[Scene]) -> None:
    for scene in scenes:
        large, *small = scene.objects
        assert large.category == scene.label
        assert len(small) <= 2
        areas = [item.bbox[2] * item.bbox[3] for item in scene.objects]
        assert areas[0] == max(areas)


def test_large_object_fills_about_half_of_the_side_or_more(scenes: list[Scene]) -> None:
    sides = [max(scene.objects[0].bbox[2:]) for scene in scenes]
    assert min(sides) >= 30
    assert 40 <= np.median(sides) <= 50
    assert max(sides) <= 58


def test_classes_are_spread_evenly_and_distractors_are_few(scenes: list[Scene]) -> None:
    counts = Counter(scene.label for scene in scenes)
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 55  # 30 expected, standard deviation 5
    numbers = Counter(len(scene.objects) - 1 for scene in scenes)
    assert set(numbers) == {0, 1, 2}
    assert 115 < numbers[0] < 200  # 150 expected, standard deviation 9; some more have no room
    assert 30 < numbers[2] < 85  # at most 60 expected


def test_object_stands_out_by_its_strokes(scenes: list[Scene]) -> None:
    spreads = [scene.pixels[scene.segmentation > 0].std() for scene in scenes]
    assert min(spreads) > 20
    calm = [scene.pixels[scene.segmentation == 0].std(axis=0).max() for scene in scenes]
    assert np.median(calm) < np.median(spreads)


def test_object_is_as_often_darker_as_brighter_than_its_background(scenes: list[Scene]) -> None:
    brighter = [
        scene.pixels[scene.segmentation > 0].mean() > scene.pixels[scene.segmentation == 0].mean()
        for scene in scenes
    ]
    assert 0.35 < np.mean(brighter) < 0.65


def test_neighbours_of_raw_pixels_do_not_solve_the_classes() -> None:
    """With 300 labelled images, the nearest by raw pixels has the class in a fifth of the cases."""
    drawn = [draw_scene(0, i, 16) for i in range(500)]
    pixels = np.asarray([scene.pixels.ravel() for scene in drawn], float)
    pixels -= pixels[:300].mean(axis=0)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    labels = np.asarray([scene.label for scene in drawn])
    nearest = (pixels[300:] @ pixels[:300].T).argmax(axis=1)
    assert (labels[nearest] == labels[300:]).mean() < 0.35  # 0.99 for centred, upright objects


def test_mean_colour_says_little_about_the_class(scenes: list[Scene]) -> None:
    """The nearest neighbour by mean and spread of colour is little better than chance, 0.1.

    Shapes differ in area, and that shows in the spread.
    """
    features = np.asarray(
        [[*s.pixels.mean(axis=(0, 1)), *s.pixels.std(axis=(0, 1))] for s in scenes]
    )
    labels = np.asarray([scene.label for scene in scenes])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    distances = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distances, np.inf)
    accuracy = (labels[distances.argmin(axis=1)] == labels).mean()
    assert accuracy < 0.19  # standard deviation of chance: 0.017


def test_sample_holds_picture_label_boxes_and_mask() -> None:
    scene = draw_scene(0, 4, 64)
    parts = encode_scene(scene)
    assert list(parts) == ["cls", "jpg", "json", "seg.png"]
    assert int(parts["cls"]) == scene.label
    pixels = decode_image(parts["jpg"], 3)
    assert pixels.shape == (64, 64, 3)
    assert abs(pixels.astype(int) - scene.pixels).mean() < 8
    mask = np.asarray(Image.open(io.BytesIO(parts["seg.png"])))
    np.testing.assert_array_equal(mask, scene.segmentation)
    text = json.loads(parts["json"])
    assert (text["width"], text["height"]) == (64, 64)
    first = text["objects"][0]
    assert first["category"] == SHAPE_CLASSES[scene.label]
    assert first["category_id"] == scene.label + 1
    assert {item["category_id"] for item in text["objects"]} == set(mask[mask > 0].tolist())
    assert tuple(first["bbox"]) == scene.objects[0].bbox


def test_drawing_is_quick() -> None:
    started_at_s = time.process_time()
    for index in range(100):
        encode_scene(draw_scene(0, index, 64))
    assert time.process_time() - started_at_s < 0.5  # 200 a second; measured: 700
