"""Measure how well objects are detected, in numbers and in pictures.

Boxes are x0, y0, x1, y1 in pixels; the detected and the true boxes of an image refer to the same
picture. Precisions are in 0..1.

Source: COCO's average precision, https://cocodataset.org/#detection-eval, computed by
faster-coco-eval, https://github.com/MiXaiLL76/faster_coco_eval.
"""

import io
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval.core.coco import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_iou

from mae_core.data.boxes import Boxes
from mae_core.data.pixels import Pixels as DecodedPixels
from mae_core.model.detector import Detections

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
_Rectangle = tuple[int, int, int, int]  # first and last pixel: x0, y0, x1, y1

_logger = logging.getLogger(__name__)

_TILE_HEIGHT_PX = (288, 480)  # smaller and larger images are resized to these limits
_TILE_WIDTH_PX = 640
_SHEET_WIDTH_PX = 1600
_GUTTER_PX = 8
_FONT_PX = 15
_TAG_FONT_PX = 12
_DASH_PX = 5
_SWATCH_PX = 16
_WHITE_PERCENTILE = 99.9  # a dark image is stretched so that this percentile becomes white
_DARK_SHARE = 0.5  # an image is dark if that percentile is below this share of full scale
_TRUE_COLOUR = (0, 255, 60)
# Distinguishable by people who see no red or no green, and none of them green: after Okabe and Ito,
# https://jfly.uni-koeln.de/color/.
_COLOURS = (
    (230, 60, 0),
    (0, 100, 220),
    (255, 190, 0),
    (200, 60, 170),
    (70, 190, 250),
    (120, 60, 20),
    (110, 70, 200),
    (130, 130, 130),
)
_NUM_LEGEND_CURVES = 20


class Curve(NamedTuple):
    """Precision at each of COCO's 101 recalls, at an IoU of 0.5; 0 where recall was not reached."""

    recall: Floats  # (101,), 0 to 1
    precision: Floats  # (101,), the best one at this or a higher recall

    @property
    def ap50(self) -> float:
        return float(self.precision.mean())


class DetectionScores(NamedTuple):
    """Scores over the classes that have a true box; NaN where there is none."""

    ap: float  # mean over IoUs of 0.50, 0.55 .. 0.95 and over classes
    ap50: float
    ap75: float
    ap_per_class: dict[str, float]  # mean over these IoUs; NaN for a class without a true box
    curves: dict[str, Curve]  # of classes with a true box


def evaluate_detections(
    detections: Sequence[Detections],
    truths: Sequence[Boxes],
    names: Sequence[str],
    *,
    max_detections: int = 100,
) -> DetectionScores:
    """Compute COCO's average precision over a whole set.

    A detection in a crowd counts neither for nor against.

    Args:
        detections: The detections of each image.
        truths: The true boxes of the same images in the same order.
        names: Names of the classes, by label, all different.
        max_detections: Number of best detections used per image and class.
    """
    if len(detections) != len(truths):
        raise ValueError(f"detections of {len(detections)} images, truths of {len(truths)}")
    if not truths:
        raise ValueError("there is no image to evaluate")
    if len(set(names)) != len(names):
        raise ValueError(f"a class is named twice: {', '.join(names)}")
    labels = {label for truth in truths for label in truth.labels.tolist()}
    labels |= {label for found in detections for label in found.labels.tolist()}
    if not labels <= set(range(len(names))):
        raise ValueError(f"labels {sorted(labels)} for {len(names)} names")
    precision, recall = _precision(detections, truths, names, max_detections)
    ap = [_mean(precision[:, :, k]) for k in range(len(names))]
    return DetectionScores(
        ap=_mean(precision),
        ap50=_mean(precision[0]),
        ap75=_mean(precision[5]),
        ap_per_class=dict(zip(names, ap, strict=True)),
        curves={
            name: Curve(recall, precision[0, :, k])
            for k, name in enumerate(names)
            if not np.isnan(ap[k])
        },
    )


