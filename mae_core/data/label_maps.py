"""Label maps: read them from PNG, and crop them together with their images.

A label map is (H, W) uint8 class indices; `IGNORE` marks pixels that neither losses nor scores
count. An instance map is (H, W), 0 for background and 1..N for the instances. Both are used as
stored, without EXIF rotation: they must be drawn on the upright image.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from scipy import ndimage  # type: ignore[import-untyped]

from mae_core.data.pixels import Pixels
from mae_core.data.samples import DataError
from mae_core.data.transforms import Crop, blank_picture, resize_crop

LabelMap = npt.NDArray[np.uint8]  # (H, W), class indices and IGNORE
InstanceMap = npt.NDArray[np.unsignedinteger[Any]]  # (H, W), 0 is background

IGNORE = 255
INSTANCE_CLASSES = ("background", "inside", "boundary")

_GREY, _PALETTE = 0, 3  # colour types in the header of a PNG
_BIT_DEPTH_AT, _COLOUR_TYPE_AT = 24, 25
_NO_CLASS = -1
_NAMED_VALUES = 5  # an error names this many wrong values


class MaskValues(NamedTuple):
    """The meaning of the values in a mask's pixels."""

    classes: tuple[int, ...] | None = None  # the value of each class; None means 0, 1, 2 and so on
    ignored: int | None = IGNORE  # value that is not counted, unless it is a class's value


MASK_VALUES = MaskValues()


def decode_label_map(
    data: bytes | None,
    where: str,
    *,
    num_classes: int,
    values: MaskValues = MASK_VALUES,
) -> LabelMap:
    """Read the label map PNG of an image, whose values are classes.

    Args:
        data: The file's bytes; None where the sample has none.
        where: Shard and key, named in errors.
        num_classes: Number of classes; `IGNORE` is not one of them.
        values: Which values are classes.

    Raises:
        DataError: There is no readable PNG, or it has a value that is not a class.
    """
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"num_classes={num_classes} is not in 1..{IGNORE}")
    return indices_to_classes(decode_indices(data, where), where, num_classes, values)


def indices_to_classes(
    indices: InstanceMap, where: str, num_classes: int, values: MaskValues = MASK_VALUES
) -> LabelMap:
    """Convert each pixel's value to the number of its class, or to `IGNORE`.

    Raises:
        DataError: A value belongs to no class; names `where` and the value.
    """
    wanted = values.classes or tuple(range(num_classes))
    numbers = np.full(int(indices.max(initial=0)) + 1, _NO_CLASS, np.int16)
    known = [] if values.ignored is None else [(values.ignored, IGNORE)]
    for value, number in [*known, *((value, number) for number, value in enumerate(wanted))]:
        numbers[value : value + 1] = number
    classes = numbers[indices]
    wrong = indices[classes == _NO_CLASS]
    if wrong.size:
        found, counts = np.unique(wrong, return_counts=True)
        named = ", ".join(
            f"{value} in {count} pixels"
            for value, count in zip(found[:_NAMED_VALUES], counts[:_NAMED_VALUES], strict=True)
        )
        more = f" and {len(found) - _NAMED_VALUES} more" if len(found) > _NAMED_VALUES else ""
        shown = f"0..{num_classes - 1}" if values.classes is None else str(list(wanted))
        ignored = "" if values.ignored is None else f" ({values.ignored} is ignored)"
        raise DataError(
            f"{where}: the label map has {named}{more}, but the classes are {shown}{ignored}"
        )
    return classes.astype(np.uint8)


def decode_indices(data: bytes | None, where: str) -> InstanceMap:
    """Read a grey or palette PNG as (H, W) uint8 or uint16: grey values or palette indices.

    Raises:
        DataError: There is no readable PNG, or it is in colour; names `where`.
    """
    if not data:
        raise DataError(f"{where}: has no label map")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
    except UnidentifiedImageError as error:
        # Pillow's text contains the buffer's address, which is never the same twice.
        raise DataError(f"{where}: the label map is not a PNG") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises any error for broken files
        raise DataError(f"{where}: the label map is broken: {error}") from error
    if data[_COLOUR_TYPE_AT] not in (_GREY, _PALETTE):
        raise DataError(
            f"{where}: the label map is {image.mode}, not grey or palette: "
            "colours don't say which class they mean"
        )
    bit_depth = data[_BIT_DEPTH_AT]
    values = np.asarray(image)
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    elif data[_COLOUR_TYPE_AT] == _GREY and bit_depth < 8:
        # Pillow scales 2-bit and 4-bit grey to 0..255.
        values = values // np.uint8(255 // (2**bit_depth - 1))
    return values.astype(np.uint16) if bit_depth == 16 else values


def instances_to_classes(instances: InstanceMap, boundary: int = 1) -> LabelMap:
    """Convert instances to `INSTANCE_CLASSES`, which keep touching instances apart.

    A boundary pixel is a pixel of an instance within `boundary` steps to a 4-neighbour of another
    instance or of the background. An instance that would have no inside then keeps its innermost
    pixels as the inside. The edge of the picture is not a boundary. The three classes are those of
    Caicedo et al. 2019, https://pmc.ncbi.nlm.nih.gov/articles/PMC6771982. Differs: the boundary
    lies inside the instance.
    """
    depth = _depth(instances, boundary + 1)
    numbers, places = np.unique(instances, return_inverse=True)
    deepest = np.zeros(len(numbers), np.int64)
    np.maximum.at(deepest, places.ravel(), depth.ravel())
    is_boundary = depth < np.minimum(boundary + 1, deepest)[places.reshape(depth.shape)]
    # An instance of one pixel's width has only boundary: nothing of it lies deeper than the rest.
    is_boundary |= depth == 1
    classes = np.where(is_boundary, np.uint8(2), np.uint8(1))
    return np.where(instances == 0, np.uint8(0), classes)


