"""Drawn scenes with a known answer: data for the demo and the tests, without a download.

A scene has one large object, whose shape is the class, and up to two small ones of any shape.
Colour, texture, place, size, rotation and background say nothing about the class. Scene i is a
function of (seed, i) alone, so any range of scenes can be drawn anywhere.
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
_OVERSAMPLING = 4  # sides of a mask are drawn this much larger, then averaged

Floats = npt.NDArray[np.floating[Any]]
Points = npt.NDArray[np.float64]  # (N, 2), x and y, inside the unit circle


class SceneObject(NamedTuple):
    category: int  # index in SHAPE_CLASSES
    bbox: tuple[int, int, int, int]  # x, y, width, height in pixels, of what can be seen


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


# Class name to the outline of its shape; a ring is a disc with a hole.
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


def draw_scene(seed: int, index: int, size: int) -> Scene:
    """Draw scene `index`, `size` pixels square."""
    generator = named_generator(seed, "shapes", index)
    label = int(generator.integers(len(SHAPE_CLASSES)))
    first, second = _contrasting_colours(generator)
    canvas = _texture(generator, size, first)
    segmentation = np.zeros((size, size), dtype=np.uint8)
    places = _places(generator)
    others = generator.integers(len(SHAPE_CLASSES), size=len(places) - 1)
    objects = []
    for place, category in zip(places, [label, *map(int, others)], strict=True):
        coverage = _mask(generator, SHAPE_CLASSES[category], place, size)
        canvas = _paint(generator, canvas, coverage, second)
        inside = np.asarray(coverage) >= 128
        if inside.any():
            segmentation[inside] = category + 1
            objects.append(SceneObject(category, _bounding_box(inside)))
    grain = generator.standard_normal(canvas.shape, dtype=np.float32)
    canvas += grain * np.float32(generator.uniform(1.0, 5.0))
    pixels = np.clip(canvas, 0, 255).round().astype(np.uint8)
    return Scene(label, pixels, segmentation, tuple(objects))


def encode_scene(scene: Scene) -> dict[str, bytes]:
    """The members of its sample, extension to content."""
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
    """One large place, and small ones that do not touch it or each other."""
    radius = generator.uniform(0.22, 0.36)
    x, y = generator.uniform(radius * 0.85, 1 - radius * 0.85, size=2)
    places = [_Place(x, y, radius)]
    for _ in range(int(generator.integers(MAX_DISTRACTORS + 1))):
        for _ in range(12):
            radius = generator.uniform(0.08, 0.12)
            x, y = generator.uniform(radius, 1 - radius, size=2)
            if all(math.hypot(x - p.x, y - p.y) > radius + p.radius for p in places):
                places.append(_Place(x, y, radius))
                break
    return places


def _mask(generator: np.random.Generator, name: str, place: _Place, size: int) -> Image.Image:
    """How much of each pixel the shape covers, 0 to 255."""
    angle, stretch = generator.uniform(0, 2 * math.pi), generator.uniform(0.85, 1.0)
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.asarray([[cos, sin], [-sin * stretch, cos * stretch]]) * place.radius
    image = Image.new("L", (size * _OVERSAMPLING, size * _OVERSAMPLING))
    draw = ImageDraw.Draw(image)
    outlines = [(_OUTLINES[name], 255)] + ([(_HOLES[name], 0)] if name in _HOLES else [])
    for outline, value in outlines:
        points = (outline @ turn + (place.x, place.y)) * (size * _OVERSAMPLING)
        draw.polygon(points.ravel().tolist(), fill=value)
    return image.reduce(_OVERSAMPLING)


def _paint(
    generator: np.random.Generator, canvas: Floats, coverage: Image.Image, colours: Floats
) -> Floats:
    """Lay a textured object with a soft shadow on the canvas."""
    size = canvas.shape[0]
    blurred = coverage.filter(ImageFilter.GaussianBlur(size / 40))
    shift = max(1, size // 32)
    shadow = np.roll(np.asarray(blurred, dtype=np.float32), (shift, shift), (0, 1))[..., None]
    canvas = canvas * (1 - shadow * (0.45 / 255))
    alpha = np.asarray(coverage, dtype=np.float32)[..., None] / 255
    return canvas + (_texture(generator, size, colours) - canvas) * alpha


def _contrasting_colours(generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Two pairs of colours, one for the background and one for objects, apart in brightness."""
    dark, bright = generator.uniform(40, 100), generator.uniform(150, 225)
    first, second = (dark, bright) if generator.random() < 0.5 else (bright, dark)
    return _pair(generator, first), _pair(generator, second)


def _pair(generator: np.random.Generator, brightness: float) -> Floats:
    """Two related colours of nearly the same brightness."""
    hue = generator.uniform(0, 2 * math.pi) + np.asarray([0.0, generator.uniform(-1.2, 1.2)])
    # The three channels are a third of a turn apart, so a hue adds nothing to their mean.
    wheel = np.cos(hue[:, None] - np.asarray([0.0, 2.1, 4.2]))  # (2, 3)
    spread = np.asarray([-1.0, 1.0]) * generator.uniform(4, 16)
    colours = (brightness + spread)[:, None] + wheel * generator.uniform(12, 60)
    return np.clip(colours, 0, 255).astype(np.float32)


def _bounding_box(inside: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(inside.any(axis=0)), np.flatnonzero(inside.any(axis=1))
    x, y = int(columns[0]), int(rows[0])
    return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y


def _texture(generator: np.random.Generator, size: int, colours: Floats) -> Floats:
    """A square of one kind of texture between two colours."""
    kind = _TEXTURES[int(generator.integers(len(_TEXTURES)))]
    ramp = np.arange(size, dtype=np.float32) / size
    angle = generator.uniform(0, 2 * math.pi)
    along = ramp[None] * np.float32(math.cos(angle)) + ramp[:, None] * np.float32(math.sin(angle))
    across = ramp[:, None] * np.float32(math.cos(angle)) - ramp[None] * np.float32(math.sin(angle))
    share = kind(generator, along, across)[..., None]
    return colours[0] + (colours[1] - colours[0]) * share


def _gradient(generator: np.random.Generator, along: Floats, across: Floats) -> Floats:
    return np.abs(along)


def _stripes(generator: np.random.Generator, along: Floats, across: Floats) -> Floats:
    return 0.5 + 0.5 * np.sin(along * np.float32(2 * math.pi * generator.uniform(3, 9)))


def _checks(generator: np.random.Generator, along: Floats, across: Floats) -> Floats:
    frequency = np.float32(2 * math.pi * generator.uniform(2, 6))
    return 0.5 + 0.5 * np.sign(np.sin(along * frequency) * np.sin(across * frequency))


def _waves(generator: np.random.Generator, along: Floats, across: Floats) -> Floats:
    bend = np.float32(generator.uniform(0.05, 0.15)) * np.sin(across * np.float32(12))
    return 0.5 + 0.5 * np.sin((along + bend) * np.float32(2 * math.pi * generator.uniform(3, 7)))


def _clouds(generator: np.random.Generator, along: Floats, across: Floats) -> Floats:
    side = int(generator.integers(3, 9))
    coarse = Image.fromarray(generator.integers(0, 256, size=(side, side), dtype=np.uint8))
    smooth = coarse.resize(along.shape[::-1], Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32) / 255


_Texture = Callable[[np.random.Generator, Floats, Floats], Floats]
_TEXTURES: tuple[_Texture, ...] = (_gradient, _stripes, _checks, _waves, _clouds)
