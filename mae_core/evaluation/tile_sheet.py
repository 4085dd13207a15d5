"""Draw a table of pictures of one size, with a name above each column."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Pixels = npt.NDArray[np.uint8]

_TILE_PX = 128  # smaller tiles are enlarged to about this size
_GUTTER_PX = 4
_WHITE = 255


def tile_sheet(tiles: Pixels, names: Sequence[str], title: str = "") -> Pixels:
    """Lay out (rows, columns, H, W, 3) tiles below the title and the names of the columns.

    Small tiles are enlarged by an integer factor, without smoothing. An empty title takes no room.
    """
    factor = max(1, _TILE_PX // max(tiles.shape[2:4]))
    tiles = tiles.repeat(factor, axis=2).repeat(factor, axis=3)
    rows, columns, height, width = tiles.shape[:4]
    font_px = max(13, width // 18)
    font = ImageFont.load_default(size=font_px)
    # Columns of narrow images are as wide as their names.
    column_px = max(width, *(int(font.getlength(name)) + 1 for name in names)) + _GUTTER_PX
    line_px = font_px + 12
    names_top = line_px if title else 0
    header_px, row_px = names_top + line_px, height + _GUTTER_PX
    title_px = int(font.getlength(title)) + 2 * _GUTTER_PX
    sheet = Image.new(
        "RGB",
        (max(columns * column_px + _GUTTER_PX, title_px), header_px + rows * row_px),
        (_WHITE,) * 3,
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GUTTER_PX, line_px / 2), title, fill="black", font=font, anchor="lm")
    for column, name in enumerate(names):
        left = _GUTTER_PX + column * column_px + (column_px - _GUTTER_PX - width) // 2
        place = (left + width / 2, names_top + line_px / 2)
        draw.text(place, name, fill="black", font=font, anchor="mm")
        for row in range(rows):
            tile = Image.fromarray(tiles[row, column])
            sheet.paste(tile, (left, header_px + row * row_px))
    return np.array(sheet)  # a copy: PIL's own memory is read-only, and torch warns about that
