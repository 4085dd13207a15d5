"""How far the predicted patches are from the image's patches.

The loss is computed for removed patches, and only for them.

Source: He et al. 2021, https://arxiv.org/abs/2111.06377, section 3, "Reconstruction target".
"""

from jaxtyping import Float
from torch import Tensor


def normalize_patches(patches: Float[Tensor, "B N P"], *, floor: float) -> Float[Tensor, "B N P"]:
    """Normalize each patch to zero mean and about unit variance over all its values.

    The variance is the unbiased one (divided by P - 1), as in the authors' code.

    Args:
        patches: In units of the data's own deviation.
        floor: Added to the variance. A patch whose variance is far below it stays near zero,
            instead of showing its noise at full strength. The authors' code has 1e-6.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + floor).sqrt()


def denormalize_patches(
    pred: Float[Tensor, "B N P"], target: Float[Tensor, "B N P"], *, floor: float
) -> Float[Tensor, "B N P"]:
    """Undo `normalize_patches` with the mean and unbiased variance of `target`."""
    mean = target.mean(dim=-1, keepdim=True)
    variance = target.var(dim=-1, keepdim=True)
    return pred * (variance + floor).sqrt() + mean


def flat_patch_share(patches: Float[Tensor, "B N P"], *, floor: float) -> float:
    """Return the share of patches whose variance is below `floor`."""
    return float((patches.var(dim=-1) < floor).double().mean())


def pixel_loss_per_image(
    pred: Float[Tensor, "B R P"], target: Float[Tensor, "B R P"]
) -> Float[Tensor, " B"]:
    """Return the mean squared error per value over each image's R removed patches."""
    return (pred - target).square().mean(dim=(1, 2))