def _precision(
    detections: Sequence[Detections],
    truths: Sequence[Boxes],
    names: Sequence[str],
    max_detections: int,
) -> tuple[Floats, Floats]:
    """Return precision as (IoUs, recalls, classes), NaN without a true box, and the recalls."""
    truth = COCO(
        {
            "images": [{"id": image} for image in range(1, len(truths) + 1)],
            "categories": [{"id": label, "name": name} for label, name in enumerate(names)],
            "annotations": [*_annotations(truths)],
        }
    )
    found = truth.loadRes([*_results(detections)])
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=_logger.debug)
    evaluation.params.maxDets = [max_detections]
    evaluation.params.areaRng = evaluation.params.areaRng[:1]
    evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
    evaluation.evaluate()
    evaluation.accumulate()
    # IoU, recall, class, range of areas, number of detections.
    precision = np.array(evaluation.eval["precision"], np.float64)[:, :, :, 0, -1]
    precision[precision < 0] = np.nan
    return precision, np.array(evaluation.params.recThrs)


def _annotations(truths: Sequence[Boxes]) -> Iterable[dict[str, Any]]:
    number = 0
    for image, boxes in enumerate(truths, start=1):
        for box, label, is_crowd in zip(*(array.tolist() for array in boxes), strict=True):
            number += 1  # an id of 0 would mean no match
            x, y, w, h = _xywh(box)
            yield {
                "id": number,
                "image_id": image,
                "category_id": label,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": int(is_crowd),
            }


def _results(detections: Sequence[Detections]) -> Iterable[dict[str, Any]]:
    for image, found in enumerate(detections, start=1):
        for box, score, label in zip(*(tensor.tolist() for tensor in found), strict=True):
            yield {"image_id": image, "category_id": label, "bbox": _xywh(box), "score": score}


