"""Fixed 2-D sine-cosine position embeddings.

Source: MoCo v3, Chen et al. 2021, https://arxiv.org/abs/2104.02057, in the layout of the MAE
authors' code: the first half encodes the column, the second half the row.
"""

import torch
from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor


def sincos_positions(
    grid_size: tuple[int, int], dim: int, temperature: float = 10_000.0
) -> Float[Tensor, "L D"]:
    """Return one row per patch, going row by row from the top left.

    A quarter of the columns each holds sin(x), cos(x), sin(y), cos(y).
    """
    if dim % 4:
        raise ValueError(f"dim={dim} is not a multiple of 4")
    rows, columns = grid_size
    # float64 as in the reference: a float32 angle is off in the sixth digit.
    exponents = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
    frequencies = temperature**-exponents
    y, x = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64),
        torch.arange(columns, dtype=torch.float64),
        indexing="ij",
    )
    angles_x = x.reshape(-1, 1) * frequencies  # (L, D/4)
    angles_y = y.reshape(-1, 1) * frequencies
    positions = [angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()]
    return torch.cat(positions, dim=1).float()


def resample_positions(
    positions: Float[Tensor, "L D"],
    grid_size: tuple[int, int],
    new_grid_size: tuple[int, int],
    *,
    antialias: bool = True,
) -> Float[Tensor, "M D"]:
    """Stretch the `positions` of one grid over another by bicubic interpolation.

    The image's corners keep their embeddings at any size, so a model keeps its sense of place.

    Args:
        positions: Embeddings of `grid_size`.
        grid_size: Rows and columns that they were made for.
        new_grid_size: Rows and columns wanted.
        antialias: True as in timm. Differs: the authors' code and transformers use False, which
            selects another kernel, also when enlarging.
    """
    if new_grid_size == grid_size:
        return positions
    resampled = resample_abs_pos_embed(
        positions[None],
        new_size=list(new_grid_size),
        old_size=list(grid_size),
        num_prefix_tokens=0,
        antialias=antialias,
    )
    return resampled[0]


def trained_table(
    positions: Float[Tensor, "N D"], grid_size: tuple[int, int], place: tuple[tuple[int, int], int]
) -> Float[Tensor, "L D"]:
    """Return a copy of trained embeddings, resampled to a model's grid.

    Args:
        positions: The trained embeddings.
        grid_size: Rows and columns that they were trained for.
        place: The model's own grid, and the width of its tokens.

    Raises:
        ValueError: The embeddings are not those of such a grid.
    """
    own_grid, dim = place
    expected = (grid_size[0] * grid_size[1], dim)
    if tuple(positions.shape) != expected:
        raise ValueError(f"positions are {tuple(positions.shape)}, expected {expected}")
    return resample_positions(positions.float(), grid_size, own_grid).detach().clone()
