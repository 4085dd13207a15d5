"""The export's form of the encoder computes what the encoder does, at every size."""

import pytest
import torch
import torch.nn.functional as F

from mae_core.interchange.onnx_encoder import RawPixelEncoder, cubic_matrix
from tests.mae_core.test_foreign import make_mae


@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 9), (14, 5), (7, 1), (1, 3)])
def test_the_matrix_resamples_as_torch_does(old: int, new: int) -> None:
    values = torch.randn(1, 1, old, 3)
    expected = F.interpolate(values, (new, 3), mode="bicubic", antialias=True)[0, 0]
    found = cubic_matrix(torch.arange(1.0, new + 1), old) @ values[0, 0]
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (64, 8)])
def test_raw_pixels_give_the_encoders_tokens(size: tuple[int, int]) -> None:
    encoder = make_mae().encoder.eval()
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    pixels = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    images = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        tokens, features = RawPixelEncoder(encoder, mean, std)(pixels)
        expected = encoder(images)
    assert (tokens - expected).abs().max() <= 1e-4
    assert (features - expected[:, 1:].mean(1)).abs().max() <= 1e-4
