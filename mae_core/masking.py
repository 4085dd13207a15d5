"""Choose which patches the encoder sees.

Polarity, here and everywhere: `mask` is True where a patch is REMOVED from the
encoder's input, which is where the loss is taken.

A mask is a ranking: the model keeps the patches with the smallest noise. It does not know which
kind of mask the noise encodes.

Source: He et al. 2021, https://arxiv.org/abs/2111.06377, section 3, "Masking".
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MaskKind = Literal["random", "block", "inverse_block", "grid", "uniform", "cell"]

# Bao et al. 2021, https://arxiv.org/abs/2106.08254, algorithm 1: a block's area and sides.
MIN_BLOCK_PATCHES = 16
MIN_BLOCK_ASPECT = 0.3


class PatchMask(NamedTuple):
    """The masking of a batch, in the three forms that its readers need."""

    ids_keep: Int[Tensor, "B K"]  # patches the encoder sees, by rising noise
    ids_removed: Int[Tensor, "B R"]  # the other R = L - K patches, by rising noise
    mask: Bool[Tensor, "B L"]  # True = removed


def num_patches_kept(num_patches: int, mask_ratio: float) -> int:
    """Return the number of patches kept per image.

    Rounds down as the reference does, and keeps at least one patch. Rounding is in floating
    point: of 196 patches a ratio of 0.8 keeps 39, and 0.9 keeps 19.
    """
    return max(1, int(num_patches * (1 - mask_ratio)))


def mask_from_noise(noise: Float[Tensor, "B L"], mask_ratio: float) -> PatchMask:
    """Keep the patches with the smallest noise, the same number in each image.

    Deterministic: the caller draws the noise and so controls the random seed.
    """
    num_kept = num_patches_kept(noise.shape[1], mask_ratio)
    # Stable sort: two patches with equal noise rank the same on every device.
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_keep, ids_removed = ids_shuffle[:, :num_kept], ids_shuffle[:, num_kept:]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter(1, ids_keep, value=False)
    return PatchMask(ids_keep, ids_removed, mask)


def draw_noise(
    generator: np.random.Generator,
    grid_size: tuple[int, int],
    *,
    kind: MaskKind,
    mask_ratio: float,
    cell: int = 1,
) -> npt.NDArray[np.float32]:
    """Draw one sample's noise, (L,), whose ranking in `mask_from_noise` gives the wanted mask.

    Uses the generator of one sample, so a sample's mask does not depend on its batch.

    Args:
        generator: The generator of this sample and epoch.
        grid_size: Rows and columns of patches.
        kind: random: each patch on its own; block: remove rectangles (see `_block_mask`);
            inverse_block: keep one rectangle (see `_inverse_block_mask`); grid: keep the top left
            patch of every 2x2 (He et al. 2021, figure 6); uniform: keep as many random patches of
            each 2x2 (Li et al. 2022, https://arxiv.org/abs/2205.10063); cell: keep or remove whole
            cells of `cell` x `cell` patches (Pixio, Yang et al. 2025, with cells of 4).
        mask_ratio: Share of patches removed; pass the same number to `mask_from_noise`. Where it
            does not fit, one cell is split, or some squares lose one patch more than others.
        cell: Side of a cell in patches, for kind=cell; the cells at the edges may be cut off.
    """
    rows, columns = grid_size
    noise = generator.random(rows * columns, dtype=np.float32)
    if kind == "random":
        return noise
    if kind == "uniform":
        return noise + _place_in_square(noise.reshape(grid_size)).ravel()
    if kind == "cell":
        return noise + _cell_ranks(generator, grid_size, cell).ravel()
    num_kept = num_patches_kept(rows * columns, mask_ratio)
    if kind == "block":
        removed = _block_mask(generator, grid_size, rows * columns - num_kept)
    elif kind == "inverse_block":
        removed = _inverse_block_mask(generator, grid_size, num_kept)
    else:
        removed = _grid_mask(grid_size, mask_ratio)
    # Noise is in [0, 1), so every removed patch now ranks behind every kept one.
    noise[removed.ravel()] += 1
    return noise


def _place_in_square(noise: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return each patch's place, from 0 on, in the order of noise within its 2x2."""
    rows, columns = noise.shape
    padded = np.full((rows + rows % 2, columns + columns % 2), np.inf, np.float32)
    padded[:rows, :columns] = noise
    squares = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2).transpose(0, 2, 1, 3)
    flat = squares.reshape(*squares.shape[:2], 4)
    places = flat.argsort(axis=-1, kind="stable").argsort(axis=-1).reshape(squares.shape)
    return places.transpose(0, 2, 1, 3).reshape(padded.shape)[:rows, :columns].astype(np.float32)


