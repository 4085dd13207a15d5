"""Pictures of classes: read from PNG, and cut together with the image they belong to.

A label map is (H, W) uint8 class indices; `IGNORE` marks pixels that no loss and no score counts.
An instance map is (H, W), 0 for background and 1..N for the instances. Both are taken as they are
stored: they must be drawn on the upright image.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from scipy import ndimage  # type: ignore[import-untyped]

from mae_core.data.pixels import Pixels
from mae_core.data.samples import DataError
from mae_core.data.transforms import Crop, resize_crop

LabelMap = npt.NDArray[np.uint8]  # (H, W), class indices and IGNORE
InstanceMap = npt.NDArray[np.unsignedinteger[Any]]  # (H, W), 0 is background

IGNORE = 255
INSTANCE_CLASSES = ("background", "inside", "boundary")

_GREY, _PALETTE = 0, 3  # colour types, as the header of a PNG has them
_BIT_DEPTH_AT, _COLOUR_TYPE_AT = 24, 25
_NO_CLASS = -1
_NAMED_VALUES = 5  # of wrong values, so many are named


class MaskValues(NamedTuple):
    """What the values of a mask's pixels mean."""

    classes: tuple[int, ...] | None = None  # the value of each class; None: 0, 1, 2 and so on
    ignored: int | None = IGNORE  # that no loss and no score counts, unless it is a class's


MASK_VALUES = MaskValues()


def decode_label_map(
    data: bytes | None,
    where: str,
    *,
    kind: Literal["classes", "instances"],
    num_classes: int,
    values: MaskValues = MASK_VALUES,
) -> LabelMap:
    """Read the PNG beside an image.

    Args:
        data: the file; None where the sample has none.
        where: shard and key, named in errors.
        kind: whether values are classes, or instances that become `INSTANCE_CLASSES`.
        num_classes: that there are; `IGNORE` is none of them.
        values: which values are classes, where `kind` is classes.

    Raises:
        DataError: there is no PNG that can be read, or it has a value that is no class.
    """
    if kind == "instances":
        if num_classes != len(INSTANCE_CLASSES):
            raise ValueError(f"num_classes={num_classes}, but instances become 3 classes")
        return instances_to_classes(decode_indices(data, where))
    if not 1 <= num_classes <= IGNORE:
        raise ValueError(f"num_classes={num_classes} is not in 1..{IGNORE}")
    return indices_to_classes(decode_indices(data, where), where, num_classes, values)


def indices_to_classes(
    indices: InstanceMap, where: str, num_classes: int, values: MaskValues = MASK_VALUES
) -> LabelMap:
    """Give each pixel the number of the class whose value it has, or `IGNORE`.

    Raises:
        DataError: a value is no class's; names `where` and the value.
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
    """The values of a grey or palette PNG, (H, W) uint8 or uint16; of a palette the indices.

    Raises:
        DataError: there is no PNG that can be read, or it is in colour; names `where`.
    """
    if not data:
        raise DataError(f"{where}: has no label map")
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
    except UnidentifiedImageError as error:
        # Pillow's text has the address of the buffer: never the same twice.
        raise DataError(f"{where}: the label map is not a PNG") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises anything on broken files
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
        # Pillow stretches 2 and 4 bits of grey over 0..255.
        values = values // np.uint8(255 // (2**bit_depth - 1))
    return values.astype(np.uint16) if bit_depth == 16 else values


def instances_to_classes(instances: InstanceMap) -> LabelMap:
    """Classes that tell touching instances apart: `INSTANCE_CLASSES`.

    Boundary is a pixel of an instance one of whose four neighbours is of another, or background.
    The edge of the picture is no boundary. The three classes of Caicedo et al. 2019,
    https://pmc.ncbi.nlm.nih.gov/articles/PMC6771982. Differs: the boundary is one pixel wide and
    inside the instance.
    """
    padded = np.pad(instances, 1, mode="edge")
    neighbours = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    boundary = np.logical_or.reduce([neighbour != instances for neighbour in neighbours])
    classes = np.where(boundary, np.uint8(2), np.uint8(1))
    return np.where(instances == 0, np.uint8(0), classes)


def classes_to_instances(classes: LabelMap) -> InstanceMap:
    """Undo `instances_to_classes`, but for corners and instances that have no inside.

    An instance is what hangs together of the inside (over four neighbours), grown by a pixel to
    win back its boundary. Where two grow into a pixel, it goes to the one numbered later.
    """
    cross = ndimage.generate_binary_structure(2, 1)
    cores, _ = ndimage.label(classes == INSTANCE_CLASSES.index("inside"), structure=cross)
    grown = ndimage.grey_dilation(cores, footprint=cross)
    instances: InstanceMap = np.where(cores > 0, cores, grown).astype(np.uint32)
    return instances


def check_same_size(pixels: Pixels, label_map: InstanceMap, where: str) -> None:
    """Raises: DataError: the label map is of another size than its image."""
    check_shape(pixels.shape, label_map, where)


def check_shape(shape: Sequence[int], label_map: InstanceMap, where: str) -> None:
    """Compare a label map with the shape of its image, which begins with height and width.

    Raises:
        DataError: they are of different sizes.
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
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
) -> tuple[Pixels, LabelMap]:
    """Image and label map enlarged alike, cut to `size` and mirrored half of the time if `flip`.

    The factor is log-uniform in `scale`: half is as likely as double. What the picture does not
    fill, at a random place, is 0 and `IGNORE`. Pixels are resampled as in `transforms`, classes
    are those of the nearest pixel: none is invented.

    Args:
        pixels: (H, W, C) uint8 or uint16.
        label_map: (H, W), of the same size.
        generator: of the sample.
        size: height and width of the view.
        scale: smallest and largest factor.
        flip: whether left and right may be swapped.
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
    view = np.zeros((*size, pixels.shape[2]), pixels.dtype)
    labels = np.full(size, IGNORE, np.uint8)
    inside = np.s_[rows.at : rows.at + rows.length, columns.at : columns.at + columns.length]
    view[inside] = resize_crop(pixels, crop, (rows.length, columns.length))
    labels[inside] = label_map[np.ix_(rows.nearest(), columns.nearest())]
    if flip and generator.random() < 0.5:
        view, labels = view[:, ::-1], labels[:, ::-1]
    return np.ascontiguousarray(view), np.ascontiguousarray(labels)


class _Span(NamedTuple):
    """What a view shows along one side, in pixels of the resized picture."""

    start: int  # where it begins in the resized picture
    length: int
    at: int  # where it begins in the view
    step: float  # pixels of the picture to one of the resized one

    def nearest(self) -> npt.NDArray[np.int64]:
        """The pixel of the picture under the centre of each pixel shown."""
        return ((self.start + np.arange(self.length) + 0.5) * self.step).astype(np.int64)


def _random_span(generator: np.random.Generator, side: int, factor: float, wanted: int) -> _Span:
    resized = max(1, round(side * factor))
    offset = int(generator.integers(0, abs(resized - wanted) + 1))
    start, at = (offset, 0) if resized > wanted else (0, offset)
    return _Span(start, min(resized, wanted), at, side / resized)
