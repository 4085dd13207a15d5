import numpy as np

from mae_core.evaluation.masks_picture import masks_picture

WHITE = np.full((64, 64, 3), 255, np.uint8)


def grey_shares(picture: np.ndarray, columns: int, rows: int) -> np.ndarray:
    """Return the share of removed pixels of each tile; a tile has 128 pixels and a gap of 4."""
    header = picture.shape[0] - rows * 132
    tiles = picture[header:, 4 : 4 + columns * 132].reshape(rows, 132, columns, 132, 3)
    return (tiles[:, :128, :, :128] == 128).all(axis=-1).mean(axis=(1, 3))


def test_each_kind_is_a_column_and_removes_the_same_share() -> None:
    picture = masks_picture(WHITE, patch_size=8, mask_ratio=0.75, cell=2, seeds=[0, 1])
    assert np.allclose(grey_shares(picture, columns=6, rows=2), 0.75)


def test_grid_is_left_out_where_it_cannot_be() -> None:
    for size, mask_ratio in [(64, 0.5), (56, 0.75)]:
        pixels = WHITE[:size, :size]
        picture = masks_picture(pixels, patch_size=8, mask_ratio=mask_ratio, cell=2, seeds=[0])
        whole = masks_picture(WHITE, patch_size=8, mask_ratio=0.75, cell=2, seeds=[0])
        assert picture.shape[1] < whole.shape[1]
