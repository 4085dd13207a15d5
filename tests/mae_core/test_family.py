import pytest
import torch

from mae_core.config import ModelConfig
from mae_core.model.conv_encoder import ConvEncoder
from mae_core.model.cross_attention import CrossAttentionDecoder
from mae_core.model.decoder import PixelDecoder
from mae_core.model.deconvolution import DeconvolutionDecoder
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.family import build_decoder, build_encoder


@pytest.mark.parametrize(
    ("name", "encoder_type", "width"),
    [
        ("vit_nano", MaskedEncoder, 96),
        ("resnet18", ConvEncoder, 512),
        ("convnextv2_atto", ConvEncoder, 320),
    ],
)
@pytest.mark.parametrize(
    ("kind", "decoder_type"),
    [
        ("transformer", PixelDecoder),
        ("deconvolution", DeconvolutionDecoder),
        ("cross_attention", CrossAttentionDecoder),
    ],
)
def test_a_config_names_encoder_and_decoder(
    name: str, encoder_type: type, width: int, kind: str, decoder_type: type
) -> None:
    model = ModelConfig.model_validate(
        {"encoder": name, "img_size": 32, "patch_size": 8, "decoder": {"kind": kind}}
    )
    encoder = build_encoder(model)
    decoder = build_decoder(model, encoder)
    assert type(encoder) is encoder_type
    assert type(decoder) is decoder_type
    assert encoder.embed_dim == width
    assert encoder.patch_size == 8
    assert decoder.grid_size == (4, 4)


def test_stochastic_depth_reaches_every_kind_of_encoder() -> None:
    for name in ("vit_nano", "resnet18", "convnextv2_atto"):
        model = ModelConfig.model_validate({"encoder": name, "img_size": 32, "patch_size": 8})
        torch.manual_seed(0)
        encoder = build_encoder(model, drop_path_rate=0.9).train()
        for parameter in encoder.parameters():  # a ResNet's branches start at zero
            if parameter.ndim == 1:
                torch.nn.init.ones_(parameter)
        images = torch.randn(8, 3, 32, 32)
        assert not torch.equal(encoder.feature_map(images), encoder.feature_map(images)), name
