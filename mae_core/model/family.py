"""Build the encoder and the decoder that a config names."""

from mae_core.config import CONV_ENCODERS, ENCODERS, ModelConfig
from mae_core.model.conv_encoder import ConvEncoder
from mae_core.model.cross_attention import CrossAttentionDecoder
from mae_core.model.decoder import PixelDecoder
from mae_core.model.deconvolution import DeconvolutionDecoder
from mae_core.model.encoder import MaskedEncoder

Encoder = MaskedEncoder | ConvEncoder
Decoder = PixelDecoder | CrossAttentionDecoder | DeconvolutionDecoder


def build_encoder(config: ModelConfig, *, drop_path_rate: float = 0.0) -> Encoder:
    """Build the encoder; its weights come from torch's global generator."""
    if config.encoder in CONV_ENCODERS:
        return ConvEncoder(
            config.encoder,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            drop_path_rate=drop_path_rate,
        )
    shape = ENCODERS[config.encoder]
    return MaskedEncoder(
        img_size=config.img_size,
        patch_size=config.patch_size,
        in_chans=config.in_chans,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        drop_path_rate=drop_path_rate,
        class_tokens=config.class_tokens,
    )


def build_decoder(config: ModelConfig, encoder: Encoder) -> Decoder:
    """Build the decoder for an encoder of the same config, as `build_encoder` does."""
    decoder = config.decoder
    if decoder.kind == "deconvolution":
        return DeconvolutionDecoder(
            channels=encoder.channels,
            strides=encoder.strides,
            grid_size=config.grid_size,
            dim=decoder.dim,
            depth=decoder.depth,
            in_chans=config.in_chans,
        )
    of_tokens = CrossAttentionDecoder if decoder.kind == "cross_attention" else PixelDecoder
    return of_tokens(
        encoder_dim=encoder.embed_dim,
        grid_size=config.grid_size,
        dim=decoder.dim,
        depth=decoder.depth,
        num_heads=decoder.num_heads,
        values_per_patch=config.in_chans * config.patch_size**2,
    )
