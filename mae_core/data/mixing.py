"""Mixup and CutMix: blend the images of a batch, and their labels in the same proportion.

Targets are soft: (B, K), a probability for each class, rows summing to 1; or 0..1 for each of K
findings. Images and targets may be on any device.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


def soft_targets(
    labels: Int[Tensor, " B"], num_classes: int, smoothing: float = 0.1
) -> Float[Tensor, "B K"]:
    """Return one-hot targets, with the share `smoothing` spread evenly over all classes.

    Source: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section 7.
    """
    even = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), even, device=labels.device)
    return targets.scatter_(1, labels.long()[:, None], 1 - smoothing + even)


def mix_batch(
    images: Float[Tensor, "B C H W"],
    targets: Float[Tensor, "B K"],
    generator: np.random.Generator,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_probability: float = 0.5,
    probability: float = 1.0,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B K"]]:
    """Mix each image with its mirror image in batch order (first with last); returns new tensors.

    The whole batch shares one proportion and, for CutMix, one box. The middle image of an odd
    batch is mixed with itself and so unchanged except for rounding; a batch of 1 is returned as it
    is.

    Source: mixup, Zhang et al. 2017, https://arxiv.org/abs/1710.09412; CutMix, Yun et al. 2019,
    https://arxiv.org/abs/1905.04899; timm's `Mixup(mode="batch")`.

    Args:
        images: Normalised.
        targets: Soft targets, as `soft_targets` makes them.
        generator: Draws all random values; one per batch, so that a restart mixes alike.
        mixup_alpha: The proportion is drawn from Beta(alpha, alpha); 0 turns mixup off.
        cutmix_alpha: The same for CutMix.
        switch_probability: Probability of CutMix if both are on.
        probability: Probability that the batch is mixed.
    """
    can_mix = len(images) > 1 and (mixup_alpha > 0 or cutmix_alpha > 0)
    if generator.random() >= probability or not can_mix:
        return images, targets
    is_cut = cutmix_alpha > 0
    if mixup_alpha > 0 and cutmix_alpha > 0:
        is_cut = generator.random() < switch_probability
    alpha = cutmix_alpha if is_cut else mixup_alpha
    kept = float(generator.beta(alpha, alpha))
    if is_cut:
        images, kept = _cut(images, kept, generator)
    else:
        images = _blend(images, kept)
    return images, _blend(targets, kept)


def _blend(values: Tensor, kept: float) -> Tensor:
    return values * kept + values.flip(0) * (1 - kept)


def _cut(images: Tensor, kept: float, generator: np.random.Generator) -> tuple[Tensor, float]:
    """Paste a box; return the images and the share kept, as the box is clipped at the edges."""
    height, width = images.shape[-2:]
    side = math.sqrt(1 - kept)  # of the box, relative to the image's sides
    rows = _interval(int(height * side), height, generator)
    columns = _interval(int(width * side), width, generator)
    mixed = images.clone()
    mixed[..., rows, columns] = images.flip(0)[..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (height * width)


def _interval(length: int, limit: int, generator: np.random.Generator) -> slice:
    """Return `length` places around a random centre, clipped to 0..limit."""
    center = int(generator.integers(0, limit))
    return slice(max(0, center - length // 2), min(limit, center + (length + 1) // 2))