def _cell_ranks(
    generator: np.random.Generator, grid_size: tuple[int, int], cell: int
) -> npt.NDArray[np.float32]:
    """Return for each patch the rank of its cell in a random order of the cells."""
    rows, columns = grid_size
    down, across = -(-rows // cell), -(-columns // cell)
    ranks = generator.permutation(down * across).reshape(down, across).astype(np.float32)
    return ranks.repeat(cell, axis=0).repeat(cell, axis=1)[:rows, :columns]


def _inverse_block_mask(
    generator: np.random.Generator, grid_size: tuple[int, int], num_kept: int
) -> npt.NDArray[np.bool_]:
    """Keep one rectangle of exactly `num_kept` patches, and remove all others.

    It may go over an edge and on at the opposite one, so that every patch is kept equally often;
    its last row may be cut off. Source: CAPI, Darcet et al. 2025, https://arxiv.org/abs/2502.08769.
    Differs: the sides are drawn as those of `_block_mask`.
    """
    rows, columns = grid_size
    aspect_draw, row_draw, column_draw = generator.random(3).tolist()
    aspect = MIN_BLOCK_ASPECT ** (1 - 2 * aspect_draw)
    width = min(columns, max(1, round(math.sqrt(num_kept / aspect)), -(-num_kept // rows)))
    places = np.arange(num_kept)
    removed = np.ones(grid_size, dtype=np.bool_)
    row = (int(row_draw * rows) + places // width) % rows
    column = (int(column_draw * columns) + places % width) % columns
    removed[row, column] = False
    return removed


def _block_mask(
    generator: np.random.Generator, grid_size: tuple[int, int], num_removed: int
) -> npt.NDArray[np.bool_]:
    """Remove rectangles until exactly `num_removed` patches are gone.

    Source: Bao et al. 2021, https://arxiv.org/abs/2106.08254, algorithm 1.
    Differs: a rectangle always covers a patch that is still there, so that each one makes
    progress, and it is cut off where the number is reached; theirs may end near the number.
    """
    rows, columns = grid_size
    removed = np.zeros(rows * columns, dtype=np.bool_)
    grid = removed.reshape(grid_size)
    missing = num_removed
    while missing > 0:
        area_draw, aspect_draw, patch_draw, row_draw, column_draw = generator.random(5).tolist()
        smallest = min(MIN_BLOCK_PATCHES, missing)
        area = smallest + area_draw * (missing - smallest)
        aspect = MIN_BLOCK_ASPECT ** (1 - 2 * aspect_draw)  # log-uniform, height over width
        height = min(rows, max(1, round(math.sqrt(area * aspect))))
        width = min(columns, max(1, round(math.sqrt(area / aspect))))

        there = np.flatnonzero(~removed)
        row, column = divmod(int(there[int(patch_draw * len(there))]), columns)
        top = _cover(row, height, rows, row_draw)
        left = _cover(column, width, columns, column_draw)
        block = grid[top : top + height, left : left + width]
        fresh = np.flatnonzero(~block)[:missing]
        block.flat[fresh] = True
        missing -= len(fresh)
    return grid


def _cover(position: int, length: int, size: int, draw: float) -> int:
    """Return the start of a span of `length` in `size` over `position`; `draw` is in [0, 1)."""
    first = max(0, position - length + 1)
    last = min(position, size - length)
    return first + int(draw * (last - first + 1))


def _grid_mask(grid_size: tuple[int, int], mask_ratio: float) -> npt.NDArray[np.bool_]:
    rows, columns = grid_size
    if mask_ratio != 0.75:
        raise ValueError(f"kind=grid keeps one patch of four: mask_ratio={mask_ratio} is not 0.75")
    if rows % 2 or columns % 2:
        raise ValueError(f"kind=grid needs an even number of patches a side, not {rows}x{columns}")
    removed = np.ones(grid_size, dtype=np.bool_)
    removed[::2, ::2] = False
    return removed
