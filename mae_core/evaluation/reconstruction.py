"""Evaluate a masked autoencoder's reconstructions in numbers and in a picture.

With `loss.norm_pix` a prediction is in units of its own target patch (zero mean, unit variance) and
looks broken if it is shown directly: https://github.com/facebookresearch/mae/issues/174. Here it
is scaled back with the target's mean and deviation, which come from the hidden pixels. So the
picture shows the predicted texture, not the predicted brightness.

Polarity as in `masking`: `mask` is True where a patch was removed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mae_core.evaluation.tile_sheet import tile_sheet
from mae_core.losses import denormalize_patches
from mae_core.model.mae import MAEOutput, MaskedAutoencoder
from mae_core.patching import patchify, unpatchify

Pixels = npt.NDArray[np.uint8]

_COLUMNS = ("original", "masked", "reconstruction")
_MAX_IMAGES = 8
_GREY = 128
_DARK_SET = 0.5  # a set below this share of full scale is brightened as a whole
_WHITE_STDS = 3.0


class Reconstruction(NamedTuple):
    loss: float  # mean over the removed patches of these images
    pred: Float[Tensor, "B L P"]  # normalised per patch if the model's loss is; 0 where kept
    mask: Bool[Tensor, "B L"]  # True = removed


def reconstruct(
    mae: MaskedAutoencoder, images: Float[Tensor, "B C H W"], noise: Float[Tensor, "B L"]
) -> Reconstruction:
    """Predict the removed patches without gradients, in eval mode; restore the model's mode."""
    output = _output(mae, images, noise)
    removed = output.pred.float()
    pred = removed.new_zeros(*output.mask.shape, removed.shape[2])
    pred[torch.arange(len(pred), device=pred.device)[:, None], output.ids_removed] = removed
    return Reconstruction(float(output.loss), pred, output.mask)


def reconstruction_losses(
    mae: MaskedAutoencoder, images: Float[Tensor, "B C H W"], noise: Float[Tensor, "B L"]
) -> Float[Tensor, " B"]:
    """Return each image's loss as `reconstruct` computes it."""
    return _output(mae, images, noise).loss_per_image.float()


def _output(mae: MaskedAutoencoder, images: Tensor, noise: Tensor) -> MAEOutput:
    was_training = mae.training
    mae.eval()
    try:
        with torch.no_grad():
            output: MAEOutput = mae(images, noise)
    finally:
        mae.train(was_training)
    return output


def reconstruction_picture(
    images: Float[Tensor, "B C H W"],
    pred: Float[Tensor, "B L P"],
    mask: Bool[Tensor, "B L"],
    *,
    patch_size: int,
    norm_pix_floor: float | None,
    channel_mean: Sequence[float],
    channel_std: Sequence[float],
    title: str = "",
) -> Pixels:
    """Draw a row for each of the first 8 images: original, masked, and reconstruction.

    The reconstruction shows the prediction in the removed patches and the image itself in the
    visible ones.

    Three channels are shown as RGB, of more the first three, of fewer the first one in grey. A set
    whose mean + 3 standard deviations is below half of full scale is brightened as a whole.
    Small images are enlarged by an integer factor, without smoothing.

    Args:
        images: Normalised, as the model saw them.
        pred: Prediction for every removed patch; what it holds for the others is not shown.
        mask: True for removed patches, which are grey in the second column.
        patch_size: Side of a patch in pixels.
        norm_pix_floor: Floor with which `pred` is normalised per patch; None if it is pixels.
        channel_mean: Mean used for the normalisation, in units of 0..1 pixels.
        channel_std: Deviation used for the normalisation, in units of 0..1 pixels.
        title: Title of the whole picture; an empty one takes no room.

    Returns:
        (height, width, 3), RGB.
    """
    images, pred, mask = (t[:_MAX_IMAGES].detach().cpu() for t in (images, pred, mask))
    images, pred = images.float(), pred.float()
    _check_shapes(images, pred, mask, patch_size)
    target = patchify(images, patch_size)
    if norm_pix_floor is not None:
        pred = denormalize_patches(pred, target, floor=norm_pix_floor)
    grid_size = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    removed = mask[:, :, None]
    grey = torch.full_like(target, torch.nan)
    columns = [
        _pixels(unpatchify(patches, grid_size, patch_size), channel_mean, channel_std)
        for patches in (
            target,
            torch.where(removed, grey, target),
            torch.where(removed, pred, target),
        )
    ]
    return tile_sheet(np.stack(columns, axis=1), _COLUMNS, title)


def _check_shapes(images: Tensor, pred: Tensor, mask: Tensor, patch_size: int) -> None:
    expected = patchify(images, patch_size).shape
    if not len(images):
        raise ValueError("there is no image to show")
    if pred.shape != expected:
        raise ValueError(
            f"pred is {tuple(pred.shape)}, but images {tuple(images.shape)} in patches of "
            f"patch_size={patch_size} are {tuple(expected)}"
        )
    if mask.shape != expected[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}, not torch.bool {tuple(expected[:2])}"
        )


def _pixels(images: Tensor, channel_mean: Sequence[float], channel_std: Sequence[float]) -> Pixels:
    """Undo the normalisation and select what to show: (B, H, W, 3), grey where it is NaN."""
    num_channels = images.shape[1]
    if not len(channel_mean) == len(channel_std) == num_channels:
        raise ValueError(
            f"{len(channel_mean)} channel_mean and {len(channel_std)} channel_std "
            f"for {num_channels} channels"
        )
    std = torch.tensor(channel_std)[:, None, None]
    mean = torch.tensor(channel_mean)[:, None, None]
    shown_channels = 3 if num_channels >= 3 else 1
    shown = (images * std + mean)[:, :shown_channels].expand(-1, 3, -1, -1)
    # 12 bits stored in 16 would look black: the level below which nearly all values lie is white.
    white = float((mean + _WHITE_STDS * std)[:shown_channels].max())
    if white < _DARK_SET:
        shown = shown / max(white, 1e-9)
    grey_levels = (shown * 255).nan_to_num(nan=_GREY).round().clamp(0, 255)
    return grey_levels.to(torch.uint8).permute(0, 2, 3, 1).numpy()
