"""Draw scenes with known labels: data for the demo and the tests, without a download.

A scene has one large object and sometimes small ones of any class. A class is a shape and the
strokes that fill it. Place, size, tilt, colours and background are independent of the class, the
strokes begin anywhere, and the object is darker or brighter than its background. So pixels in
fixed places say little about the class, while a model learns within a minute to continue strokes
from the visible patches into the masked ones. Scene i depends on (seed, i) alone, so any range
can be drawn on any machine.
"""

import io
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from mae_core.data.randomness import named_generator

JPEG_QUALITY = 90
MAX_DISTRACTORS = 2
_DISTRACTOR_SHARES = (0.5, 0.3, 0.2)  # shares of scenes with 0, 1 and 2 small objects
_MAX_TILT = 0.3  # radians; below pi / 8, so that stripes and diagonals differ
_OVERSAMPLING = 4  # masks are drawn with sides this much larger and then averaged

Floats = npt.NDArray[np.floating[Any]]
Points = npt.NDArray[np.float64]  # (N, 2), x and y, inside the unit circle


class SceneObject(NamedTuple):
    category: int  # index in SHAPE_CLASSES
    bbox: tuple[int, int, int, int]  # x, y, width, height in pixels, of the visible part


class Scene(NamedTuple):
    label: int  # the large object's index in SHAPE_CLASSES
    pixels: npt.NDArray[np.uint8]  # (S, S, 3)
    segmentation: npt.NDArray[np.uint8]  # (S, S); 0 is background, k is SHAPE_CLASSES[k - 1]
    objects: tuple[SceneObject, ...]  # the large one first


def _regular(num_points: int, phase: float = 0.0) -> Points:
    angle = np.arange(num_points) * (2 * math.pi / num_points) + phase
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star() -> Points:
    return _regular(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]


def _cross() -> Points:
    a, b = 0.30, 0.95
    quarter = np.asarray([(b, -a), (b, a), (a, a)])
    half = np.concatenate([quarter, quarter @ [(0, 1), (-1, 0)]])
    return np.concatenate([half, -half])


def _crescent() -> Points:
    outer = np.linspace(0.25 * math.pi, 1.75 * math.pi, 28)
    inner = np.linspace(1.70 * math.pi, 0.30 * math.pi, 22)
    back = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    front = np.stack([0.34 + 0.72 * np.cos(inner), 0.72 * np.sin(inner)], axis=1)
    return np.concatenate([back, front])


def _heart() -> Points:
    t = np.linspace(0, 2 * math.pi, 36, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], axis=1) / 17


def _arrow() -> Points:
    return np.asarray(
        [(1, 0), (0.2, 0.8), (0.2, 0.3), (-0.95, 0.3), (-0.95, -0.3), (0.2, -0.3), (0.2, -0.8)]
    )


def _bowtie() -> Points:
    return np.asarray([(0.72, -0.7), (0.72, 0.7), (0.1, 0), (-0.72, 0.7), (-0.72, -0.7), (-0.1, 0)])


# The outline of each class's shape; a ring is drawn as a disc with a hole.
_OUTLINES: dict[str, Points] = {
    "disc": _regular(40) * 0.9,
    "ring": _regular(40) * 0.95,
    "crescent": _crescent(),
    "heart": _heart(),
    "triangle": _regular(3),
    "square": _regular(4) * 0.98,
    "star": _star(),
    "cross": _cross(),
    "arrow": _arrow(),
    "bowtie": _bowtie() * 1.05,
}
SHAPE_CLASSES = tuple(_OUTLINES)
_HOLES = {"ring": _regular(40) * 0.52}


class _Place(NamedTuple):
    x: float  # share of the side
    y: float
    radius: float


class _Pose(NamedTuple):
    """Maps an object's own frame, with its outline in the unit circle, to shares of the side."""

    turn: Floats  # (2, 2), multiplied from the right to a row vector
    offset: Floats  # (2,)


class _Palette(NamedTuple):
    background: Floats  # (2, 3), two colours
    object: Floats  # (2, 3), colour of the strokes and of the space between them


