import torch
from torch import Tensor

from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.interchange.declared import Declared
from mae_core.interchange.fair import fair_encoder_state_dict, fair_state_dict
from mae_core.interchange.foreign import import_weights
from mae_core.interchange.weight_files import WeightsFile
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


def test_a_file_that_is_written_and_taken_over_holds_the_same_weights() -> None:
    ours = make_mae(0, (16, 48))
    file = WeightsFile(fair_state_dict(ours), "torch", None)
    found = import_weights(file, Declared(decoder_heads=2), "my.pth")
    assert found.has_decoder
    assert same(found.state, ours.state_dict())


def test_the_encoders_file_holds_the_encoder_alone() -> None:
    ours = make_mae(0)
    whole, encoder = fair_state_dict(ours), fair_encoder_state_dict(ours.encoder)
    assert {name for name in whole if name not in encoder} >= {"mask_token", "decoder_pos_embed"}
    assert not any(name.startswith("decoder_") for name in encoder)
    assert all(torch.equal(whole[name], encoder[name]) for name in encoder)


def test_class_tokens_position_is_zero() -> None:
    fair = fair_state_dict(make_mae(0))
    for name, width in (("pos_embed", 192), ("decoder_pos_embed", 32)):
        assert fair[name].shape == (1, 17, width)
        assert not fair[name][0, 0].any()
        assert fair[name][0, 1].any()
