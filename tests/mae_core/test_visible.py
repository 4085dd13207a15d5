import pytest
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.models.convnext import ConvNeXtBlock, ConvNeXtStage
from torch import nn

from mae_core.model.visible import MaskedBatchNorm2d, Visible, enlarged, keep_mask

LEFT = torch.tensor([[[[True, False]]]])  # of a map of 1 x 2 places


def test_kept_patches_become_a_map() -> None:
    mask = keep_mask(torch.tensor([[4, 0], [1, 2]]), (2, 3))
    assert mask[:, 0].long().tolist() == [[[1, 0, 0], [0, 1, 0]], [[0, 1, 1], [0, 0, 0]]]


def test_a_place_becomes_a_square_of_places() -> None:
    expected = [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert enlarged(LEFT, 2)[0, 0].long().tolist() == expected


def test_what_is_not_visible_is_zero_at_every_scale_and_only_while_active() -> None:
    visible = Visible()
    with visible.only(LEFT):
        assert visible.is_active
        assert visible.zeroed(torch.ones(1, 3, 1, 2)).sum().item() == 3
        assert visible.zeroed(torch.ones(1, 3, 4, 8))[0, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert not visible.is_active


def test_an_error_in_between_ends_the_mask_too() -> None:
    visible = Visible()
    with pytest.raises(RuntimeError), visible.only(LEFT):
        raise RuntimeError
    assert not visible.is_active


@pytest.mark.parametrize(
    "layer", [nn.MaxPool2d(3, 1, 1), ConvNeXtBlock(3), ConvNeXtStage(3, 3, stride=1, depth=1)]
)
def test_a_watched_layer_leaves_nothing_beside_what_is_visible(layer: nn.Module) -> None:
    visible, features = Visible(), torch.rand(1, 3, 2, 4) + 1
    visible.watch(nn.Sequential(layer))
    with visible.only(LEFT):
        output = layer(features)
    assert (output[..., :2] != 0).all()
    assert (output[..., 2:] == 0).all()
    assert (layer(features) != 0).all()


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_response_norm_sums_over_what_is_visible(channels_last: bool) -> None:
    torch.manual_seed(0)
    norm, visible = GlobalResponseNorm(3, channels_last=channels_last), Visible()
    nn.init.ones_(norm.weight)
    visible.watch(norm)
    features = torch.randn(1, 3, 2, 4)
    order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    alone = norm(features[..., :2].permute(order))
    with visible.only(LEFT):
        output = norm(features.permute(order))
    seen = output[:, :, :2] if channels_last else output[..., :2]
    torch.testing.assert_close(seen, alone)


def test_a_batch_norm_counts_what_is_visible() -> None:
    torch.manual_seed(0)
    visible = Visible()
    ours, theirs = MaskedBatchNorm2d(3, visible=visible), nn.BatchNorm2d(3)
    for norm in (ours, theirs):
        nn.init.constant_(norm.bias, 0.5)
    features = torch.randn(2, 3, 2, 4) * 3 + 1
    with visible.only(LEFT.expand(2, -1, -1, -1)):
        output = ours(features)
    torch.testing.assert_close(output[..., :2], theirs(features[..., :2]))
    assert (output[..., 2:] == 0).all()
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert int(ours.num_batches_tracked) == 1  # type: ignore[arg-type]
    with visible.only(LEFT.expand(2, -1, -1, -1)):
        measured = ours.eval()(features)
    torch.testing.assert_close(measured[..., :2], theirs.eval()(features)[..., :2])
    assert (measured[..., 2:] == 0).all()
