"""Weights from elsewhere compute here what they compute there; timm is the other side."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_core.checkpoint import load_encoder, load_starting_weights, save_weights
from mae_core.checkpoint_manifest import CheckpointRecord, CorruptCheckpointError
from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.interchange.declared import Declared
from mae_core.interchange.fair import fair_encoder_state_dict, fair_state_dict
from mae_core.interchange.foreign import ForeignWeights, import_weights
from mae_core.interchange.weight_files import RefusedWeightsError, WeightsFile
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.mae import MaskedAutoencoder, build_mae


def make_vit(**changes: Any) -> VisionTransformer:
    """Build timm's ViT of the micro encoder's shape; every weight is random."""
    torch.manual_seed(0)
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 192,
        "depth": 6,
        "num_heads": 3,
        "num_classes": 0,
        "global_pool": "token",
        "dynamic_img_size": True,
        **changes,
    }
    vit = VisionTransformer(**arguments)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    return vit.eval()


def taken(
    weights: dict[str, Tensor], declared: Declared | None = None, wrapper: str | None = None
) -> ForeignWeights:
    file = WeightsFile(weights, "torch", wrapper)
    return import_weights(file, declared or Declared(), "my.pth")


def as_encoder(found: ForeignWeights, folder: Path) -> MaskedEncoder:
    record = CheckpointRecord(
        step=0,
        samples_seen=0,
        epoch=0,
        total_steps=1,
        seed=0,
        data_digest="",
        channel_mean=(0.5,) * found.model.in_chans,
        channel_std=(0.5,) * found.model.in_chans,
        model=found.model,
        masking=MaskingConfig(),
        loss=LossConfig(),
    )
    save_weights(folder, record, found.state)
    return load_encoder(folder)[0].eval()


def make_mae(**changes: Any) -> MaskedAutoencoder:
    torch.manual_seed(1)
    model = ModelConfig(
        encoder="vit_micro",
        patch_size=8,
        decoder=DecoderConfig(dim=64, depth=1, num_heads=2),
        **{"img_size": (32, 32), **changes},
    )
    return build_mae(model, MaskingConfig(), LossConfig())


VARIANTS: list[tuple[dict[str, Any], str]] = [
    ({}, "Its positions are trained, for 4x4 patches"),
    ({"qkv_bias": False}, "have no biases: they are zero"),
    ({"init_values": 0.5}, "Layer scale is multiplied into the layers before it"),
    ({"no_embed_class": True}, "Its positions are trained"),
    ({"num_classes": 7}, "Left out, because the encoder has no such part: head.bias, head.weight"),
    ({"img_size": (16, 48)}, "for 2x6 patches"),
    ({"in_chans": 1}, "Its positions are trained"),
]


@pytest.mark.parametrize(("changes", "note"), VARIANTS, ids=str)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_trained_weights_of_timm_compute_the_same_at_each_size(
    tmp_path: Path, changes: dict[str, Any], note: str, size: tuple[int, int]
) -> None:
    vit = make_vit(**changes)
    own_size = changes.get("img_size")
    found = taken(vit.state_dict(), Declared(img_size=own_size))
    assert any(note in text for text in found.notes)
    encoder = as_encoder(found, tmp_path)
    assert "positions" in encoder.state_dict()
    images = torch.randn(2, changes.get("in_chans", 3), *size)
    with torch.no_grad():
        difference = (encoder(images) - vit.forward_features(images)).abs().max()
    assert difference <= 1e-4


def test_fixed_positions_are_recognised_and_stay_out_of_the_weights(tmp_path: Path) -> None:
    mae = make_mae(img_size=(16, 48))
    found = taken(fair_encoder_state_dict(mae.encoder), wrapper="model")
    assert found.format == "MAE authors' file"
    assert found.model.img_size == (16, 48)  # 12 places: only 2x6 has this table
    assert found.notes == ("There is no decoder: further pretraining draws a fresh one.",)
    encoder = as_encoder(found, tmp_path)
    assert "positions" not in encoder.state_dict()
    images = torch.randn(1, 3, 16, 48)
    assert torch.equal(encoder(images), mae.encoder(images))


def test_an_eighth_of_the_precision_is_read_too() -> None:
    weights = {k: x.to(torch.float8_e4m3fn) for k, x in make_vit().state_dict().items()}
    assert any("The file holds float8_e4m3fn" in note for note in taken(weights).notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_said_and_its_fixed_positions_are_recognised(dtype: torch.dtype) -> None:
    weights = {k: x.to(dtype) for k, x in fair_state_dict(make_mae()).items()}
    found = taken(weights)
    assert "encoder.positions" not in found.state
    assert found.has_decoder
    assert {x.dtype for x in found.state.values()} == {torch.float32}
    assert f"The file holds {str(dtype)[6:]}; its weights become float32." in found.notes


def test_a_decoder_comes_with_the_authors_names_and_continues(tmp_path: Path) -> None:
    mae, other = make_mae(), make_mae()
    nn.init.normal_(mae.decoder.pred.weight)
    found = taken(fair_state_dict(mae), wrapper="model")
    assert found.model.decoder == DecoderConfig(dim=64, depth=1, num_heads=2)
    assert any("how many heads its decoder of 64 has: taken to be 2" in x for x in found.notes)
    as_encoder(found, tmp_path)
    load_starting_weights(tmp_path, other, is_verified=False)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    assert torch.equal(other(images, noise).pred, mae(images, noise).pred)


def test_pretraining_starts_from_trained_positions_on_another_grid(tmp_path: Path) -> None:
    vit = make_vit()
    as_encoder(taken(vit.state_dict()), tmp_path)
    mae = make_mae(img_size=(48, 64))
    fresh = mae.decoder.pred.weight.clone()
    load_starting_weights(tmp_path, mae, is_verified=False)
    assert mae.encoder.positions.shape == (48, 192)
    assert "encoder.positions" in mae.state_dict()  # kept by the checkpoints that follow
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert (mae.encoder(images) - vit.forward_features(images)).abs().max() <= 1e-4
    assert torch.equal(mae.decoder.pred.weight, fresh)


def test_fc_norm_stands_in_for_a_missing_norm() -> None:
    vit = make_vit(global_pool="avg", num_classes=3)
    found = taken(vit.state_dict())
    assert torch.equal(found.state["encoder.norm.weight"], vit.fc_norm.weight)
    assert any("only fc_norm" in note for note in found.notes)


def test_a_decoders_own_positions_are_kept(tmp_path: Path) -> None:
    weights = fair_state_dict(make_mae())
    table = torch.randn(16, 64)
    weights["decoder_pos_embed"][0, 1:] = table
    as_encoder(taken(weights), tmp_path)
    mae = make_mae()
    load_starting_weights(tmp_path, mae, is_verified=False)
    assert torch.equal(mae.decoder.positions, table)
    assert torch.equal(fair_state_dict(mae)["decoder_pos_embed"][0, 1:], table)


@pytest.mark.parametrize(
    ("key", "tensor", "why"),
    [
        ("decoder_pos_embed", torch.ones(1, 17, 64), "gives the class token a position"),
        ("decoder_pos_embed", torch.zeros(1, 26, 64), "the encoder's number of places"),
        ("decoder_pred.weight", torch.zeros(48, 64), r"pred.weight is \(48, 64\), expected"),
        ("decoder_extra.bias", torch.zeros(2), "extra.bias is unknown"),
    ],
)
def test_a_decoder_that_does_not_fit_is_left_out_with_the_reason(
    key: str, tensor: Tensor, why: str
) -> None:
    found = taken({**fair_state_dict(make_mae()), key: tensor})
    assert not found.has_decoder
    (told,) = [note for note in found.notes if "decoder is left out" in note]
    assert re.search(why, told)


def without(key: str) -> dict[str, Tensor]:
    return {k: x for k, x in make_vit().state_dict().items() if k != key}


def replaced(key: str, tensor: Tensor) -> dict[str, Tensor]:
    return {**make_vit().state_dict(), key: tensor}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (lambda: without("cls_token"), "cls_token: missing; our encoder needs it"),
        (lambda: without("pos_embed"), "pos_embed: missing"),
        (lambda: without("norm.bias"), "norm.bias: missing"),
        (lambda: without("blocks.3.mlp.fc1.weight"), r"blocks.3.mlp.fc1.weight: missing"),
        (
            lambda: replaced("blocks.0.mlp.fc1.weight", torch.zeros(384, 192)),
            r"blocks.0.mlp.fc1.weight: is \(384, 192\), a vit_micro of ours has \(768, 192\)",
        ),
        (lambda: replaced("reg_token", torch.zeros(1, 4, 192)), "reg_token: our encoder has no"),
        (lambda: replaced("blocks.0.attn.q_norm.weight", torch.zeros(64)), "q_norm.weight: our"),
        (lambda: replaced("pos_embed", torch.zeros(1, 12, 192)), "has 12 places, which is no sq"),
        (lambda: replaced("pos_embed", torch.zeros(12)), r"pos_embed: is \(12,\)"),
        (
            lambda: replaced("patch_embed.proj.weight", torch.zeros(192, 3, 2, 8, 8)),
            "not the convolution of square patches",
        ),
        (
            lambda: replaced("patch_embed.proj.weight", torch.zeros(192, 3, 0, 0)),
            r"is \(192, 3, 0, 0\), not the convolution of square patches",
        ),
        (
            lambda: replaced("blocks.1.attn.proj.weight", torch.zeros(192, 192, dtype=torch.int8)),
            "blocks.1.attn.proj.weight: holds int8; quantized weights cannot be used",
        ),
        (lambda: make_vit(depth=5).state_dict(), "is 192 wide and 5 blocks deep; we have 96x4"),
        (lambda: {"conv1.weight": torch.zeros(2)}, r"not the weights of a vision .* has conv1.we"),
        (lambda: {"encoder.patch_embed.proj.weight": torch.zeros(2)}, "without its manifest.json"),
    ],
)
def test_another_model_is_refused_by_the_name_of_its_tensor(weights: Any, message: str) -> None:
    with pytest.raises(RefusedWeightsError, match=f"my.pth: .*{message}"):
        taken(weights())


def test_a_nan_is_named() -> None:
    weights = make_vit().state_dict()
    weights["blocks.2.norm1.weight"][5] = float("nan")
    with pytest.raises(
        CorruptCheckpointError, match=r"blocks.2.norm1.weight: 1 of 192 values are NaN"
    ):
        taken(weights)


def test_other_heads_than_ours_are_refused() -> None:
    with pytest.raises(RefusedWeightsError, match="has 4 attention heads; our vit_micro has 3"):
        taken(make_vit().state_dict(), Declared(num_heads=4))


def test_vit_base_of_timm_is_recognised() -> None:
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", pretrained=False)
    weights = {k: torch.zeros(x.shape) for k, x in vit.state_dict().items()}
    assert taken(weights).model == ModelConfig()
