import numpy as np
import pytest

from mae_core.evaluation.attention_picture import attention_picture


@pytest.mark.parametrize(("channels", "kind"), [(3, np.uint8), (1, np.uint8), (5, np.uint16)])
def test_an_image_is_dimmed_where_it_has_little_weight(channels: int, kind: type) -> None:
    white = np.full((8, 8, channels), np.iinfo(kind).max, kind)
    weights = np.asarray([[0.8, 0.0], [0.1, 0.1]], np.float32)
    picture = attention_picture([white, white], [weights, weights.T], "title")
    assert picture.shape == (342, 320, 3)
    assert (picture[22:182] == 255).all()  # as they are
    first, second = picture[182:, :160, 0], picture[182:, 160:, 0]
    assert first[10, 10] == second[10, 10] == 255
    assert first[10, 150] == second[150, 10] == 38  # 0.15
    assert first[150, 10] == 65  # 0.15 + 0.85 / 8
