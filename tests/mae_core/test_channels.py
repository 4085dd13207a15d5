"""The first convolution for other channels is timm's."""

import pytest
import torch
from timm.models import adapt_input_conv

from mae_core.interchange.channels import adapt_convolution, adapt_statistics


@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 13])
def test_kernels_of_three_channels_are_fitted_as_timm_does(in_chans: int) -> None:
    weight = torch.randn(5, 3, 2, 2)
    found = adapt_convolution(weight, in_chans)
    assert found.shape == (5, in_chans, 2, 2)
    assert torch.equal(found, adapt_input_conv(in_chans, weight))


def test_a_grey_kernel_keeps_its_sum_for_three_channels() -> None:
    weight = torch.randn(5, 1, 2, 2)
    assert torch.allclose(adapt_convolution(weight, 3).sum(1, keepdim=True), weight)


def test_channels_that_nothing_relates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"take 13 channels; only those of 1 or 3"):
        adapt_convolution(torch.zeros(2, 13, 1, 1), 3)


def test_statistics_are_averaged_or_repeated() -> None:
    assert adapt_statistics((0.2, 0.4, 0.6), 1) == pytest.approx((0.4,))
    assert adapt_statistics((0.2, 0.4, 0.6), 4) == (0.2, 0.4, 0.6, 0.2)
    assert adapt_statistics((0.2, 0.4, 0.6), 3) == (0.2, 0.4, 0.6)