def _xywh(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def _mean(values: Floats) -> float:
    """Average the values that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def matched(found: Detections, truth: Boxes, iou: float = 0.5) -> npt.NDArray[np.bool_]:
    """Mark the detections of an image that match a true box of their class, best score first.

    A true box is matched once; a crowd can be matched any number of times.

    Args:
        found: Sorted by score, best first.
        truth: The true boxes of the same image.
        iou: Smallest intersection over union of a match.

    Returns:
        (N,), in the order of `found`.
    """
    right = np.zeros(len(found.scores), np.bool_)
    overlaps = box_iou(found.boxes.float(), torch.from_numpy(truth.xyxy).float()).numpy().copy()
    overlaps[found.labels.numpy()[:, None] != truth.labels[None, :]] = 0
    for place, overlap in enumerate(overlaps):
        if overlap.size and overlap.max() >= iou:
            best = int(overlap.argmax())
            right[place] = True
            if not truth.is_crowd[best]:
                overlaps[:, best] = 0
    return right


def best_f1_score(
    detections: Sequence[Detections], truths: Sequence[Boxes], iou: float = 0.5
) -> float:
    """Find the lowest score to show: the one that maximises F1 over the whole set.

    Returns:
        The score, or 1 if no detection matches anything.
    """
    right = [matched(found, truth, iou) for found, truth in zip(detections, truths, strict=True)]
    scores = np.concatenate([found.scores.numpy() for found in detections])
    order = np.argsort(-scores, kind="stable")
    num_right = np.cumsum(np.concatenate(right)[order])
    if not num_right.size or not num_right[-1]:
        return 1.0
    num_true = sum(len(truth.labels) for truth in truths)
    f1 = 2 * num_right / (np.arange(1, len(order) + 1) + num_true)
    return float(scores[order][f1.argmax()])


def detection_picture(
    pictures: Sequence[DecodedPixels],
    truths: Sequence[Boxes],
    detections: Sequence[Detections],
    names: Sequence[str],
    title: str,
    *,
    min_score: float = 0.3,
    max_images: int = 9,
) -> Pixels:
    """Draw images side by side with their true and their detected boxes.

    Each detection is tagged with its class and score if there is room that no other tag covers. A
    detection without a true box of its class at an IoU of 0.5 is dashed.

    Three channels are shown as RGB, of more the first three, of fewer the first one in grey. Dark
    images, such as 12 bits stored in 16, are brightened. Images are resized to a height of 288 to
    480 pixels.

    Args:
        pictures: (H, W, C) uint8 or uint16.
        truths: Boxes in the pictures' pixels. Crowds are drawn like other boxes.
        detections: Boxes in the pictures' pixels.
        names: Names of the classes, by label.
        title: Title of the whole picture.
        min_score: Detections with a lower score are not drawn.
        max_images: Number of images drawn, from the first on.

    Returns:
        (height, width, 3), RGB.
    """
    if not pictures:
        raise ValueError("there is no image to show")
    triples = list(zip(pictures, truths, detections, strict=True))[:max_images]
    labels: set[int] = set()
    tiles = []
    for pixels, truth, found in triples:
        scores = found.scores.tolist()
        sure = [i for i, score in enumerate(scores) if score >= min_score]
        found = Detections(found.boxes[sure], found.scores[sure], found.labels[sure])
        tiles.append(_tile(pixels, truth, found, names))
        labels |= set(found.labels.tolist()) | set(truth.labels.tolist())
    legend = [("true box", _TRUE_COLOUR)]
    legend += [(f"found: {names[label]}", _colour(label)) for label in sorted(labels)]
    title = f"{title}; dashed: no matching true box (IoU 0.5)" if title else title
    return _sheet(tiles, title, legend)


def _colour(label: int) -> tuple[int, int, int]:
    return _COLOURS[label % len(_COLOURS)]


def _tile(
    pixels: DecodedPixels, truth: Boxes, found: Detections, names: Sequence[str]
) -> Image.Image:
    height, width = pixels.shape[:2]
    low, high = _TILE_HEIGHT_PX
    by = min(min(max(height, low), high) / height, _TILE_WIDTH_PX / width)
    smooth = Image.Resampling.NEAREST if by >= 3 else Image.Resampling.BICUBIC
    size = max(1, round(width * by)), max(1, round(height * by))
    tile = Image.fromarray(_shown(pixels)).resize(size, smooth)
    draw = ImageDraw.Draw(tile)
    best_first = list(
        zip(*(tensor.tolist() for tensor in found), matched(found, truth).tolist(), strict=True)
    )
    for box, _, label, is_right in reversed(best_first):  # the best is drawn last, on top
        x0, y0, x1, y1 = _on_tile(box, by)
        _outline(draw, (x0 - 1, y0 - 1, x1 + 1, y1 + 1), _colour(label), is_dashed=not is_right)
    for box in truth.xyxy.tolist():
        draw.rectangle(_on_tile(box, by), outline=_TRUE_COLOUR, width=1)
    tags: list[_Rectangle] = []
    for box, score, label, _ in best_first:
        tag = _write_tag(
            draw, _on_tile(box, by), f"{names[label]} {score:.2f}", _colour(label), size, tags
        )
        tags += [tag] if tag else []
    return tile


def _outline(
    draw: ImageDraw.ImageDraw, box: _Rectangle, colour: tuple[int, int, int], *, is_dashed: bool
) -> None:
    """Draw a frame 3 pixels wide."""
    if not is_dashed:
        draw.rectangle(box, outline=colour, width=3)
        return
    x0, y0, x1, y1 = box
    for left in range(x0, x1 + 1, 2 * _DASH_PX):
        right = min(left + _DASH_PX - 1, x1)
        for top in (y0, y1 - 2):
            draw.rectangle((left, top, right, top + 2), fill=colour)
    for top in range(y0, y1 + 1, 2 * _DASH_PX):
        bottom = min(top + _DASH_PX - 1, y1)
        for left in (x0, x1 - 2):
            draw.rectangle((left, top, left + 2, bottom), fill=colour)


def _on_tile(box: Sequence[float], by: float) -> _Rectangle:
    """Return the first and the last pixel that a box covers on its tile."""
    x0, y0, x1, y1 = (round(place * by) for place in box)
    return x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)


def _write_tag(
    draw: ImageDraw.ImageDraw,
    box: _Rectangle,
    text: str,
    colour: tuple[int, int, int],
    size: tuple[int, int],
    taken: Sequence[_Rectangle],
) -> _Rectangle | None:
    """Write a tag at a corner of the box where it overlaps no other tag.

    Returns:
        The tag's rectangle, or None if there was no room.
    """
    font = ImageFont.load_default(size=_TAG_FONT_PX)
    width, height = int(font.getlength(text)) + 4, _TAG_FONT_PX + 2
    x0, y0, x1, y1 = box
    for left in (x0 - 1, x1 + 2 - width):
        for top in (y0 - height - 1, y1 + 2, y0 + 2, y1 - height - 1):
            left = max(0, min(left, size[0] - width))
            tag = (left, top, left + width - 1, top + height - 1)
            if top < 0 or tag[3] >= size[1] or any(_overlap(tag, other) for other in taken):
                continue
            draw.rectangle(tag, fill=colour)
            ink = "black" if sum(colour) > 380 else "white"
            place = (left + width / 2, top + height / 2)
            draw.text(place, text, fill=ink, font=font, anchor="mm")
            return tag
    return None


def _overlap(one: _Rectangle, other: _Rectangle) -> bool:
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _shown(pixels: DecodedPixels) -> Pixels:
    """Convert pixels to (H, W, 3), 8 bits."""
    channels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    white, full = float(np.percentile(channels, _WHITE_PERCENTILE)), np.iinfo(channels.dtype).max
    if white > _DARK_SHARE * full:
        white = full
    scaled = channels.astype(np.float32) * (255 / max(white, 1))
    return scaled.round().clip(0, 255).astype(np.uint8)


def _sheet(
    tiles: Sequence[Image.Image], title: str, legend: Sequence[tuple[str, tuple[int, int, int]]]
) -> Pixels:
    """Lay out rows of tiles, as many side by side as fit, below the title and the legend."""
    columns = max(1, min(len(tiles), _SHEET_WIDTH_PX // max(tile.width for tile in tiles)))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    font = ImageFont.load_default(size=_FONT_PX)
    widths = [sum(tile.width + _GUTTER_PX for tile in row) for row in rows]
    width = _GUTTER_PX + max(*widths, int(font.getlength(title)) + _GUTTER_PX)
    lines = _wrapped(legend, font, width)
    line_px = _FONT_PX + 10
    header_px = line_px * (1 + len(lines)) + _GUTTER_PX
    height = header_px + sum(max(tile.height for tile in row) + _GUTTER_PX for row in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_GUTTER_PX, line_px / 2), title, fill="black", font=font, anchor="lm")
    for number, line in enumerate(lines, start=1):
        middle = int(line_px * (number + 0.5))
        for left, text, colour in line:
            top = middle - _SWATCH_PX // 2
            swatch = (left, top, left + _SWATCH_PX, top + _SWATCH_PX)
            draw.rectangle(swatch, fill=(70, 70, 70), outline=colour, width=3)
            place = (left + _SWATCH_PX + 5, middle)
            draw.text(place, text, fill="black", font=font, anchor="lm")
    top = header_px
    for row in rows:
        left = _GUTTER_PX
        for tile in row:
            sheet.paste(tile, (left, top))
            left += tile.width + _GUTTER_PX
        top += max(tile.height for tile in row) + _GUTTER_PX
    return np.array(sheet)  # a copy: PIL's own memory is read-only, and torch warns about that


def _wrapped(
    legend: Sequence[tuple[str, tuple[int, int, int]]], font: Any, width: int
) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """Break the legend into lines of (left, text, colour) that fit into `width`."""
    lines: list[list[tuple[int, str, tuple[int, int, int]]]] = [[]]
    left = _GUTTER_PX
    for text, colour in legend:
        entry_px = _SWATCH_PX + 5 + int(font.getlength(text)) + 1 + 2 * _GUTTER_PX
        if lines[-1] and left + entry_px > width:
            lines.append([])
            left = _GUTTER_PX
        lines[-1].append((left, text, colour))
        left += entry_px
    return lines


def precision_recall_picture(scores: DetectionScores, title: str) -> Pixels:
    """Draw the curve of each class with a true box, at an IoU of 0.5, and name the best 20.

    Returns:
        (height, width, 3), RGB.
    """
    figure = Figure(figsize=(7.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    best = sorted(scores.curves.items(), key=lambda item: -item[1].ap50)
    for rank, (name, curve) in enumerate(best):
        label = f"{name}  AP50 {curve.ap50:.3f}" if rank < _NUM_LEGEND_CURVES else None
        axes.plot(curve.recall, curve.precision, label=label, linewidth=1.8)
    axes.set(
        xlabel="recall",
        ylabel="precision, at IoU 0.5",
        xlim=(0, 1.01),
        ylim=(0, 1.03),
    )
    axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium", wrap=True)
    if best:
        figure.legend(loc="outside right center", frameon=False, fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, format="png")  # uses Agg, so no display is needed
    return np.array(Image.open(png).convert("RGB"))
