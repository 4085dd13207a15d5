"""An encoder with a linear head: fine-tuned as a whole, in part, or probed while it is frozen.

Source: He et al. 2021, https://arxiv.org/abs/2111.06377, section A.1 and, for training a part,
section 5; the authors' code where the paper is silent. Differs: positions stay fixed, while the
authors train them.
"""

from typing import Literal, cast

import torch
from jaxtyping import Float
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

from mae_core.model.conv_encoder import ConvEncoder
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.feature_pyramid import MapEncoder

_FINE_TUNED_HEAD_STD = 2e-5
_PROBE_HEAD_STD = 0.01


class Classifier(nn.Module):
    """Pool the encoder's output, normalise it, and classify it linearly.

    Frozen parts stay in eval mode even after `train()`: no stochastic depth, and batch norms keep
    their statistics.
    """

    def __init__(
        self,
        encoder: nn.Module,
        fc_norm: nn.Module,
        head: nn.Linear,
        *,
        pool: Literal["mean", "cls"],
        pool_before_norm: bool,
        query: nn.Parameter | None = None,
    ) -> None:
        """Store the parts that `build_classifier` made.

        Args:
            encoder: A `MaskedEncoder` or a `MapEncoder`.
            fc_norm: Maps (B, D) to (B, D).
            head: Maps (B, D) to (B, num_classes).
            pool: The mean of the patch tokens, or the class token.
            pool_before_norm: Pool the tokens before the encoder's last norm.
            query: Of shape (D,); weighs the patches of an attentive probe.
        """
        super().__init__()
        self.encoder = encoder
        self.fc_norm = fc_norm
        self.head = head
        self.pool = pool
        self.pool_before_norm = pool_before_norm
        self.query = query

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Return logits of shape (B, K), one for each of K classes."""
        return self.head(self.features(images))

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Return what the head sees."""
        return self.fc_norm(self._pooled(images))

    @torch.no_grad()
    def start_from(
        self,
        *,
        mean: Float[Tensor, " D"],
        std: Float[Tensor, " D"],
        weight: Float[Tensor, "K D"],
        bias: Float[Tensor, " K"],
    ) -> None:
        """Take over a linear classifier that was fitted to standardised `features`.

        The norm before the head then gives standardised features, and the head is the classifier,
        so the logits are those of the classifier. This is the start of LP-FT, Kumar et al. 2022,
        https://arxiv.org/abs/2202.10054. Differs: standardised features, because the mean vector
        holds most of the power of an MAE encoder's features, and an optimizer fits such a head
        slowly.
        """
        norm = self.fc_norm
        if isinstance(norm, nn.Identity):  # the class token, normalised by the encoder itself
            norm = cast(nn.Module, self.encoder.norm)
        if not isinstance(norm, LayerNorm):
            raise ValueError(f"a {type(norm).__name__} before the head can't take over a scale")
        norm.weight.copy_(norm.weight / std.to(norm.weight))
        norm.bias.copy_((norm.bias - mean.to(norm.bias)) / std.to(norm.bias))
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

    def attention(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B h w"]:
        """Return how an attentive probe weighs each patch; an image's weights sum to 1."""
        return self._weighed(images)[1]

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        for module in self.encoder.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def _weighed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighed mean of the patches and their weights.

        What all patches have in common has no effect on the weights, so no scale is needed.
        """
        assert self.query is not None
        patches = cast(MapEncoder, self.encoder).feature_map(images)  # (B, D, h, w)
        scores = torch.einsum("bdhw,d->bhw", patches, self.query)
        weights = scores.flatten(1).softmax(dim=1).view_as(scores)
        return torch.einsum("bdhw,bhw->bd", patches, weights), weights

    def _pooled(self, images: Tensor) -> Tensor:
        if self.query is not None:
            return self._weighed(images)[0]
        if not isinstance(self.encoder, MaskedEncoder):
            return cast(MapEncoder, self.encoder).feature_map(images).mean(dim=(2, 3))  # (B, D)
        encode = self.encoder.tokens if self.pool_before_norm else self.encoder
        tokens = encode(images)  # (B, 1 + L, D)
        num_class_tokens = self.encoder.num_prefix_tokens
        pooled = slice(num_class_tokens, None) if self.pool == "mean" else slice(num_class_tokens)
        return tokens[:, pooled].mean(dim=1)


def build_classifier(
    encoder: nn.Module,
    *,
    num_classes: int,
    kind: Literal["finetune", "linear", "attentive"],
    pool: Literal["mean", "cls"],
    trainable_blocks: int | None = None,
) -> Classifier:
    """Put a fresh head on `encoder`, and decide which of its parameters are trained.

    All other parameters get `requires_grad` False, including those that the forward pass does not
    use, because DDP rejects a trained parameter without a gradient.

    Args:
        encoder: A `MaskedEncoder` or a `MapEncoder`; changed in place.
        num_classes: Number of outputs of the head.
        kind: "finetune" trains the encoder and a layer norm over the mean, which replaces the
            encoder's own. "linear" trains the head alone, behind a batch norm without parameters,
            which needs at least 2 images in a batch. "attentive" trains one query over the patches,
            the norm and the head (Psomas et al. 2025, https://arxiv.org/abs/2506.10178. Differs:
            one query, no value projection). MAE's features are spread over the patches, so this
            probe is fairer to it than those on a mean.
        pool: The mean of the patch tokens, or the class token; a `MapEncoder` has only "mean".
        trainable_blocks: Fine-tune only this many of the last blocks, the norms after them and
            the head; 0 keeps the whole encoder frozen. None trains all of it.
    """
    is_transformer = isinstance(encoder, MaskedEncoder)
    if not is_transformer and pool != "mean":
        raise ValueError(f"pool={pool} needs a class token, this encoder has none: set pool=mean")
    _choose_trained(encoder, kind=kind, pool=pool, trainable_blocks=trainable_blocks)
    dim = cast(MapEncoder, encoder).embed_dim
    fc_norm: nn.Module
    if kind == "linear":
        fc_norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
    else:
        is_normed = pool == "mean" or kind == "attentive"
        fc_norm = LayerNorm(dim) if is_normed else nn.Identity()
    head = nn.Linear(dim, num_classes)
    # At first all patches have the same weight: the probe starts from their mean.
    query = nn.Parameter(torch.zeros(dim)) if kind == "attentive" else None
    std = _PROBE_HEAD_STD if kind == "linear" else _FINE_TUNED_HEAD_STD
    # Truncated at +-2, many standard deviations away, as in timm and so in the reference.
    nn.init.trunc_normal_(head.weight, std=std)
    nn.init.zeros_(head.bias)
    classifier = Classifier(
        encoder,
        fc_norm,
        head,
        pool=pool,
        pool_before_norm=kind == "finetune" and pool == "mean",
        query=query,
    )
    return classifier.train()


def _choose_trained(
    encoder: nn.Module, *, kind: str, pool: str, trainable_blocks: int | None
) -> None:
    layers = _layers(encoder)
    depth = max(layers.values(), default=0)
    if trainable_blocks is not None and not 0 <= trainable_blocks <= depth:
        raise ValueError(
            f"trainable_blocks={trainable_blocks} is not in 0..{depth}, the encoder's blocks"
        )
    if kind != "finetune" and trainable_blocks:
        raise ValueError(f"trainable_blocks={trainable_blocks}: kind={kind} trains no block")
    encoder.requires_grad_(kind == "finetune" and trainable_blocks is None)
    if trainable_blocks:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(layers.get(name, 0) > depth - trainable_blocks)
    if isinstance(encoder, MaskedEncoder):
        encoder.norm.requires_grad_(kind == "finetune" and pool == "cls")


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return each parameter's learning rate factor: `layer_decay` for each layer above it.

    The encoder has depth + 2 layers: the first is the patch embedding with the class token, or a
    convolutional encoder's stem; the last is whatever comes after the blocks, such as a task's
    head. Source: BEiT, Bao et al. 2021, https://arxiv.org/abs/2106.08254, and MAE's `lr_decay.py`.
    """
    layers = _layers(cast(nn.Module, model.encoder))
    if not layers and layer_decay != 1:
        raise ValueError(f"layer_decay={layer_decay} needs an encoder of blocks: layer_decay=1")
    last = max(layers.values(), default=0) + 1
    return {
        name: layer_decay ** (last - layers.get(name.removeprefix("encoder."), last))
        for name, _ in model.named_parameters()
    }


def _layers(encoder: nn.Module) -> dict[str, int]:
    """Say in which layer each parameter is: 0 is before the blocks, which count from 1.

    What comes after the blocks is left out; an encoder without blocks has no layers.
    """
    if isinstance(encoder, ConvEncoder):
        return encoder.layers()
    if not isinstance(encoder, MaskedEncoder):
        return {}
    layers: dict[str, int] = {}
    for name, _ in encoder.named_parameters():
        if name.startswith(("cls_token", "patch_embed.")):
            layers[name] = 0
        elif name.startswith("blocks."):
            layers[name] = int(name.split(".")[1]) + 1
    return layers
