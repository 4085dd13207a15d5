"""Boxes around the objects in a picture: parse their JSON, and keep them in step with crops.

A box is x0, y0, x1, y1 in pixels from the picture's upper left corner. x1 and y1 are exclusive: its
area is (x1 - x0) * (y1 - y0).

Source of the JSON form: COCO, https://cocodataset.org/#format-data, one file per image.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.data.pixels import Pixels
from mae_core.data.samples import DataError
from mae_core.data.transforms import Crop, blank_picture, resize_crop

_TOLERANCE_PX = 1.0  # how far a box may exceed the picture; PASCAL VOC counts from 1
_LARGEST_PX = 1e6  # float32 still resolves coordinates of this size
_SMALLEST_PX = 1.0  # smallest side of a box in a view
_BARE_LIST = "boxes_xywh"
_LISTS = ("annotations", "objects", _BARE_LIST)
_BARE_CATEGORY = 0
_LARGEST_CATEGORY = 2**31 - 1


class Boxes(NamedTuple):
    """The N objects in one picture."""

    xyxy: npt.NDArray[np.float32]  # (N, 4)
    labels: npt.NDArray[np.int64]  # (N,), counted from 0
    is_crowd: npt.NDArray[np.bool_]  # (N,), True = one box around a group

    def chosen(self, which: npt.NDArray[Any]) -> "Boxes":
        """Return the boxes that an index array or a mask selects."""
        return Boxes(self.xyxy[which], self.labels[which], self.is_crowd[which])


def parse_boxes(
    data: bytes | None,
    where: str,
    categories: Mapping[int, int] | None,
    *,
    picture: tuple[int, ...] | None = None,
) -> Boxes:
    """Read the boxes of one image; an empty list is valid.

    Args:
        data: JSON, or None where the sample has none. One of `{"annotations": [{"bbox": [x, y, w,
            h], "category_id": 1, "iscrowd": 0}]}`, the same under `"objects"`, or `{"boxes_xywh":
            [[x, y, w, h]]}`, whose boxes all have label 0. With `"width"` and `"height"`, boxes
            are checked against the picture, and clipped where they exceed it by up to a pixel.
        where: Shard and key, named in errors.
        categories: Maps `category_id` to label; None uses each id as its own label.
        picture: Height and width of the decoded image, as `pixels.shape` begins. If the JSON has
            `"width"` and `"height"` they must be the same, and the boxes must lie inside.

    Raises:
        DataError: Says what is wrong, and with which box.
    """
    raw = _parse_object(data, where)
    size = _picture_size(raw, where)
    if picture is not None:
        size = _checked_size(size, (float(picture[1]), float(picture[0])), where)
    known = categories if _list_name(raw, where) != _BARE_LIST else {_BARE_CATEGORY: 0}
    xyxy, labels, crowd = [], [], []
    for number, item in enumerate(_box_list(raw, where), start=1):
        try:
            xyxy.append(_corners(item.get("bbox"), size))
            labels.append(_label(item, known))
            crowd.append(_is_crowd(item))
        except ValueError as error:
            raise DataError(f"{where}: box {number} ({item.get('bbox')}): {error}") from None
    return Boxes(
        np.asarray(xyxy, np.float32).reshape(-1, 4),
        np.asarray(labels, np.int64),
        np.asarray(crowd, np.bool_),
    )


def holds_boxes(data: bytes | None) -> bool:
    """Return whether a `.json` holds boxes that `parse_boxes` should read."""
    try:
        raw = _parse_object(data, "")
        items = raw[_list_name(raw, "")]
    except DataError:
        return False
    name = _list_name(raw, "")
    if not isinstance(items, list):
        return False
    if name == _BARE_LIST or not items:
        return True
    return any(isinstance(item, dict) and "bbox" in item for item in items)


def collect_categories(datas: Iterable[bytes | None]) -> dict[int, int]:
    """Map the `category_id`s of the images, in ascending order, to labels from 0.

    Boxes without a category count as category 0. JSON that can't be read is skipped here, because
    `parse_boxes` reports what is wrong with it.
    """
    found: set[int] = set()
    for data in datas:
        try:
            items = list(_box_list(_parse_object(data, ""), ""))
        except DataError:
            continue
        categories = [item.get("category_id") for item in items]
        found |= {category for category in categories if isinstance(category, int)}
    return {category: label for label, category in enumerate(sorted(found))}


def _parse_object(data: bytes | None, where: str) -> dict[str, Any]:
    if data is None:
        raise DataError(f"{where}: has no .json with boxes")
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: its .json is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise DataError(f"{where}: its .json is a {type(raw).__name__}, not an object")
    return raw


def _box_list(raw: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    name = _list_name(raw, where)
    if not isinstance(raw[name], list):
        raise DataError(f"{where}: {name} is a {type(raw[name]).__name__}, not a list")
    for number, item in enumerate(raw[name], start=1):
        if name == _BARE_LIST:
            yield {"bbox": item, "category_id": _BARE_CATEGORY}
        elif isinstance(item, dict):
            yield item
        else:
            raise DataError(f"{where}: box {number} of {name} is {item!r}, not an object")


def _list_name(raw: dict[str, Any], where: str) -> str:
    for name in _LISTS:
        if name in raw:
            return name
    raise DataError(f"{where}: its .json has no list of boxes: none of {', '.join(_LISTS)}")


def _picture_size(raw: dict[str, Any], where: str) -> tuple[float, float] | None:
    """Return width and height if the JSON has both."""
    if "width" not in raw or "height" not in raw:
        return None
    width, height = raw["width"], raw["height"]
    if not (_is_number(width) and _is_number(height) and width > 0 and height > 0):
        raise DataError(f"{where}: width {width!r} and height {height!r} are no picture's size")
    return float(width), float(height)


def _checked_size(
    said: tuple[float, float] | None, real: tuple[float, float], where: str
) -> tuple[float, float]:
    """Return the real width and height, or raise a DataError if the JSON says another size."""
    if said is None or said == real:
        return real
    advice = "scale the boxes, or use the pictures that they were drawn on"
    if said == real[::-1]:
        advice = "an EXIF orientation may turn it; the boxes must be drawn on the upright picture"
    raise DataError(
        f"{where}: its boxes are for another picture size (the .json says "
        f"{said[0]:g}x{said[1]:g}, the picture is {real[0]:g}x{real[1]:g}; {advice})"
    )


def _corners(bbox: object, size: tuple[float, float] | None) -> tuple[float, ...]:
    """Convert [x, y, w, h] to x0, y0, x1, y1, clipped to the picture."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(_is_number(v) for v in bbox)):
        raise ValueError(f"not four finite numbers x, y, width, height below {_LARGEST_PX:.0e}")
    x, y, w, h = bbox
    if w <= 0 or h <= 0:
        raise ValueError(f"width {w} and height {h} must be above 0")
    limits = (_LARGEST_PX, _LARGEST_PX) if size is None else size
    if x < -_TOLERANCE_PX or y < -_TOLERANCE_PX:
        raise ValueError("lies outside the picture, whose corner is 0, 0")
    if x + w > limits[0] + _TOLERANCE_PX or y + h > limits[1] + _TOLERANCE_PX:
        raise ValueError(f"lies outside the picture, which is {limits[0]:g} x {limits[1]:g}")
    corners = (max(x, 0), max(y, 0), min(x + w, limits[0]), min(y + h, limits[1]))
    left, top, right, bottom = np.asarray(corners, np.float32).tolist()
    if right <= left or bottom <= top:
        raise ValueError("has no area inside the picture")
    return left, top, right, bottom


