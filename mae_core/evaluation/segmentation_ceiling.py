"""What a segmentation head could reach at most, given the grid of its output.

A head predicts at every few pixels and its logits are enlarged. Objects and boundaries that are
finer than this grid are lost, however good the encoder is. An oracle shows how much: it knows the
true share of each class in each cell of the grid.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.data.label_maps import IGNORE, LabelMap
from mae_core.model.segmenter import sliding_window_logits


class GridOracle(nn.Module):
    """Answer with the class shares of each cell of a grid, enlarged as a head's logits are."""

    weights: Tensor

    def __init__(self, stride: int, weights: Float[Tensor, " K"]) -> None:
        """Take pixels per cell, and the factor of each class in the loss."""
        super().__init__()
        self.stride = stride
        self.register_buffer("weights", weights)

    def forward(self, one_hot: Float[Tensor, "B K H W"]) -> Float[Tensor, "B K H W"]:
        """Return the shares that minimise the weighted cross-entropy of each cell."""
        shares = F.avg_pool2d(one_hot, self.stride) * self.weights[:, None, None]
        shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-9)  # a cell may be ignored
        return F.interpolate(shares, one_hot.shape[-2:], mode="bilinear", align_corners=False)


def oracle_classes(
    truth: LabelMap,
    *,
    output_stride: int,
    crop: tuple[int, int],
    stride: tuple[int, int],
    class_weights: Sequence[float] | None = None,
) -> LabelMap:
    """Return the classes that an oracle on the head's grid predicts for a picture.

    Args:
        truth: (H, W).
        output_stride: Pixels per place of the head's output; it must tile `crop`.
        crop: Height and width of a window; see `sliding_window_logits`.
        stride: Pixels from one window to the next.
        class_weights: Factor of each class in the loss, by default 1.
    """
    present = np.unique(truth[truth != IGNORE])
    if not len(present):
        return truth
    weights = np.ones(IGNORE) if class_weights is None else np.asarray(class_weights)
    oracle = GridOracle(output_stride, torch.from_numpy(weights[present]).float())
    one_hot = torch.from_numpy(truth == present[:, None, None]).float()
    shares = sliding_window_logits(oracle, one_hot[None], crop=crop, stride=stride)[0]
    found: LabelMap = present[shares.argmax(dim=0).numpy()]
    return found
