"""The half that a detector and a segmenter share: an encoder, and the map that a head gets of it.

The map is conditioned first. A pretrained encoder's map is badly conditioned: most of its power is
one mean vector, and one direction holds most of the variance, so that a head which starts from
small random weights hardly sees the rest.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mae_core.model.feature_pyramid import MapEncoder, StagedEncoder

ConditioningKind = Literal["whiten", "standardize", "none"]

# Share of the mean variance that is added to the variance of every direction. Directions that hold
# less are left small, because what they hold is mostly noise.
_SHRINKAGE = 1e-3


class Conditioning(nn.Module):
    """A fixed affine map of the vector at each place: x -> matrix (x - mean).

    It is the identity until it is fitted. It is not trained, and unlike a batch norm it does not
    follow the batch. So it is the same in training and in evaluation, and for any micro batch.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, dim: int, kind: ConditioningKind) -> None:
        """Start as the identity.

        Args:
            dim: D.
            kind: "whiten" gives every direction the variance 1 (ZCA), "standardize" every channel,
                and "none" keeps the map as it is.
        """
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("matrix", torch.eye(dim))

    def fit(self, places: Float[Tensor, "N D"]) -> None:
        """Compute the affine map from vectors at places of an encoder's maps.

        Raises:
            ValueError: There are no places, or their values are not finite.
        """
        if self.kind == "none":
            return
        if not len(places) or not bool(torch.isfinite(places).all()):
            raise ValueError(
                f"the encoder's map can't be conditioned: {len(places)} places, of which some may "
                "have values that are not finite"
            )
        vectors = places.cpu().double()
        mean = vectors.mean(dim=0)
        covariance = (vectors - mean).T @ (vectors - mean) / len(vectors)
        variance = covariance.diagonal()
        # The smallest positive number keeps a map without any variance from a division by zero.
        floor = _SHRINKAGE * variance.mean().clamp(min=torch.finfo(torch.float32).tiny)
        if self.kind == "standardize":
            matrix = (variance + floor).rsqrt().diag()
        else:
            values, directions = torch.linalg.eigh(covariance)
            matrix = (directions * (values.clamp(min=0) + floor).rsqrt()) @ directions.T
        self.mean.copy_(mean)
        self.matrix.copy_(matrix)

    def forward(self, features: Float[Tensor, "B D h w"]) -> Float[Tensor, "B D h w"]:
        """Apply the map, in float32."""
        if self.kind == "none":
            return features
        with torch.autocast(features.device.type, enabled=False):
            centred = features.float() - self.mean[:, None, None]
            return torch.einsum("ed,bdhw->behw", self.matrix, centred)


class StagedConditioning(nn.Module):
    """A conditioning of each map of an encoder that gives several."""

    def __init__(self, channels: Sequence[int], kind: ConditioningKind) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.levels = nn.ModuleList(Conditioning(dim, kind) for dim in channels)

    def fit(self, places: Float[Tensor, "N D"]) -> None:
        """Fit each level to its part of the vectors, in which all levels lie side by side."""
        parts = torch.split(places, list(self.channels), dim=1)
        for level, part in zip(self.levels, parts, strict=True):
            cast(Conditioning, level).fit(part)

    def forward(self, features: list[Float[Tensor, "B _ _ _"]]) -> list[Float[Tensor, "B _ _ _"]]:
        return [level(x) for level, x in zip(self.levels, features, strict=True)]


class MapOptions(NamedTuple):
    """How the encoder's map is made."""

    window: int = 0  # passed to the encoder's `feature_map`
    frozen: bool = False  # the encoder gets no gradients and stays in eval mode
    conditioning: ConditioningKind = "none"  # see `Conditioning`


PLAIN_MAP = MapOptions()


class DenseModel(nn.Module):
    """An encoder whose conditioned map feeds a head; the base of `Detector` and `Segmenter`."""

    def __init__(self, encoder: MapEncoder, options: MapOptions) -> None:
        """Take the encoder, an `nn.Module`, as it is and freeze what does not train."""
        super().__init__()
        self.encoder = encoder
        self.window, self.frozen, kind = options
        self.conditioning: Conditioning | StagedConditioning
        if isinstance(encoder, StagedEncoder):
            if self.window:
                raise ValueError(
                    f"window={self.window} limits attention, which this encoder has not: set 0"
                )
            self.conditioning = StagedConditioning(encoder.channels, kind)
        else:
            self.conditioning = Conditioning(encoder.embed_dim, kind)
        module = cast(nn.Module, encoder)
        if self.frozen:
            module.requires_grad_(False)
            module.eval()
        elif self.window and isinstance(class_token := getattr(encoder, "cls_token", None), Tensor):
            # Windowed attention has no class token, and DDP waits for a gradient of each parameter.
            class_token.requires_grad_(False)

    def train(self, mode: bool = True) -> "DenseModel":
        """Set the mode as for any module, but keep a frozen encoder in eval mode."""
        super().train(mode)
        if self.frozen:
            cast(nn.Module, self.encoder).eval()
        return self

    def feature_map(
        self, images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B D h w"] | list[Float[Tensor, "B _ _ _"]]:
        """Return the encoder's conditioned map; those of all stages, if it has stages."""
        return self.conditioning(self._encoded(images))

    def sampled_places(
        self,
        images: Float[Tensor, "B C H W"],
        pictures: Sequence[tuple[int, int]] | None = None,
        *,
        limit: int,
    ) -> list[Float[Tensor, "N D"]]:
        """Return vectors of the unconditioned map of each image, for `Conditioning.fit`.

        Of an encoder with stages, a vector joins those of all maps at a place of the last one.

        Args:
            images: Normalised.
            pictures: Height and width of the picture in the upper left corner of each image. What
                lies beside it is left out. By default the picture fills the image.
            limit: Largest number of places of an image, taken at equal distances.
        """
        encoded = self._encoded(images)
        features = _side_by_side(encoded) if isinstance(encoded, list) else encoded
        sampled = []
        for own, (height, width) in zip(
            features, pictures or [(images.shape[-2], images.shape[-1])] * len(images), strict=True
        ):
            rows, columns = (-(-side // self.encoder.patch_size) for side in (height, width))
            places = own[:, :rows, :columns].flatten(1).T
            chosen = torch.arange(min(limit, len(places))) * len(places) // min(limit, len(places))
            sampled.append(places[chosen.to(places.device)].float())
        return sampled

    def _encoded(self, images: Tensor) -> Tensor | list[Tensor]:
        with torch.no_grad() if self.frozen else nullcontext():
            if isinstance(self.encoder, StagedEncoder):
                return self.encoder.stages(images)
            return self.encoder.feature_map(images, window=self.window)


def _side_by_side(maps: list[Tensor]) -> Tensor:
    """Take of each map what lies in the middle of a place of the last: (B, sum of D, h, w)."""
    rows = maps[-1].shape[2]
    middles = []
    for features in maps:
        factor = features.shape[2] // rows
        middles.append(features[..., factor // 2 :: factor, factor // 2 :: factor])
    return torch.cat(middles, dim=1)