def draw_scene(seed: int, index: int, size: int) -> Scene:
    """Draw scene `index` as a square of `size` pixels."""
    generator = named_generator(seed, "shapes", index)
    label = int(generator.integers(len(SHAPE_CLASSES)))
    palette = _palette(generator)
    canvas = _background(size, palette.background)
    segmentation = np.zeros((size, size), dtype=np.uint8)
    places = _places(generator)
    others = generator.integers(len(SHAPE_CLASSES), size=len(places) - 1)
    objects = []
    for place, category in zip(places, [label, *map(int, others)], strict=True):
        name, pose = SHAPE_CLASSES[category], _pose(generator, place)
        coverage = _mask(name, pose, size)
        share = _strokes(generator, name, pose, size)
        canvas = _paint(canvas, coverage, _mix(palette.object, share))
        inside = np.asarray(coverage) >= 128
        if inside.any():
            segmentation[inside] = category + 1
            objects.append(SceneObject(category, _bounding_box(inside)))
    grain = generator.standard_normal(canvas.shape, dtype=np.float32)
    canvas += grain * np.float32(generator.uniform(0.5, 2.0))
    pixels = np.clip(canvas, 0, 255).round().astype(np.uint8)
    return Scene(label, pixels, segmentation, tuple(objects))


def encode_scene(scene: Scene) -> dict[str, bytes]:
    """Encode a scene as the members of its sample: extension to content."""
    height, width = scene.segmentation.shape
    boxes = [
        {"bbox": list(item.bbox), "category_id": item.category + 1, "category": name}
        for item in scene.objects
        for name in [SHAPE_CLASSES[item.category]]
    ]
    picture, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(scene.pixels).save(picture, "JPEG", quality=JPEG_QUALITY)
    Image.fromarray(scene.segmentation).save(mask, "PNG")
    text = json.dumps({"width": width, "height": height, "objects": boxes})
    return {
        "cls": str(scene.label).encode(),
        "jpg": picture.getvalue(),
        "json": text.encode(),
        "seg.png": mask.getvalue(),
    }


def _places(generator: np.random.Generator) -> list[_Place]:
    """Choose one large place, and small ones that touch neither it nor each other."""
    radius = generator.uniform(0.30, 0.46)
    x, y = generator.uniform(0.28, 0.72, size=2)  # parts may lie outside
    places = [_Place(x, y, radius)]
    for _ in range(int(generator.choice(MAX_DISTRACTORS + 1, p=_DISTRACTOR_SHARES))):
        for _ in range(40):
            radius = generator.uniform(0.06, 0.1)
            x, y = generator.uniform(radius, 1 - radius, size=2)
            if all(math.hypot(x - p.x, y - p.y) > radius + p.radius for p in places):
                places.append(_Place(x, y, radius))
                break
    return places


def _pose(generator: np.random.Generator, place: _Place) -> _Pose:
    angle, stretch = generator.uniform(-_MAX_TILT, _MAX_TILT), generator.uniform(0.85, 1.0)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.asarray([[cos, sin], [-sin * stretch, cos * stretch]]) * place.radius
    return _Pose(turn, np.asarray([place.x, place.y]))


