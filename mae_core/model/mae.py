"""The masked autoencoder: mask patches, encode the kept ones, predict the removed ones."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mae_core.config import LossConfig, MaskingConfig, ModelConfig
from mae_core.losses import LossTerms, loss_terms_per_image, normalize_patches
from mae_core.masking import mask_from_noise, num_patches_kept
from mae_core.model.deconvolution import DeconvolutionDecoder
from mae_core.model.family import Decoder, Encoder, build_decoder, build_encoder
from mae_core.patching import take_patches


class MAEOutput(NamedTuple):
    loss: Float[Tensor, ""]
    loss_per_image: Float[Tensor, " B"]
    pred: Float[Tensor, "B R P"]  # of the patches of `ids_removed`
    ids_removed: Int[Tensor, "B R"]  # those that are predicted
    mask: Bool[Tensor, "B L"]  # True = removed
    terms: Mapping[str, Float[Tensor, " B"]] = MappingProxyType(
        {}
    )  # of the loss, if it has several


class MaskedAutoencoder(nn.Module):
    """The model of He et al. 2021, https://arxiv.org/abs/2111.06377, figure 1.

    Its target is normalised per patch (see `normalize_patches`), or the pixels themselves if
    `norm_pix_floor` is None. In training mode, only `prediction_ratio` of the removed patches are
    predicted: those that rank first behind the kept ones.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        *,
        patch_size: int,
        mask_ratio: float,
        norm_pix_floor: float | None,
        prediction_ratio: float = 1.0,
        terms: LossTerms | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.patch_size = patch_size
        self.mask_ratio = mask_ratio
        self.norm_pix_floor = norm_pix_floor
        self.prediction_ratio = prediction_ratio
        self.terms = terms or LossTerms()

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        noise: Float[Tensor, "B L"],
        mask_ratio: float | None = None,
    ) -> MAEOutput:
        """Reconstruct images of the size that the decoder was built for.

        Args:
            images: Normalised.
            noise: Its order sets the mask.
            mask_ratio: Share of patches to remove; by default the model's.
        """
        self._check_sizes(images, noise)
        ratio = self.mask_ratio if mask_ratio is None else mask_ratio
        ids_keep, ids_removed, mask = mask_from_noise(noise, ratio)
        if self.training:
            num_predicted = max(1, round(ids_removed.shape[1] * self.prediction_ratio))
            ids_removed = ids_removed[:, :num_predicted]
        if isinstance(self.decoder, DeconvolutionDecoder):
            pred = self.decoder(self.encoder.maps(images, ids_keep), ids_keep, ids_removed)
        else:
            latent = self.encoder(images, ids_keep)  # (B, 1 + K, D)
            pred = self.decoder(latent, ids_keep, ids_removed)  # (B, R, P)

        # fp32: a bf16 sum over B * R patches loses the small values.
        target = take_patches(images.float(), self.patch_size, ids_removed)
        if self.norm_pix_floor is not None:
            target = normalize_patches(target, floor=self.norm_pix_floor)
        terms = loss_terms_per_image(pred.float(), target, self.terms, images.shape[1])
        loss_per_image = torch.stack(list(terms.values())).sum(dim=0)
        # Every image has as many predicted patches, so this is the mean over those of the batch.
        loss = loss_per_image.mean()
        several = terms if len(terms) > 1 else {}
        return MAEOutput(loss, loss_per_image, pred, ids_removed, mask, several)

    def _check_sizes(self, images: Tensor, noise: Tensor) -> None:
        """Raise a ValueError for images of the right area but the wrong shape, which would run."""
        height, width = images.shape[-2:]
        rows, columns = self.decoder.grid_size
        if (height, width) != (rows * self.patch_size, columns * self.patch_size):
            raise ValueError(
                f"image {height}x{width}, but the decoder was built for "
                f"{rows}x{columns} patches of patch_size={self.patch_size}"
            )
        if noise.shape[1] != rows * columns:
            raise ValueError(
                f"noise for {noise.shape[1]} patches, but an image has {rows}x{columns}"
            )


def build_mae(model: ModelConfig, masking: MaskingConfig, loss: LossConfig) -> MaskedAutoencoder:
    """Build the model; fresh weights come from torch's global generator, so seed it first."""
    ratio = min(masking.ratios)
    if num_patches_kept(model.num_patches, ratio) == model.num_patches:
        raise ValueError(
            f"mask_ratio={ratio} removes none of {model.num_patches} patches of "
            f"patch_size={model.patch_size}"
        )
    encoder = build_encoder(model)
    return MaskedAutoencoder(
        encoder,
        build_decoder(model, encoder),
        patch_size=model.patch_size,
        mask_ratio=masking.last_ratio,
        norm_pix_floor=loss.target_floor,
        prediction_ratio=model.decoder.prediction_ratio,
        terms=LossTerms(loss.kind, loss.fourier_weight, loss.ssim_weight),
    )
