"""Convert weights to the parameter names of the MAE authors' files, and back.

The encoder's part is also the state dict of timm's VisionTransformer. These files contain the
position embeddings and our state dict does not: exporting writes the model's own, and importing
checks that the file's are the same.

Source: https://github.com/facebookresearch/mae, models_mae.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mae_core.model.encoder import MaskedEncoder
from mae_core.model.mae import MaskedAutoencoder

# The reference computes positions in numpy, so the last digit may differ.
POSITIONS_TOLERANCE = 1e-6


def fair_encoder_state_dict(encoder: MaskedEncoder) -> dict[str, Tensor]:
    """Name the encoder's weights as in `mae_pretrain_vit_base.pth`; tensors are shared."""
    return {**_without_positions(encoder), "pos_embed": _with_class_row(encoder.positions)}


def fair_state_dict(mae: MaskedAutoencoder) -> dict[str, Tensor]:
    """Name all weights as in `mae_visualize_vit_base.pth`; tensors are shared, not copied."""
    decoder = {_fair_decoder_name(k): v for k, v in _without_positions(mae.decoder).items()}
    positions = {"decoder_pos_embed": _with_class_row(mae.decoder.positions)}
    return {**fair_encoder_state_dict(mae.encoder), **decoder, **positions}


def load_fair_encoder(encoder: MaskedEncoder, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the encoder, ignoring a decoder among them.

    Raises:
        ValueError: The positions are not the fixed ones for this encoder's size.
        RuntimeError: A name is missing or unknown, or a shape differs (torch lists them).
    """
    own = {k: v for k, v in weights.items() if not _is_decoder_name(k)}
    _check_positions("pos_embed", own.pop("pos_embed", None), encoder.positions)
    encoder.load_state_dict(own)


def load_fair(mae: MaskedAutoencoder, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into encoder and decoder; raises the errors of `load_fair_encoder`."""
    decoder = {k: v for k, v in weights.items() if _is_decoder_name(k)}
    if not decoder:
        raise ValueError("these weights have no decoder: the file holds the encoder alone")
    _check_positions(
        "decoder_pos_embed", decoder.pop("decoder_pos_embed", None), mae.decoder.positions
    )
    load_fair_encoder(mae.encoder, weights)
    mae.decoder.load_state_dict({k.removeprefix("decoder_"): v for k, v in decoder.items()})


def _without_positions(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict without a trained position table."""
    return {name: tensor for name, tensor in module.state_dict().items() if name != "positions"}


def _is_decoder_name(name: str) -> bool:
    return name == "mask_token" or name.startswith("decoder_")


def _fair_decoder_name(name: str) -> str:
    return name if name == "mask_token" else f"decoder_{name}"


def _with_class_row(positions: Tensor) -> Tensor:
    """Turn (L, D) into (1, 1 + L, D); the class token's position is zero."""
    return torch.cat([torch.zeros_like(positions[:1]), positions])[None]


def _check_positions(name: str, given: Tensor | None, positions: Tensor) -> None:
    expected = _with_class_row(positions)
    if given is None:
        raise ValueError(f"{name} is missing")
    if given.shape != expected.shape:
        raise ValueError(
            f"{name} is {tuple(given.shape)}, this model's is {tuple(expected.shape)}: build it "
            "for the file's image size (an encoder then takes images of other sizes too)"
        )
    if not torch.allclose(given.to(expected), expected, rtol=0, atol=POSITIONS_TOLERANCE):
        raise ValueError(f"{name} is not the fixed sine-cosine embedding: learned or resized")
