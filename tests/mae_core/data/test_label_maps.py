"""Label maps are read as stored and stay aligned with their images."""

import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from mae_core.data.label_maps import (
    IGNORE,
    LabelMap,
    MaskValues,
    check_same_size,
    classes_to_instances,
    decode_indices,
    decode_label_map,
    indices_to_classes,
    instances_to_classes,
    segmentation_view,
)
from mae_core.data.pixels import Pixels
from mae_core.data.samples import DataError

WHERE = "s3://bucket/train-000001.tar: cat7"
DARK, LIGHT = 60, 180
MIDDLE = 120
BLACK = (0.0,)


def make_png(values: npt.ArrayLike, mode: str | None = None) -> bytes:
    """Encode a PNG in `mode`, by default the mode of the array's type."""
    image = Image.fromarray(np.asarray(values))
    if mode == "P":
        palette = Image.new("P", image.size)
        # Colours that are nothing like the indices.
        palette.putpalette([200, 30, 90, 7, 7, 7, 250, 250, 0] + [11] * 759)
        palette.putdata(list(image.get_flattened_data()))
        image = palette
    elif mode is not None:
        image = image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


def make_grey_png(bit_depth: int, row: bytes, width: int) -> bytes:
    """Write a grey PNG of one row by hand, as Pillow cannot write 2 or 4 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, 1, bit_depth, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def decode_classes(data: bytes | None, num_classes: int = 3) -> LabelMap:
    return decode_label_map(data, WHERE, num_classes=num_classes)


def test_palette_gives_the_index_and_not_the_colour() -> None:
    classes = decode_classes(make_png(np.uint8([[0, 1, 2], [2, 1, 255]]), "P"))
    assert classes.tolist() == [[0, 1, 2], [2, 1, 255]]
    assert classes.dtype == np.uint8


def test_palette_of_few_bits_gives_the_index() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0])
    image.putdata([2, 0, 1])
    stream = io.BytesIO()
    image.save(stream, "png", bits=2)
    assert stream.getvalue()[24] == 2
    assert decode_classes(stream.getvalue()).tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_gives_its_values_and_ignored_pixels_stay(dtype: type) -> None:
    classes = decode_classes(make_png(np.asarray([[0, 1], [2, 255]], dtype)))
    assert classes.tolist() == [[0, 1], [2, IGNORE]]
    assert classes.dtype == np.uint8


@pytest.mark.parametrize(
    ("bit_depth", "row", "expected"),
    [(1, b"\xa0", [1, 0, 1, 0]), (2, b"\x1b", [0, 1, 2, 3]), (4, b"\x01\x2f", [0, 1, 2, 15])],
)
def test_grey_of_few_bits_is_not_stretched(bit_depth: int, row: bytes, expected: list[int]) -> None:
    data = make_grey_png(bit_depth, row, 4)
    assert decode_classes(data, num_classes=16).tolist() == [expected]


def test_values_that_are_no_class_are_named_and_counted() -> None:
    data = make_png(np.uint8([[0, 7, 7], [2, 3, 255]]))
    with pytest.raises(DataError) as error:
        decode_classes(data)
    assert str(error.value) == (
        f"{WHERE}: the label map has 3 in 1 pixels, 7 in 2 pixels, "
        "but the classes are 0..2 (255 is ignored)"
    )


def test_16_bit_value_beyond_a_byte_is_no_class() -> None:
    with pytest.raises(DataError, match="256 in 1 pixels"):
        decode_classes(make_png(np.uint16([[0, 256]])))


def test_many_wrong_values_do_not_fill_the_message() -> None:
    with pytest.raises(DataError, match=r"14 in 1 pixels and 5 more, but the classes are 0\.\.9"):
        decode_classes(make_png(np.uint8([list(range(20))])), num_classes=10)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, "has no label map"),
        (b"", "has no label map"),
        (b"version https://git-lfs", "is not a PNG"),
        (make_png(np.zeros((64, 64), np.uint8))[:60], "is broken"),
        (make_png(np.zeros((2, 2, 3), np.uint8)), "is RGB, not grey or palette"),
        (make_png(np.zeros((2, 2, 4), np.uint8)), "is RGBA, not grey or palette"),
        (make_png(np.zeros((2, 2), np.uint8), "LA"), "is LA, not grey or palette"),
    ],
)
def test_what_is_no_label_map_is_an_error_that_names_the_sample(
    data: bytes | None, expected: str
) -> None:
    with pytest.raises(DataError, match=expected) as error:
        decode_classes(data)
    assert str(error.value).startswith(f"{WHERE}: ")


def test_jpeg_is_no_label_map() -> None:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "jpeg")
    with pytest.raises(DataError, match="is not a PNG"):
        decode_classes(stream.getvalue())


@pytest.mark.parametrize("num_classes", [0, 256])
def test_number_of_classes_must_fit_a_byte(num_classes: int) -> None:
    with pytest.raises(ValueError, match=rf"num_classes={num_classes} is not in 1\.\.255"):
        decode_classes(make_png(np.uint8([[0]])), num_classes=num_classes)


def test_touching_instances_have_a_boundary_on_each_side() -> None:
    instances = np.uint16(
        [
            [7, 7, 7, 300, 300, 300],
            [7, 7, 7, 300, 300, 300],
            [7, 7, 7, 300, 300, 300],
            [0, 0, 0, 0, 0, 300],
        ]
    )
    expected = [
        [1, 1, 2, 2, 1, 1],
        [1, 1, 2, 2, 1, 1],
        [2, 2, 2, 2, 2, 1],
        [0, 0, 0, 0, 0, 2],
    ]
    assert instances_to_classes(instances).tolist() == expected
    assert instances_to_classes(instances).dtype == np.uint8


def test_touching_by_a_corner_is_no_boundary() -> None:
    instances = np.full((5, 5), 1, np.uint8)
    instances[0, 0] = 0
    assert instances_to_classes(instances)[1, 1] == 1
    assert instances_to_classes(instances)[0, 1] == 2


def test_instance_255_is_not_ignored() -> None:
    assert instances_to_classes(np.full((3, 3), 255, np.uint8)).tolist() == [[1] * 3] * 3


def test_a_wider_boundary_reaches_further_inside() -> None:
    instances = np.zeros((9, 9), np.uint16)
    instances[1:8, 1:8] = 4
    for boundary in (1, 2, 3):
        classes = instances_to_classes(instances, boundary)
        inside = np.zeros((9, 9), np.bool_)
        inside[1 + boundary : 8 - boundary, 1 + boundary : 8 - boundary] = True
        assert (classes == 1).tolist() == inside.tolist()
        assert (classes == 2).tolist() == ((instances == 4) & ~inside).tolist()


def test_a_small_instance_keeps_its_innermost_pixels_as_inside() -> None:
    instances = np.zeros((5, 12), np.uint16)
    instances[1:4, 1:4] = 7  # one pixel lies two steps from the background
    instances[1:3, 6:11] = 9  # none does: it has no inside at any width
    for boundary in (1, 2, 5):
        classes = instances_to_classes(instances, boundary)
        assert np.argwhere(classes == 1).tolist() == [[2, 2]]
        assert (classes == 0).tolist() == (instances == 0).tolist()


def test_indices_are_those_stored() -> None:
    indices = decode_indices(make_png(np.uint16([[0, 1000]])), WHERE)
    assert indices.tolist() == [[0, 1000]]
    assert indices.dtype == np.uint16


@pytest.mark.parametrize("boundary", [1, 2, 3])
def test_instances_come_back_with_their_corners(boundary: int) -> None:
    instances = np.zeros((9, 17), np.uint16)
    instances[1:8, 1:8] = 4
    instances[1:8, 8:15] = 9
    found = classes_to_instances(instances_to_classes(instances, boundary), boundary)
    expected = np.where(instances == 4, 1, np.where(instances == 9, 2, 0))
    assert found.tolist() == expected.tolist()


def test_an_instance_grows_into_its_boundary_and_not_into_the_background() -> None:
    classes = np.uint8([[0, 1, 2, 2, 2, 2, 0], [0, 0, 0, 0, 0, 0, 0]])
    assert classes_to_instances(classes).tolist() == [[0, 1, 1, 1, 0, 0, 0], [0] * 7]
    assert classes_to_instances(classes, 2).tolist() == [[0, 1, 1, 1, 1, 1, 0], [0] * 7]


def test_sizes_that_differ_are_both_named() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    check_same_size(pixels, np.zeros((4, 6), np.uint8), WHERE)
    with pytest.raises(DataError) as error:
        check_same_size(pixels, np.zeros((6, 4), np.uint8), WHERE)
    assert str(error.value) == f"{WHERE}: the image is 4x6, its label map 6x4"


def make_chequers(height: int, width: int, side: int) -> tuple[Pixels, LabelMap]:
    """Draw squares of two classes, one dark and one light in the image."""
    rows, columns = np.indices((height, width)) // side
    label_map = ((rows + columns) % 2).astype(np.uint8)
    return np.where(label_map == 1, LIGHT, DARK).astype(np.uint8)[..., None], label_map


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(17, 90),
    width=st.integers(17, 90),
    size=st.tuples(st.integers(16, 96), st.integers(16, 96)),
    scale=st.floats(0.5, 2.0),
)
def test_picture_and_labels_stay_aligned(
    seed: int, height: int, width: int, size: tuple[int, int], scale: float
) -> None:
    """Test by symmetry: after bicubic resampling a step is half way exactly at the edge."""
    pixels, label_map = make_chequers(height, width, 16)
    generator = np.random.default_rng(seed)
    view, labels = segmentation_view(
        pixels, label_map, generator, size=size, fill=BLACK, scale=(scale, scale)
    )
    grey = view[..., 0].astype(int)
    assert view.shape == (*size, 1)
    assert labels.shape == size
    # 0 is beyond the picture: none of its colours comes near it.
    assert ((grey == 0) == (labels == IGNORE)).all()
    # Near the border of what is shown, the kernel is cut and no more symmetric.
    whole = ndimage.binary_erosion(labels != IGNORE, iterations=4)
    clear = whole & (abs(grey - MIDDLE) > 2)
    assert ((grey > MIDDLE) == (labels == 1))[clear].all()


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_view_of_any_picture_has_its_size_and_no_new_class(
    seed: int, height: int, width: int, size: tuple[int, int]
) -> None:
    generator = np.random.default_rng(seed)
    label_map = generator.choice(np.uint8([3, 40, 250]), (height, width))
    pixels = generator.integers(1, 65536, (height, width, 2), dtype=np.uint16)
    view, labels = segmentation_view(pixels, label_map, generator, size=size, fill=BLACK)
    assert view.shape == (*size, 2)
    assert view.dtype == np.uint16
    assert set(np.unique(labels)) <= {3, 40, 250, IGNORE}
    assert (labels != IGNORE).any()


def test_view_at_scale_one_is_a_part_of_the_picture_bit_for_bit() -> None:
    generator = np.random.default_rng(3)
    pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    label_map = pixels[..., 0] // 2
    view, labels = segmentation_view(
        pixels, label_map, generator, size=(8, 9), fill=BLACK, scale=(1, 1), flip=False
    )
    places = [
        (top, left)
        for top in range(13)
        for left in range(22)
        if (pixels[top : top + 8, left : left + 9] == view).all()
    ]
    assert len(places) == 1
    assert (view[..., 0] // 2 == labels).all()


def test_smaller_picture_lies_at_any_place_of_the_view() -> None:
    pixels, label_map = np.full((2, 2, 1), 9, np.uint8), np.zeros((2, 2), np.uint8)
    generator = np.random.default_rng(0)
    corners = set()
    for _ in range(200):
        view, labels = segmentation_view(
            pixels, label_map, generator, size=(4, 3), fill=BLACK, scale=(1, 1), flip=False
        )
        rows, columns = np.nonzero(labels == 0)
        assert view.sum() == 36
        corners.add((int(rows.min()), int(columns.min())))
    assert corners == {(top, left) for top in (0, 1, 2) for left in (0, 1)}


def test_half_of_the_views_are_mirrored_and_none_without_flip() -> None:
    pixels = np.arange(100, dtype=np.uint8).reshape(10, 10, 1)
    label_map = pixels[..., 0]

    def num_mirrored(flip: bool) -> int:
        views = [
            segmentation_view(
                pixels,
                label_map,
                np.random.default_rng(seed),
                size=(10, 10),
                fill=BLACK,
                scale=(1, 1),
                flip=flip,
            )[1]
            for seed in range(200)
        ]
        return sum(bool(labels[0, 0] == 9) for labels in views)

    assert 70 < num_mirrored(True) < 130
    assert num_mirrored(False) == 0


def test_half_is_as_likely_as_double() -> None:
    """Infer the factor from the share shown of a large picture with classes in squares."""
    rows = np.arange(400) // 20
    label_map = np.repeat(rows[:, None], 400, axis=1).astype(np.uint8)
    pixels = np.zeros((400, 400, 1), np.uint8)
    generator = np.random.default_rng(0)
    enlarged = 0
    for _ in range(400):
        _, labels = segmentation_view(pixels, label_map, generator, size=(100, 10), fill=BLACK)
        enlarged += int(labels[-1, 0]) - int(labels[0, 0]) <= 4
    # Uniform in 0.5..2 it would be two thirds; 100 rows of factor 1 span 5 or 6 squares.
    assert 160 < enlarged < 240


def test_what_lies_beside_the_picture_has_the_fill_and_no_class() -> None:
    pixels, label_map = np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.uint8)
    view, labels = segmentation_view(
        pixels, label_map, np.random.default_rng(0), size=(8, 8), fill=(0.2, 1.0), scale=(1, 1)
    )
    assert np.count_nonzero(labels == IGNORE) == 48
    assert (view[labels == IGNORE] == (51, 255)).all()
    assert (view[labels == 0] == 0).all()


def test_same_generator_gives_the_same_view() -> None:
    pixels, label_map = make_chequers(50, 60, 5)
    views = [
        segmentation_view(pixels, label_map, np.random.default_rng(4), size=(32, 32), fill=BLACK)
        for _ in range(2)
    ]
    assert (views[0][0] == views[1][0]).all()
    assert (views[0][1] == views[1][1]).all()


def test_values_say_which_class_a_pixel_has() -> None:
    data = make_png(np.uint8([[0, 255], [7, 255]]))
    values = MaskValues((0, 255), ignored=7)
    classes = decode_label_map(data, WHERE, num_classes=2, values=values)
    assert classes.tolist() == [[0, 1], [IGNORE, 1]]


def test_255_is_a_class_where_the_values_have_it() -> None:
    indices = np.uint8([[0, 255]])
    assert indices_to_classes(indices, WHERE, 2, MaskValues((0, 255))).tolist() == [[0, 1]]
    assert indices_to_classes(indices, WHERE, 2).tolist() == [[0, IGNORE]]


def test_nothing_is_ignored_where_no_value_is() -> None:
    with pytest.raises(DataError, match=r"has 255 in 1 pixels, but the classes are 0\.\.1$"):
        indices_to_classes(np.uint8([[0, 255]]), WHERE, 2, MaskValues(ignored=None))


def test_a_value_of_16_bits_can_be_a_class() -> None:
    values = MaskValues((0, 1000))
    assert indices_to_classes(np.uint16([[1000, 0]]), WHERE, 2, values).tolist() == [[1, 0]]
    with pytest.raises(DataError, match=r"has 999 in 1 pixels, but the classes are \[0, 1000\]"):
        indices_to_classes(np.uint16([[999, 0]]), WHERE, 2, values)