def _mask(name: str, pose: _Pose, size: int) -> Image.Image:
    """Draw how much of each pixel the shape covers, 0 to 255."""
    image = Image.new("L", (size * _OVERSAMPLING, size * _OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    outlines = [(_OUTLINES[name], 255)] + ([(_HOLES[name], 0)] if name in _HOLES else [])
    for outline, value in outlines:
        points = (outline @ pose.turn + pose.offset) * (size * _OVERSAMPLING)
        draw.polygon(points.ravel().tolist(), fill=value)
    return image.reduce(_OVERSAMPLING)


def _strokes(generator: np.random.Generator, name: str, pose: _Pose, size: int) -> Floats:
    """Compute how much of each pixel is stroke: (S, S), 0 to 1, also outside the shape."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    inverse = np.linalg.inv(pose.turn).astype(np.float32)
    across, down = centres - np.float32(pose.offset[0]), centres - np.float32(pose.offset[1])
    x = across[None] * inverse[0, 0] + down[:, None] * inverse[1, 0]
    y = across[None] * inverse[0, 1] + down[:, None] * inverse[1, 1]
    # All classes have the same stroke widths, so that these reveal no class.
    pitch = np.float32(generator.uniform(1.8, 3.2))
    if name not in _CENTRED:
        x, y = x + np.float32(generator.uniform(0, 1)), y + np.float32(generator.uniform(0, 1))
    sign = np.float32(generator.choice([-1, 1]))
    return 0.5 + 0.5 * np.tanh(_SHARPNESS * sign * _STROKES[name](x, y, pitch))


def _mix(colours: Floats, share: Floats) -> Floats:
    return colours[0] + (colours[1] - colours[0]) * share[..., None]


def _paint(canvas: Floats, coverage: Image.Image, filling: Floats) -> Floats:
    """Draw an object with a soft shadow on the canvas."""
    size = canvas.shape[0]
    blurred = coverage.filter(ImageFilter.GaussianBlur(size / 40))
    shift = max(1, size // 32)
    shadow = np.zeros((size, size, 1), np.float32)
    shadow[shift:, shift:, 0] = np.asarray(blurred)[:-shift, :-shift]
    canvas = canvas * (1 - shadow * (0.45 / 255))
    alpha = np.asarray(coverage, dtype=np.float32)[..., None] / 255
    return canvas + (filling - canvas) * alpha


def _palette(generator: np.random.Generator) -> _Palette:
    """Choose a background and strokes of high contrast, in any hues."""
    levels = [generator.uniform(60, 130), generator.uniform(110, 190)]
    background, strokes = generator.permutation(levels)
    return _Palette(
        _pair(generator, background, -generator.uniform(6, 14)),
        _pair(generator, strokes, -generator.uniform(30, 60)),
    )


def _pair(generator: np.random.Generator, brightness: float, contrast: float) -> Floats:
    """Choose two related colours whose brightness is `contrast` above and below `brightness`."""
    hue = generator.uniform(0, 2 * math.pi) + np.asarray([0.0, generator.uniform(-1.2, 1.2)])
    # The channels' phases are a third of a turn apart, so a hue does not change their mean.
    wheel = np.cos(hue[:, None] - np.asarray([0.0, 2.1, 4.2]))  # (2, 3)
    spread = np.asarray([-contrast, contrast])
    colours = (brightness + spread)[:, None] + wheel * generator.uniform(10, 36)
    return np.clip(colours, 0, 255).astype(np.float32)


def _background(size: int, colours: Floats) -> Floats:
    """Draw a gradient from the first colour in the middle to the second in the corners."""
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return _mix(colours, 2 * (ramp[None] ** 2 + ramp[:, None] ** 2))


def _bounding_box(inside: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


# Strokes are functions of a place (x, y) in the object's frame, positive on a stroke. `pitch` is
# the number of strokes side by side along a radius.
_SHARPNESS = 2.5
_CENTRED = ("disc", "ring", "triangle")  # their strokes belong to the object's middle or axis
_TURN = np.float32(2 * math.pi)
_Strokes = Callable[[Floats, Floats, np.float32], Floats]


def _wave(t: Floats) -> Floats:
    return np.cos(_TURN * t)


def _circles(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    return _wave(np.hypot(x, y) * pitch)


def _spokes(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    return _wave(np.arctan2(y, x) * (np.round(pitch * 4) / _TURN))


def _level(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    return _wave(y * pitch)


def _upright(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    return _wave(x * pitch)


def _diagonal(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    return _wave((x + y) * (pitch * np.float32(0.71)))


def _dots(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    return _wave(x * pitch) + _wave(y * pitch) - np.float32(0.7)


def _checks(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    half = pitch * np.float32(0.7)
    return 2 * _wave(x * half) * _wave(y * half)


def _grid(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    lines = np.maximum(_wave(x * pitch), _wave(y * pitch))
    return 2 * (lines - np.float32(0.6))


def _chevrons(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    return _wave((y + np.abs(x)) * (pitch * np.float32(0.71)))


def _ripples(x: Floats, y: Floats, pitch: np.float32) -> Floats:
    return _wave((y + np.float32(0.12) * np.sin(x * (_TURN * np.float32(1.3)))) * pitch)


# None becomes another when mirrored left to right, so a flip keeps the class.
_STROKES: dict[str, _Strokes] = {
    "disc": _circles,
    "ring": _spokes,
    "crescent": _level,
    "heart": _dots,
    "triangle": _chevrons,
    "square": _checks,
    "star": _diagonal,
    "cross": _grid,
    "arrow": _upright,
    "bowtie": _ripples,
}
