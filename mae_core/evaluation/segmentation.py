"""Measure how well pixels are classified, in numbers and in a picture.

Truth and prediction are class indices; pixels whose truth is `IGNORE` are not counted. Scores are
in 0..1. They come from counts summed over all images, not from means over images.
"""

import colorsys
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from mae_core.data.label_maps import IGNORE, InstanceMap, LabelMap, classes_to_instances
from mae_core.data.pixels import Pixels

Picture = npt.NDArray[np.uint8]  # (H, W, 3), RGB
Colour = tuple[int, int, int]

_COLUMNS = ("image", "truth", "prediction", "errors")
_TILE_PX = 256  # images are enlarged or reduced by an integer factor to at most this,
_LARGEST_TILE_PX = 512  # or kept as they are up to this size
_GUTTER_PX = 6
_SWATCH_PX = 14
_TITLE_FONT_PX, _FONT_PX = 20, 15
_DARK_IMAGE = 0.5  # an image below this share of full scale is brightened
_WRONG: Colour = (255, 0, 0)
_IGNORED: Colour = (210, 210, 210)
# Class 0 is dark, as it is usually the background. Then Okabe and Ito's colours, which colour-blind
# people can distinguish, without their red: https://jfly.uni-koeln.de/color.
_COLOURS: tuple[Colour, ...] = (
    (30, 30, 30),
    (86, 180, 233),
    (230, 159, 0),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (204, 121, 167),
)
_GOLDEN_RATIO = 0.618034  # step on the hue circle, which keeps the colours of later classes apart


class SegmentationScores(NamedTuple):
    miou: float  # mean of `iou_per_class`
    pixel_accuracy: float
    iou_per_class: dict[str, float]  # for the classes in the truth or the prediction


