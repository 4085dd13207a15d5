"""How far the predicted patches are from the image's patches.

The loss is computed for removed patches, and only for them.

Source: He et al. 2021, https://arxiv.org/abs/2111.06377, section 3, "Reconstruction target".
"""

from typing import Literal, NamedTuple

import einops
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

PixelKind = Literal["mse", "l1", "smooth_l1"]

# Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, for values that span about 4 units, as
# those of a normalised patch and of a normalised image do: (0.03 * 4)^2.
_SSIM_OF_VARIANCES = 0.0144


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


class LossTerms(NamedTuple):
    """What the loss adds up: the distance of pixels, and terms that see a patch as a whole."""

    pixels: PixelKind = "mse"
    fourier_weight: float = 0.0  # of `fourier_loss_per_image`; 0 leaves it out
    ssim_weight: float = 0.0  # of `ssim_loss_per_image`; 0 leaves it out


def loss_terms_per_image(
    pred: Float[Tensor, "B R P"], target: Float[Tensor, "B R P"], terms: LossTerms, num_chans: int
) -> dict[str, Float[Tensor, " B"]]:
    """Return each term of the loss by its name, already multiplied by its weight."""
    found: dict[str, Tensor] = {terms.pixels: pixel_loss_per_image(pred, target, terms.pixels)}
    if terms.fourier_weight:
        fourier = fourier_loss_per_image(pred, target, num_chans)
        found["fourier"] = terms.fourier_weight * fourier
    if terms.ssim_weight:
        found["ssim"] = terms.ssim_weight * ssim_loss_per_image(pred, target, num_chans)
    return found


def pixel_loss_per_image(
    pred: Float[Tensor, "B R P"], target: Float[Tensor, "B R P"], kind: PixelKind = "mse"
) -> Float[Tensor, " B"]:
    """Return the mean error per value over each image's R removed patches.

    "mse" squares it, "l1" takes its size, and "smooth_l1" squares half of it below 1 and grows like
    l1 above (Girshick 2015, https://arxiv.org/abs/1504.08083).
    """
    if kind == "mse":
        errors = (pred - target).square()
    elif kind == "l1":
        errors = (pred - target).abs()
    else:
        errors = F.smooth_l1_loss(pred, target, reduction="none")
    return errors.mean(dim=(1, 2))


def fourier_loss_per_image(
    pred: Float[Tensor, "B R P"], target: Float[Tensor, "B R P"], num_chans: int
) -> Float[Tensor, " B"]:
    """Return the mean distance between the spectra of removed patches, over all frequencies.

    The transform keeps lengths, so each of the patch's frequencies counts as one value does. A sum
    of squares would be the same in pixels and in frequencies; the distance itself gives weak, fine
    frequencies more weight than squared pixels do.
    """
    difference = torch.fft.fft2(_as_pictures(pred - target, num_chans), norm="ortho")
    # The square root's slope at 0 is infinite.
    size = (difference.real.square() + difference.imag.square() + 1e-12).sqrt()
    return size.mean(dim=(1, 2, 3, 4))


def ssim_loss_per_image(
    pred: Float[Tensor, "B R P"], target: Float[Tensor, "B R P"], num_chans: int
) -> Float[Tensor, " B"]:
    """Return 1 - SSIM, averaged over removed patches and channels; each patch is one window.

    Source: Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, equation 13. Differs: it has
    no factor of the means, which makes the opposite of a patch alike where values may be negative,
    as normalised ones are; and the window is the patch, because its neighbours may not be
    predicted.
    """
    first, second = (_as_pictures(x, num_chans).flatten(3) for x in (pred, target))
    first, second = (x - x.mean(dim=3, keepdim=True) for x in (first, second))
    variances = first.square().mean(dim=3) + second.square().mean(dim=3)  # (B, R, C)
    covariance = (first * second).mean(dim=3)
    likeness = (2 * covariance + _SSIM_OF_VARIANCES) / (variances + _SSIM_OF_VARIANCES)
    return (1 - likeness).mean(dim=(1, 2))


def _as_pictures(patches: Tensor, num_chans: int) -> Tensor:
    """Return patches of `patchify` as (B, R, C, p, p)."""
    side = round((patches.shape[2] // num_chans) ** 0.5)
    return einops.rearrange(patches, "b r (p q c) -> b r c p q", p=side, q=side, c=num_chans)
