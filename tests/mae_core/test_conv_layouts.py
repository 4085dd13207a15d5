import pytest
import timm
import torch

from mae_core.interchange.conv_layouts import timm_state_dict
from mae_core.model.conv_encoder import ConvEncoder


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_timm_takes_our_weights_as_they_are(name: str) -> None:
    torch.manual_seed(0)
    encoder = ConvEncoder(name, patch_size=32, in_chans=1).eval()
    theirs = timm.create_model(name, num_classes=0, in_chans=1).eval()
    theirs.load_state_dict(timm_state_dict(encoder))
    images = torch.randn(2, 1, 64, 32)
    assert torch.equal(theirs.forward_features(images), encoder.feature_map(images))