class InstanceMatches(NamedTuple):
    """Counts of instances; the counts of several images add up."""

    tp: int  # predicted instances that match a true one
    fp: int  # predicted instances without a true one
    fn: int  # true instances that were not predicted

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 1 if nothing exists and nothing was predicted."""
        return 2 * self.tp / (2 * self.tp + self.fp + self.fn) if sum(self) else 1.0


def confusion_counts(
    prediction: Int[Tensor, "*S"], truth: Int[Tensor, "*S"], num_classes: int
) -> Int[Tensor, "K K"]:
    """Count pixels by true class (row) and predicted class (column), int64, without `IGNORE`.

    Counts of batches add up. The result is on the device of `truth`.
    """
    counted = truth != IGNORE
    for name, classes in (("prediction", prediction), ("truth", truth)):
        wrong = counted & ((classes < 0) | (classes >= num_classes))
        if bool(wrong.any()):
            raise ValueError(f"{name} has class {int(classes[wrong][0])}, not 0..{num_classes - 1}")
    return multiclass_confusion_matrix(
        prediction, truth, num_classes, ignore_index=IGNORE, validate_args=False
    )


def scores_from_counts(counts: Int[Tensor, "K K"], names: Sequence[str]) -> SegmentationScores:
    """Compute PASCAL VOC's intersection over union of each class, and their mean.

    A class in neither the truth nor the prediction has no score and is left out; one that was
    predicted but never occurs scores 0.

    Args:
        counts: The sum of `confusion_counts` over the images.
        names: Names of the classes, in order.
    """
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{tuple(counts.shape)} counts for {len(names)} names of classes")
    if len(set(names)) != len(names):
        raise ValueError("two classes have the same name")
    table = counts.double().cpu()
    if not table.sum():
        raise ValueError("no pixel has a class: there is nothing to score")
    right = table.diagonal()
    union = table.sum(dim=0) + table.sum(dim=1) - right
    iou_per_class = {
        name: float(r / u) for name, r, u in zip(names, right, union, strict=True) if u > 0
    }
    return SegmentationScores(
        miou=sum(iou_per_class.values()) / len(iou_per_class),
        pixel_accuracy=float(right.sum() / table.sum()),
        iou_per_class=iou_per_class,
    )


def foreground_iou(counts: Int[Tensor, "K K"]) -> float:
    """Return the IoU of all classes but the first together; NaN where there are none."""
    table = counts.double().cpu()
    return float(table[1:, 1:].sum() / (table.sum() - table[0, 0]))


def instance_f1(
    predicted_classes: LabelMap, instance_map: InstanceMap, iou: float = 0.5, *, boundary: int = 1
) -> InstanceMatches:
    """Match the instances in predicted classes with the true ones, best overlap first.

    Source: the F1 at an IoU of Caicedo et al. 2019,
    https://pmc.ncbi.nlm.nih.gov/articles/PMC6771982. Perfect classes need not give 1: see
    `classes_to_instances`.

    Args:
        predicted_classes: (H, W), in the form that `instances_to_classes` returns.
        instance_map: (H, W), the truth: 0 is background, 1..N are instances.
        iou: Smallest intersection over union of a match.
        boundary: Width of the boundary in pixels, as in `instances_to_classes`.
    """
    instances = classes_to_instances(predicted_classes, boundary)
    found_number, found = np.unique(instances, return_inverse=True)
    true_number, true = np.unique(instance_map, return_inverse=True)
    table = np.zeros((len(found_number), len(true_number)), np.int64)
    np.add.at(table, (found.ravel(), true.ravel()), 1)
    union = table.sum(axis=0) + table.sum(axis=1)[:, None] - table
    overlap = (table / union)[found_number > 0][:, true_number > 0]
    num_found, num_true = overlap.shape
    num_matches = 0
    while overlap.size and overlap.max() >= iou:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = -1, -1
        num_matches += 1
    return InstanceMatches(num_matches, num_found - num_matches, num_true - num_matches)


def segmentation_picture(
    pixels: Sequence[Pixels],
    truths: Sequence[LabelMap],
    predictions: Sequence[LabelMap],
    names: Sequence[str],
    title: str,
) -> Picture:
    """Draw a row per image: the image, true and predicted classes over it, and the errors.

    Three channels are shown as RGB, of more the first three, of fewer the first one in grey; an
    image that uses less than half of its range is stretched. Small images are enlarged by an
    integer factor, without smoothing, and large ones reduced by one. The legend lists the classes
    that occur, in the colours that they have over a pixel of mean brightness.

    Args:
        pixels: (H, W, C) uint8 or uint16 each; sizes may differ.
        truths: (H, W) each; where it is `IGNORE`, all columns but the first are light grey.
        predictions: (H, W) each.
        names: Names of the classes, in order.
        title: Title of the whole picture.
    """
    if not pixels:
        raise ValueError("there is no image to show")
    rows, shown, levels = [], set[int](), []
    for image, truth, prediction in zip(pixels, truths, predictions, strict=True):
        if not image.shape[:2] == truth.shape == prediction.shape:
            raise ValueError(
                f"image {image.shape[:2]}, truth {truth.shape} and prediction {prediction.shape} "
                "are not of one size"
            )
        displayed = _displayed(image)
        levels.append(float(displayed.mean()))
        rows.append(_tiles(displayed, truth, prediction))
        shown |= {int(c) for c in np.unique(truth)} | {int(c) for c in np.unique(prediction)}
    level = round(sum(levels) / len(levels))
    legend = [(name, _blended(_colour(c), level)) for c, name in enumerate(names) if c in shown]
    if IGNORE in shown:
        legend.append(("ignored", _IGNORED))
    return _sheet(rows, [*legend, ("wrong", _WRONG)], title)


def _displayed(pixels: Pixels) -> Picture:
    channels = pixels[..., :3] if pixels.shape[2] >= 3 else pixels[..., :1].repeat(3, axis=2)
    full = np.iinfo(pixels.dtype).max
    black, white = np.percentile(channels, (0.5, 99.5))
    if white >= _DARK_IMAGE * full:
        black, white = 0, full
    scaled = (channels.astype(np.float32) - black) / max(float(white - black), 1.0)
    return (scaled * 255).round().clip(0, 255).astype(np.uint8)


def _colour(class_index: int) -> Colour:
    if class_index < len(_COLOURS):
        return _COLOURS[class_index]
    later = class_index - len(_COLOURS)
    rgb = colorsys.hsv_to_rgb(later * _GOLDEN_RATIO % 1, (0.5, 0.8)[later % 2], 0.9)
    return round(rgb[0] * 255), round(rgb[1] * 255), round(rgb[2] * 255)


def _blended(colour: Colour, level: int) -> Colour:
    """Return a class's colour over a grey pixel; must match the overlays in `_tiles`."""
    red, green, blue = (level // 2 + channel // 2 for channel in colour)
    return red, green, blue


def _tiles(image: Picture, truth: LabelMap, prediction: LabelMap) -> list[Image.Image]:
    """Draw the four pictures of a row."""
    table = np.array([_colour(c) for c in range(IGNORE + 1)], np.uint8)
    ignored = truth == IGNORE
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    # Half the brightness, so that the errors stand out.
    errors = (grey * 0.5).astype(np.uint8)
    errors[prediction != truth] = _WRONG
    overlays = [image // 2 + table[classes] // 2 for classes in (truth, prediction)]
    for tile in (*overlays, errors):
        tile[ignored] = _IGNORED
    return [_sized(tile) for tile in (image, *overlays, errors)]


def _sized(tile: Picture) -> Image.Image:
    longest = max(tile.shape[:2])
    enlarged = max(1, _TILE_PX // longest)
    drawn = Image.fromarray(tile.repeat(enlarged, axis=0).repeat(enlarged, axis=1))
    return drawn.reduce(math.ceil(longest / _LARGEST_TILE_PX))


def _sheet(
    rows: Sequence[Sequence[Image.Image]], legend: Sequence[tuple[str, Colour]], title: str
) -> Picture:
    """Lay out the title, column titles, rows of tiles and the legend."""
    title_font = ImageFont.load_default(size=_TITLE_FONT_PX)
    font = ImageFont.load_default(size=_FONT_PX)
    tile_px = max(tile.width for row in rows for tile in row)
    # Columns of narrow images are as wide as their titles.
    column_px = max(tile_px, *(math.ceil(font.getlength(name)) for name in _COLUMNS)) + _GUTTER_PX
    width = max(
        len(_COLUMNS) * column_px + _GUTTER_PX,
        math.ceil(title_font.getlength(title)) + 2 * _GUTTER_PX,
        max(_legend_entry_px(name, font) for name, _ in legend) + _GUTTER_PX,
    )
    top = _TITLE_FONT_PX + _FONT_PX + 5 * _GUTTER_PX
    lines = _legend_lines(legend, width, font)
    line_px = max(_SWATCH_PX, _FONT_PX) + _GUTTER_PX
    rows_px = sum(row[0].height + _GUTTER_PX for row in rows)
    height = top + rows_px + len(lines) * line_px + 2 * _GUTTER_PX
    sheet = Image.new("RGB", (width, height), (255,) * 3)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GUTTER_PX, _GUTTER_PX), title, fill="black", font=title_font)
    for column, name in enumerate(_COLUMNS):
        middle = _GUTTER_PX + column * column_px + (column_px - _GUTTER_PX) // 2
        draw.text((middle, top - _GUTTER_PX), name, fill="black", font=font, anchor="md")
        y = top
        for row in rows:
            sheet.paste(row[column], (middle - row[column].width // 2, y))
            y += row[column].height + _GUTTER_PX
    _draw_legend(draw, lines, top + rows_px + _GUTTER_PX, font)
    return np.array(sheet)  # a copy: PIL's own memory is read-only, and torch warns about that


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _legend_entry_px(name: str, font: _Font) -> int:
    return _SWATCH_PX + math.ceil(font.getlength(name)) + 4 * _GUTTER_PX


def _legend_lines(
    legend: Sequence[tuple[str, Colour]], width: int, font: _Font
) -> list[list[tuple[str, Colour, int]]]:
    """Place (name, colour, left edge) of each entry on lines that fit the sheet."""
    lines: list[list[tuple[str, Colour, int]]] = [[]]
    left = _GUTTER_PX
    for name, colour in legend:
        entry_px = _legend_entry_px(name, font)
        if left + entry_px > width and lines[-1]:
            lines.append([])
            left = _GUTTER_PX
        lines[-1].append((name, colour, left))
        left += entry_px
    return lines


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[Sequence[tuple[str, Colour, int]]],
    top: int,
    font: _Font,
) -> None:
    line_px = max(_SWATCH_PX, _FONT_PX) + _GUTTER_PX
    for number, line in enumerate(lines):
        y = top + number * line_px
        for name, colour, left in line:
            square = (left, y, left + _SWATCH_PX, y + _SWATCH_PX)
            draw.rectangle(square, fill=colour, outline="black")
            middle = (left + _SWATCH_PX + _GUTTER_PX, y + _SWATCH_PX // 2)
            draw.text(middle, name, fill="black", font=font, anchor="lm")
