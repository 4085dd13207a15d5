import pytest
import torch

from mae_core.config import LossConfig, MaskingConfig, ModelConfig
from mae_core.model.deconvolution import DeconvolutionDecoder
from mae_core.model.mae import MaskedAutoencoder, build_mae


def make_mae(encoder: str, kind: str, patch_size: int = 4) -> MaskedAutoencoder:
    torch.manual_seed(0)
    size = (4 * patch_size, 2 * patch_size)
    decoder = {"kind": kind, "dim": 32, "depth": 1, "num_heads": 2}
    model = ModelConfig.model_validate(
        {"encoder": encoder, "img_size": size, "patch_size": patch_size, "decoder": decoder}
    )
    return build_mae(model, MaskingConfig(), LossConfig())


@pytest.mark.parametrize("kind", ["transformer", "deconvolution", "cross_attention"])
@pytest.mark.parametrize("encoder", ["vit_nano", "resnet18", "convnextv2_atto"])
def test_every_pair_trains_all_its_parameters(encoder: str, kind: str) -> None:
    mae = make_mae(encoder, kind)
    output = mae(torch.randn(2, 3, 16, 8), torch.rand(2, 8))
    assert output.pred.shape == (2, 6, 48)
    output.loss.backward()
    # DDP waits for a gradient of each.
    assert [name for name, p in mae.named_parameters() if p.grad is None] == []
    assert all(bool(torch.isfinite(p.grad).all()) for p in mae.parameters() if p.grad is not None)


@pytest.mark.parametrize("encoder", ["vit_nano", "resnet18", "convnextv2_atto"])
@pytest.mark.parametrize("kind", ["transformer", "deconvolution", "cross_attention"])
def test_no_prediction_depends_on_a_removed_pixel(encoder: str, kind: str) -> None:
    mae = make_mae(encoder, kind)
    images, noise = torch.randn(2, 3, 16, 8), torch.rand(2, 8)
    output = mae(images, noise)
    removed = output.mask.view(2, 1, 4, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    changed = mae(images.masked_fill(removed, 9.0), noise)
    assert torch.equal(changed.pred, output.pred)


@pytest.mark.parametrize(
    ("patch_size", "strides"),
    [(32, (32, 16, 8, 4)), (16, (16, 8, 4)), (8, (8, 4)), (4, (4,)), (14, (14, 7)), (2, (2,))],
)
def test_scales_go_down_to_stride_four(patch_size: int, strides: tuple[int, ...]) -> None:
    decoder = DeconvolutionDecoder(
        channels=(8,), strides=(patch_size,), grid_size=(2, 2), dim=16, depth=1, in_chans=3
    )
    assert decoder.strides == strides
    ids_keep, ids_removed = torch.tensor([[1]]), torch.tensor([[0, 3]])
    pred = decoder([torch.randn(1, 8, 2, 2)], ids_keep, ids_removed)
    assert pred.shape == (1, 2, 3 * patch_size**2)


def test_a_mask_token_takes_the_place_of_what_is_removed() -> None:
    torch.manual_seed(0)
    decoder = DeconvolutionDecoder(
        channels=(6, 8), strides=(4, 8), grid_size=(1, 2), dim=16, depth=1, in_chans=1
    )
    ids_keep, ids_removed = torch.tensor([[0]]), torch.tensor([[1]])
    maps = [torch.randn(1, 6, 2, 4), torch.randn(1, 8, 1, 2)]
    before = decoder(maps, ids_keep, ids_removed)
    other = [x.clone() for x in maps]
    for x in other:
        x[..., x.shape[3] // 2 :] += 5  # of the removed patch
    assert torch.equal(decoder(other, ids_keep, ids_removed), before)
    for stride in ("4", "8"):
        torch.nn.init.normal_(decoder.skips[stride].mask_token)
        after = decoder(maps, ids_keep, ids_removed)
        assert not torch.allclose(after, before, atol=1e-4), stride
        before = after


def test_every_scale_that_the_encoder_has_is_read() -> None:
    mae = make_mae("convnextv2_atto", "deconvolution", 32)
    assert isinstance(mae.decoder, DeconvolutionDecoder)
    assert mae.decoder.sources == (3, 2, 1, 0)
    assert list(mae.decoder.skips) == ["32", "16", "8", "4"]


def test_a_prediction_lies_where_its_patch_is() -> None:
    """The decoder is local: what changes at one end of a long picture changes nothing far away."""
    decoder = DeconvolutionDecoder(
        channels=(8,), strides=(4,), grid_size=(1, 8), dim=16, depth=1, in_chans=1
    )
    decoder.scales[0][1] = torch.nn.Identity()  # its norm is over all places
    ids_keep, ids_removed = torch.tensor([[0, 7]]), torch.tensor([[6, 1, 3]])
    features = torch.zeros(1, 8, 1, 8)
    before = decoder([features], ids_keep, ids_removed)
    features[..., 7] = 1.0
    features[:, 0, :, 7] = 5.0
    differs = (decoder([features], ids_keep, ids_removed) != before).any(dim=2)
    assert differs.tolist() == [[True, False, False]]


@pytest.mark.parametrize("kind", ["transformer", "deconvolution", "cross_attention"])
def test_every_decoder_takes_several_class_tokens(kind: str) -> None:
    torch.manual_seed(0)
    decoder = {"kind": kind, "dim": 32, "depth": 1, "num_heads": 2}
    fields = {"encoder": "vit_nano", "img_size": 16, "patch_size": 4, "class_tokens": 3}
    model = ModelConfig.model_validate({**fields, "decoder": decoder})
    mae = build_mae(model, MaskingConfig(), LossConfig())
    output = mae(torch.randn(2, 3, 16, 16), torch.rand(2, 16))
    assert output.pred.shape == (2, 12, 48)
    output.loss.backward()
    assert [name for name, p in mae.named_parameters() if p.grad is None] == []
