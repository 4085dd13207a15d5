"""Draw what each kind of mask leaves of a picture."""

from collections.abc import Sequence
from typing import get_args

import numpy as np

from mae_core.data.randomness import named_generator
from mae_core.evaluation.tile_sheet import Pixels, tile_sheet
from mae_core.masking import MaskKind, draw_noise, num_patches_kept

KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
_GREY = 128
_GRID_RATIO = 0.75  # the only one that kind=grid has


def masks_picture(
    pixels: Pixels,
    *,
    patch_size: int,
    mask_ratio: float,
    cell: int,
    seeds: Sequence[int],
) -> Pixels:
    """Draw a column for each kind of mask and a row for each seed; removed patches are grey.

    grid is left out where it cannot be: at another ratio than 0.75, or on an odd grid.

    Args:
        pixels: (H, W, 3); patches tile it.
        patch_size: Side of a patch in pixels.
        mask_ratio: Share of patches removed.
        cell: Side of a cell in patches, for kind=cell.
        seeds: Each gives another draw.
    """
    rows, columns = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    fits_grid = mask_ratio == _GRID_RATIO and rows % 2 == columns % 2 == 0
    kinds = [kind for kind in KINDS if kind != "grid" or fits_grid]
    num_kept = num_patches_kept(rows * columns, mask_ratio)
    tiles = np.empty((len(seeds), len(kinds), *pixels.shape), np.uint8)
    for row, seed in enumerate(seeds):
        for column, kind in enumerate(kinds):
            generator = named_generator(seed, "mask")
            noise = draw_noise(
                generator, (rows, columns), kind=kind, mask_ratio=mask_ratio, cell=cell
            )
            removed = np.ones(rows * columns, bool)
            removed[noise.argsort(kind="stable")[:num_kept]] = False
            shown = removed.reshape(rows, columns).repeat(patch_size, 0).repeat(patch_size, 1)
            tiles[row, column] = np.where(shown[:, :, None], _GREY, pixels)
    title = f"{mask_ratio:.0%} of {rows}x{columns} patches removed, cells of {cell}x{cell}"
    return tile_sheet(tiles, kinds, title)
