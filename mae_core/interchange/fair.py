"""Convert weights to the parameter names of the MAE authors' files.

The encoder's part is also the state dict of timm's VisionTransformer. These files contain the
position embeddings, and our state dict does not: the model's own are written. The way back is
`mae_core.interchange.foreign`.

Source: https://github.com/facebookresearch/mae, models_mae.py.
"""

import torch
from torch import Tensor, nn

from mae_core.model.decoder import PixelDecoder
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.mae import MaskedAutoencoder


def fair_encoder_state_dict(encoder: MaskedEncoder) -> dict[str, Tensor]:
    """Name the encoder's weights as in `mae_pretrain_vit_base.pth`; tensors are shared."""
    return {**_without_positions(encoder), "pos_embed": _with_class_row(encoder.positions)}


def fair_state_dict(mae: MaskedAutoencoder) -> dict[str, Tensor]:
    """Name all weights as in `mae_visualize_vit_base.pth`; tensors are shared, not copied."""
    own_encoder, own_decoder = _halves(mae)
    decoder = {_fair_decoder_name(k): v for k, v in _without_positions(own_decoder).items()}
    positions = {"decoder_pos_embed": _with_class_row(own_decoder.positions)}
    return {**fair_encoder_state_dict(own_encoder), **decoder, **positions}


def _halves(mae: MaskedAutoencoder) -> tuple[MaskedEncoder, PixelDecoder]:
    encoder, decoder = mae.encoder, mae.decoder
    if not isinstance(encoder, MaskedEncoder) or not isinstance(decoder, PixelDecoder):
        raise ValueError("the authors' files hold a ViT and a transformer decoder alone")
    return encoder, decoder


def _without_positions(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without a trained position table."""
    return {name: tensor for name, tensor in module.state_dict().items() if name != "positions"}


def _fair_decoder_name(name: str) -> str:
    return name if name == "mask_token" else f"decoder_{name}"


def _with_class_row(positions: Tensor) -> Tensor:
    """Turn (L, D) into (1, 1 + L, D); the class token's position is zero."""
    return torch.cat([torch.zeros_like(positions[:1]), positions])[None]
