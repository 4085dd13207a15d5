import pytest
import torch
from torch import Tensor

from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.interchange.fair import (
    fair_encoder_state_dict,
    fair_state_dict,
    load_fair,
    load_fair_encoder,
)
from mae_core.model.mae import MaskedAutoencoder, build_mae


def make_mae(seed: int, img_size: tuple[int, int] = (32, 32)) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    model = ModelConfig(
        encoder="vit_micro",
        img_size=img_size,
        patch_size=8,
        decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
    )
    return build_mae(model, MaskingConfig(), LossConfig())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_there_and_back_is_bit_equal() -> None:
    ours, other = make_mae(0, (16, 48)), make_mae(1, (16, 48))
    assert not same(ours.state_dict(), other.state_dict())
    load_fair(other, fair_state_dict(ours))
    assert same(ours.state_dict(), other.state_dict())
    assert same(fair_state_dict(ours), fair_state_dict(other))


def test_encoder_loads_from_a_file_with_or_without_a_decoder() -> None:
    ours = make_mae(0)
    for weights in (fair_state_dict(ours), fair_encoder_state_dict(ours.encoder)):
        other = make_mae(1)
        load_fair_encoder(other.encoder, weights)
        assert same(ours.encoder.state_dict(), other.encoder.state_dict())
        assert not same(ours.decoder.state_dict(), other.decoder.state_dict())


def test_loading_copies() -> None:
    ours, other = make_mae(0), make_mae(1)
    load_fair(other, fair_state_dict(ours))
    with torch.no_grad():
        ours.encoder.cls_token.zero_()
    assert other.encoder.cls_token.any()


def test_class_tokens_position_is_zero() -> None:
    fair = fair_state_dict(make_mae(0))
    for name, width in (("pos_embed", 192), ("decoder_pos_embed", 32)):
        assert fair[name].shape == (1, 17, width)
        assert not fair[name][0, 0].any()
        assert fair[name][0, 1].any()


def test_a_file_without_decoder_is_refused_in_words() -> None:
    mae = make_mae(0)
    with pytest.raises(ValueError, match="these weights have no decoder"):
        load_fair(mae, fair_encoder_state_dict(mae.encoder))


def test_positions_of_another_image_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pos_embed is \(1, 65, 192\), this model's is \(1, 17,"):
        load_fair_encoder(make_mae(0).encoder, fair_state_dict(make_mae(1, (64, 64))))


@pytest.mark.parametrize("name", ["pos_embed", "decoder_pos_embed"])
def test_learned_or_missing_positions_are_refused(name: str) -> None:
    mae = make_mae(0)
    weights = fair_state_dict(mae)
    weights[name] = weights[name] + 1e-3
    with pytest.raises(ValueError, match=f"{name} is not the fixed sine-cosine embedding"):
        load_fair(mae, weights)
    del weights[name]
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_fair(mae, weights)


def test_a_missing_and_an_unknown_name_are_errors() -> None:
    mae = make_mae(0)
    weights = fair_state_dict(mae)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*head\.weight"):
        load_fair(mae, {**weights, "head.weight": torch.zeros(10, 192)})
    del weights["norm.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*norm\.bias"):
        load_fair(mae, weights)
