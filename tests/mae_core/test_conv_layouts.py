from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mae_core.config import ModelConfig
from mae_core.interchange.conv_layouts import timm_state_dict
from mae_core.interchange.declared import Declared
from mae_core.interchange.foreign import ForeignWeights, import_weights
from mae_core.interchange.weight_files import RefusedWeightsError, WeightsFile
from mae_core.model.conv_encoder import ConvEncoder
from mae_core.model.family import build_encoder


def taken(weights: dict[str, Tensor], **declared: Any) -> ForeignWeights:
    return import_weights(WeightsFile(weights, "torch", None), Declared(**declared), "my.pth")


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_timm_takes_our_weights_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(name, patch_size=32, in_chans=1).eval()
    theirs = timm.create_model(name, num_classes=0, in_chans=1).eval()
    theirs.load_state_dict(timm_state_dict(encoder))
    images = torch.randn(2, 1, 64, 32)
    features = encoder.feature_map(images)
    assert torch.equal(theirs.forward_features(images), features)
    pooled = features.mean(dim=(2, 3))
    if name != "resnet18":  # behind the pooling, a new norm
        pooled = torch.nn.functional.layer_norm(pooled, (320,), eps=1e-6)
    torch.testing.assert_close(theirs(images), pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_our_encoder_computes_what_timms_does_with_its_weights(name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=5, in_chans=4).eval()
    found = taken(theirs.state_dict(), img_size=(64, 96))
    assert found.model == ModelConfig.model_validate(
        {"encoder": name, "img_size": [64, 96], "patch_size": 32, "in_chans": 4}
    )
    assert found.notes == ("The classifier, with the norm before it, is left out.",)
    assert found.norm_pix is None
    ours = build_encoder(found.model).eval()
    ours.load_state_dict({key.removeprefix("encoder."): x for key, x in found.state.items()})
    images = torch.randn(2, 4, 64, 96)
    assert torch.equal(ours.feature_map(images), theirs.forward_features(images))


def test_a_size_that_the_stride_does_not_tile_becomes_224() -> None:
    weights = timm.create_model("convnextv2_atto", num_classes=0).state_dict()
    assert taken(weights, img_size=(225, 225)).model.img_size == (224, 224)


def test_an_old_file_without_counters_is_taken() -> None:
    weights = timm.create_model("resnet18", num_classes=0).state_dict()
    kept = {key: x for key, x in weights.items() if not key.endswith("num_batches_tracked")}
    found = taken(kept)
    assert found.state["encoder.net.bn1.num_batches_tracked"].item() == 0
    assert found.notes == ()


def test_other_convolutional_models_are_refused_by_the_tensor() -> None:
    for name, told in {
        "resnet34": r"my\.pth: layer1\.2\.conv1\.weight: is there and has no place, as in resnet18",
        "convnext_atto": r"my\.pth: stages\.0\.blocks\.0\.mlp\.grn\.weight: is missing",
        "resnet18d": r"my\.pth: conv1\.weight: is \(\), as in none of our convolutional encoders",
        "convnextv2_small": r"my\.pth: stages\.2\.blocks\.9\.conv_dw\.weight: is there and has no",
    }.items():
        weights = timm.create_model(name, num_classes=0).state_dict()
        with pytest.raises(RefusedWeightsError, match=told):
            taken(weights)


def test_a_value_that_is_no_number_is_damage() -> None:
    weights = timm.create_model("convnextv2_atto", num_classes=0).state_dict()
    weights["stem.1.bias"][3] = torch.nan
    with pytest.raises(RuntimeError, match=r"stem\.1\.bias: 1 of 40 values are NaN"):
        taken(weights)