def _label(item: dict[str, Any], categories: Mapping[int, int] | None) -> int:
    category = item.get("category_id")
    if categories is None:
        if not isinstance(category, int) or not 0 <= category <= _LARGEST_CATEGORY:
            raise ValueError(f"category_id {category!r} is not a number from 0 on")
        return category
    label = categories.get(category) if isinstance(category, int) else None
    if label is None:
        known = ", ".join(map(str, sorted(categories))) or "none"
        raise ValueError(f"category_id {category!r} is not known; known are {known}")
    return label


def _is_crowd(item: dict[str, Any]) -> bool:
    flag = item.get("iscrowd", 0)
    if flag not in (0, 1):
        raise ValueError(f"iscrowd is {flag!r}, not 0 or 1")
    return bool(flag)


def _is_number(value: object) -> bool:
    """Return whether a value is a finite number of valid size; comparing NaN gives False too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < _LARGEST_PX


class BoxView(NamedTuple):
    """A view of a picture. What the picture does not cover lies to the right and below."""

    pixels: Pixels  # (height, width, C)
    part: tuple[int, int]  # height and width that the picture covers
    scale: tuple[float, float]  # from x and y in the picture to x and y in the view


def detection_view(
    pixels: Pixels,
    boxes: Boxes,
    generator: np.random.Generator,
    *,
    size: tuple[int, int],
    fill: Sequence[float],
    scale: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    min_visible: float = 0.3,
) -> tuple[BoxView, Boxes]:
    """Cut a random view of exactly `size` and its boxes, mirrored half of the time if `flip`.

    The picture is resized by the factor that fits it into `size`, times a uniform draw from
    `scale`. If it is then larger than `size`, a random part is cut out; if it is smaller, it lies
    in the upper left corner, as in `fitted_view`.

    Source: large-scale jitter, Ghiasi et al. 2021, https://arxiv.org/abs/2012.07177, section 3, as
    used to train ViTDet. Differs: the default is (0.5, 2.0) instead of (0.1, 2.0), for smaller
    data sets.

    Args:
        pixels: (H, W, C) uint8 or uint16.
        boxes: Boxes in these pixels.
        generator: Owned by the caller; the same draws give the same view.
        size: Height and width.
        fill: Colour beside the picture; see `blank_picture`.
        scale: Range of the draw; 1 fits the picture.
        flip: Whether to mirror.
        min_visible: Boxes with a smaller share of their area in the view are dropped, and so are
            boxes with a side shorter than a pixel.
    """
    height, width = pixels.shape[:2]
    full = _fitted_size((height, width), size, generator.uniform(*scale))
    by_y, by_x = full[0] / height, full[1] / width
    part = min(size[0], full[0]), min(size[1], full[1])
    top = int(generator.integers(0, full[0] - part[0] + 1))
    left = int(generator.integers(0, full[1] - part[1] + 1))
    mirrored = flip and generator.random() < 0.5

    view = resize_crop(pixels, Crop(top / by_y, left / by_x, part[0] / by_y, part[1] / by_x), part)
    xyxy = boxes.xyxy * np.asarray([by_x, by_y, by_x, by_y], np.float32)
    xyxy = xyxy - np.asarray([left, top, left, top], np.float32)
    if mirrored:
        view = view[:, ::-1]
        xyxy = np.stack([part[1] - xyxy[:, 2], xyxy[:, 1], part[1] - xyxy[:, 0], xyxy[:, 3]], 1)
    clipped = np.clip(xyxy, 0, np.asarray([part[1], part[0]] * 2, np.float32))
    sides = clipped[:, 2:] - clipped[:, :2]
    whole = (xyxy[:, 2:] - xyxy[:, :2]).prod(axis=1)
    kept = (sides >= _SMALLEST_PX).all(axis=1) & (sides.prod(axis=1) >= min_visible * whole)
    shown = BoxView(_in_corner(view, size, fill), part, (by_x, by_y))
    return shown, Boxes(clipped, boxes.labels, boxes.is_crowd).chosen(kept)


def fitted_view(pixels: Pixels, size: tuple[int, int], fill: Sequence[float]) -> BoxView:
    """Resize the whole picture to fit into `size`, in the upper left corner.

    The sides are rounded to whole pixels, so the factors of x and y differ by up to half a pixel of
    the view over the length of a side.
    """
    height, width = pixels.shape[:2]
    part = _fitted_size((height, width), size, 1.0)
    view = resize_crop(pixels, Crop(0, 0, height, width), part)
    return BoxView(_in_corner(view, size, fill), part, (part[1] / width, part[0] / height))


def _fitted_size(picture: tuple[int, int], size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return height and width of a picture that is fitted into `size`, times `factor`."""
    factor *= min(size[0] / picture[0], size[1] / picture[1])
    return max(1, round(picture[0] * factor)), max(1, round(picture[1] * factor))


def _in_corner(pixels: Pixels, size: tuple[int, int], fill: Sequence[float]) -> Pixels:
    whole = blank_picture(size, pixels.shape[2], pixels.dtype, fill)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    return whole
