"""Fit the first convolution and the channel statistics to another number of channels.

As timm does (`timm.models.adapt_input_conv`): for one channel the kernels are summed; for more than
three they are repeated, scaled by 3 / channels so that the sum keeps its size.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

ADAPTABLE = (1, 3)


def adapt_convolution(weight: Float[Tensor, "D C p p"], in_chans: int) -> Float[Tensor, "D A p p"]:
    """Return the kernels for `in_chans` channels.

    Raises:
        ValueError: Nothing says how these channels correspond.
    """
    own = weight.shape[1]
    if in_chans == own:
        return weight
    if own not in ADAPTABLE:
        raise ValueError(
            f"the weights take {own} channels; only those of 1 or 3 can be fitted to {in_chans}"
        )
    if in_chans == 1:
        return weight.sum(dim=1, keepdim=True)
    repeated = weight.repeat(1, -(-in_chans // own), 1, 1)[:, :in_chans]
    return repeated * (own / in_chans)


def adapt_statistics(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Return a mean or deviation for `in_chans` channels: their mean for one, else repeated."""
    if in_chans == len(values):
        return tuple(values)
    if in_chans == 1:
        return (float(torch.tensor(values, dtype=torch.float64).mean()),)
    return tuple(values[channel % len(values)] for channel in range(in_chans))