def _depth(instances: InstanceMap, limit: int) -> npt.NDArray[np.int64]:
    """Return the steps from each pixel to the nearest one with another number, at most `limit`."""
    depth = np.full(instances.shape, limit, np.int64)
    padded = np.pad(instances, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    reached = np.logical_or.reduce([neighbour != instances for neighbour in neighbours])
    cross = ndimage.generate_binary_structure(2, 1)
    for step in range(1, limit):
        depth[reached & (depth == limit)] = step
        reached = ndimage.binary_dilation(reached, cross)
    return depth


def classes_to_instances(classes: LabelMap, boundary: int = 1) -> InstanceMap:
    """Undo `instances_to_classes`, except for instances without an inside.

    An instance is a 4-connected component of the inside that grows into the boundary beside it. Two
    steps for each pixel of the boundary's width also reach corners. Where two instances grow into
    the same pixel, the one with the higher number gets it.
    """
    cross = ndimage.generate_binary_structure(2, 1)
    instances, _ = ndimage.label(classes == INSTANCE_CLASSES.index("inside"), structure=cross)
    is_boundary = classes == INSTANCE_CLASSES.index("boundary")
    for _ in range(2 * boundary):
        grown = ndimage.grey_dilation(instances, footprint=cross)
        instances = np.where(is_boundary & (instances == 0), grown, instances)
    found: InstanceMap = instances.astype(np.uint32)
    return found


def check_same_size(pixels: Pixels, label_map: InstanceMap, where: str) -> None:
    """Raise a DataError if the label map and its image differ in size."""
    check_shape(pixels.shape, label_map, where)


def check_shape(shape: Sequence[int], label_map: InstanceMap, where: str) -> None:
    """Compare a label map with its image's shape, which begins with height and width.

    Raises:
        DataError: The sizes differ.
    """
    height, width = shape[:2]
    if (height, width) != label_map.shape:
        raise DataError(
            f"{where}: the image is {height}x{width}, "
            f"its label map {label_map.shape[0]}x{label_map.shape[1]}"
        )


def segmentation_view(
    pixels: Pixels,
    label_map: LabelMap,
    generator: np.random.Generator,
    *,
    size: tuple[int, int],
    fill: Sequence[float],
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
) -> tuple[Pixels, LabelMap]:
    """Resize image and label map alike, cut both to `size`, and maybe mirror both.

    Half of the views are mirrored if `flip`. The factor is log-uniform in `scale`: half is as
    likely as double. Where the view extends beyond the picture, which is placed at random, it has
    the colour `fill` and the class `IGNORE`. Pixels are resampled as in `transforms`, classes by
    the nearest pixel, so that no new class appears.

    Args:
        pixels: (H, W, C) uint8 or uint16.
        label_map: (H, W), of the same size.
        generator: The sample's generator.
        size: Height and width of the view.
        fill: Colour beside the picture; see `blank_picture`.
        scale: Smallest and largest factor.
        flip: Whether left and right may be swapped.
    """
    assert pixels.shape[:2] == label_map.shape, "check_same_size comes first"
    factor = math.exp(generator.uniform(math.log(scale[0]), math.log(scale[1])))
    rows = _random_span(generator, label_map.shape[0], factor, size[0])
    columns = _random_span(generator, label_map.shape[1], factor, size[1])
    crop = Crop(
        rows.start * rows.step,
        columns.start * columns.step,
        rows.length * rows.step,
        columns.length * columns.step,
    )
    view = blank_picture(size, pixels.shape[2], pixels.dtype, fill)
    labels = np.full(size, IGNORE, np.uint8)
    inside = np.s_[rows.at : rows.at + rows.length, columns.at : columns.at + columns.length]
    view[inside] = resize_crop(pixels, crop, (rows.length, columns.length))
    labels[inside] = label_map[np.ix_(rows.nearest(), columns.nearest())]
    if flip and generator.random() < 0.5:
        view, labels = view[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(view), np.ascontiguousarray(labels)


class _Span(NamedTuple):
    """The part of the picture that a view shows along one side, in pixels after resizing."""

    start: int  # its first pixel in the resized picture
    length: int
    at: int  # its first pixel in the view
    step: float  # pixels of the picture per pixel of the resized picture

    def nearest(self) -> npt.NDArray[np.int64]:
        """Return the picture's pixel under the centre of each pixel shown."""
        return ((self.start + np.arange(self.length) + 0.5) * self.step).astype(np.int64)


def _random_span(generator: np.random.Generator, side: int, factor: float, wanted: int) -> _Span:
    resized = max(1, round(side * factor))
    offset = int(generator.integers(0, abs(resized - wanted) + 1))
    start, at = (offset, 0) if resized > wanted else (0, offset)
    return _Span(start, min(resized, wanted), at, side / resized)
