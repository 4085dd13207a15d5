import numpy as np

from mae_core.evaluation.tile_sheet import tile_sheet


def test_tiles_stand_in_their_rows_and_columns_below_the_names() -> None:
    tiles = np.zeros((2, 2, 64, 64, 3), np.uint8)
    tiles[0, 1] = [255, 0, 0]
    tiles[1, 0] = [0, 0, 255]
    sheet = tile_sheet(tiles, ["left", "right"])
    top = sheet.shape[0] - 2 * 132
    assert sheet[top + 64, 4 + 132 + 64].tolist() == [255, 0, 0]
    assert sheet[top + 132 + 64, 4 + 64].tolist() == [0, 0, 255]
    assert (sheet[:top] < 128).any()  # the names
    assert tile_sheet(tiles, ["left", "right"], "title").shape[0] > sheet.shape[0]
