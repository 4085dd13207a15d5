import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from mae_core.model.positions import resample_positions, sincos_positions


def reference_positions(rows: int, columns: int, dim: int) -> npt.NDArray[np.float64]:
    """Compute the formula one number at a time."""
    table = np.empty((rows * columns, dim))
    quarter = dim // 4
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                omega = 1 / 10_000 ** (k / quarter)
                quarters = np.sin, np.cos, np.sin, np.cos
                places = column, column, row, row
                for q in range(4):
                    angle = places[q] * omega
                    table[row * columns + column, q * quarter + k] = quarters[q](angle)
    return table


# Parity P1; against transformers' own table in test_parity.py.
@pytest.mark.parametrize("grid_size", [(4, 4), (16, 16), (3, 5)])
@pytest.mark.parametrize("dim", [8, 64])
def test_positions_follow_the_formula(grid_size: tuple[int, int], dim: int) -> None:
    positions = sincos_positions(grid_size, dim)
    assert positions.dtype == torch.float32
    difference = np.abs(positions.double().numpy() - reference_positions(*grid_size, dim))
    assert difference.max() <= 1e-7


def test_positions_of_a_non_square_grid_by_hand() -> None:
    sin_1, cos_1, sin_2, cos_2 = 0.8414709848, 0.5403023059, 0.9092974268, -0.4161468365
    assert sincos_positions((2, 3), 4).tolist() == [
        pytest.approx([0, 1, 0, 1]),  # x = 0, y = 0: sin x, cos x, sin y, cos y
        pytest.approx([sin_1, cos_1, 0, 1]),
        pytest.approx([sin_2, cos_2, 0, 1]),
        pytest.approx([0, 1, sin_1, cos_1]),
        pytest.approx([sin_1, cos_1, sin_1, cos_1]),
        pytest.approx([sin_2, cos_2, sin_1, cos_1]),
    ]


def test_rejects_a_width_that_four_does_not_divide() -> None:
    with pytest.raises(ValueError, match="dim=6 is not a multiple of 4"):
        sincos_positions((2, 2), 6)


def test_the_same_grid_is_not_resampled() -> None:
    positions = sincos_positions((3, 5), 8)
    assert resample_positions(positions, (3, 5), (3, 5)) is positions


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("new_grid_size", [(6, 10), (5, 3), (2, 2)])
def test_resampling_is_bicubic_over_the_image(
    new_grid_size: tuple[int, int], antialias: bool
) -> None:
    positions = sincos_positions((3, 5), 8)
    picture = positions.reshape(1, 3, 5, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(picture, size=new_grid_size, mode="bicubic", antialias=antialias)
    resampled = resample_positions(positions, (3, 5), new_grid_size, antialias=antialias)
    assert torch.allclose(resampled, expected[0].flatten(1).T, atol=1e-6)


def test_resampling_is_antialiased_unless_told_otherwise() -> None:
    positions = sincos_positions((4, 4), 8)
    default = resample_positions(positions, (4, 4), (8, 8))
    assert torch.equal(default, resample_positions(positions, (4, 4), (8, 8), antialias=True))
    plain = resample_positions(positions, (4, 4), (8, 8), antialias=False)
    assert (default - plain).abs().max() > 0.01
