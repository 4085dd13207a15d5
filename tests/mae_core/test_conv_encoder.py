"""The laws of a masked convolutional encoder: what is removed is not there at all."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mae_core.config import CONV_ENCODERS
from mae_core.model.conv_encoder import ConvEncoder

NAMES = ["resnet18", "convnextv2_atto"]
SMALLEST_OF_EACH_KIND = [*NAMES, "resnet50", "convnextv2_tiny"]  # bottlenecks; a channels-last MLP


def make_encoder(name: str, patch_size: int = 4, in_chans: int = 3) -> ConvEncoder:
    """Build an encoder in which no bias, scale or response norm is at its neutral start."""
    torch.manual_seed(0)
    encoder = ConvEncoder(name, patch_size=patch_size, in_chans=in_chans)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return encoder


def random_ids(batch: int, num_patches: int, num_kept: int) -> Tensor:
    return torch.rand(batch, num_patches).argsort(dim=1)[:, :num_kept]


def changed_where_removed(
    images: Tensor, ids_keep: Tensor, patch_size: int, value: float
) -> Tensor:
    columns = images.shape[3] // patch_size
    changed = torch.full_like(images, value)
    for image, ids in enumerate(ids_keep.tolist()):
        for place in ids:
            top, left = place // columns * patch_size, place % columns * patch_size
            patch = (
                image,
                slice(None),
                slice(top, top + patch_size),
                slice(left, left + patch_size),
            )
            changed[patch] = images[patch]
    return changed


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", SMALLEST_OF_EACH_KIND)
def test_removed_pixels_change_no_bit_of_what_is_visible(name: str, is_training: bool) -> None:
    encoder = make_encoder(name).train(is_training)
    images, ids_keep = torch.randn(2, 3, 16, 24), random_ids(2, 24, 6)
    tokens = encoder(images, ids_keep)
    for value in (7.0, float("nan")):
        changed = changed_where_removed(images, ids_keep, 4, value)
        assert torch.equal(encoder(changed, ids_keep), tokens)


@pytest.mark.parametrize("patch_size", [32, 16, 8, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_visible_picture_does_not_know_what_removed_places_surround_it(
    name: str, patch_size: int
) -> None:
    """Any layer that leaks, or norm that counts removed places, breaks this."""
    encoder, side = make_encoder(name, patch_size).train(), patch_size
    picture = torch.randn(2, 3, 2 * side, 3 * side)
    canvas = torch.randn(2, 3, 4 * side, 4 * side)
    canvas[:, :, side : 3 * side, side:] = picture
    inside = torch.tensor([[5, 6, 7, 9, 10, 11]]).expand(2, -1)
    alone = encoder(picture)
    torch.testing.assert_close(encoder(canvas, inside), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SMALLEST_OF_EACH_KIND)
def test_with_nothing_removed_it_is_timms_model_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0, in_chans=4)
    ours = ConvEncoder(name, patch_size=32, in_chans=4)
    loaded = ours.net.load_state_dict(theirs.state_dict(), strict=False)
    assert loaded.missing_keys == []
    assert [x for x in loaded.unexpected_keys if not x.startswith("head.norm.")] == []
    images = torch.randn(2, 4, 64, 32)
    for mode in (True, False):
        expected = theirs.train(mode).forward_features(images)
        assert torch.equal(ours.train(mode).feature_map(images), expected)
    assert torch.equal(ours(images), expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", NAMES)
def test_keeping_every_patch_is_masking_nothing(name: str) -> None:
    encoder = make_encoder(name).eval()
    images = torch.randn(2, 3, 8, 8)
    every = torch.tensor([[2, 0, 3, 1], [0, 1, 2, 3]])
    expected = encoder(images)
    rows = torch.arange(2)[:, None]
    torch.testing.assert_close(encoder(images, every), expected[rows, every], atol=1e-5, rtol=1e-5)


def test_a_batch_norm_remembers_the_visible_places_alone() -> None:
    picture = torch.randn(2, 3, 8, 12)
    canvas = torch.randn(2, 3, 16, 16)
    canvas[:, :, 4:12, 4:] = picture
    alone, surrounded = make_encoder("resnet18"), make_encoder("resnet18")
    alone(picture)
    surrounded(canvas, torch.tensor([[5, 6, 7, 9, 10, 11]]).expand(2, -1))
    found: dict[str, Any] = surrounded.state_dict()
    statistics = {k: v for k, v in alone.state_dict().items() if "running" in k or "tracked" in k}
    assert len(statistics) == 60  # of 20 norms
    for name, value in statistics.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("patch_size", "strides"),
    [(32, (4, 8, 16, 32)), (16, (2, 4, 8, 16)), (8, (1, 2, 4, 8)), (4, (1, 1, 2, 4))],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_stages_have_the_strides_that_are_told(
    name: str, patch_size: int, strides: tuple[int, ...]
) -> None:
    encoder = make_encoder(name, patch_size, in_chans=1)
    images = torch.randn(1, 1, 2 * patch_size, 3 * patch_size)
    maps = encoder.maps(images, torch.tensor([[1, 4]]))
    assert encoder.strides == strides
    assert [m.shape[1] for m in maps] == list(CONV_ENCODERS[name])
    assert [(images.shape[2] // m.shape[2], images.shape[3] // m.shape[3]) for m in maps] == [
        (stride, stride) for stride in strides
    ]
    removed = maps[-1].flatten(2)[:, :, [0, 2, 3, 5]]
    assert removed.abs().max().item() == 0.0


@pytest.mark.parametrize("name", sorted(CONV_ENCODERS))
def test_every_name_has_the_widths_of_timms_model(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
    widths = [info["num_chs"] for info in theirs.feature_info][-4:]
    assert tuple(widths) == CONV_ENCODERS[name]


def test_an_image_that_the_stride_does_not_tile_is_an_error() -> None:
    with pytest.raises(ValueError, match="image 30x32 is not a multiple of patch_size=4"):
        make_encoder("resnet18")(torch.randn(1, 3, 30, 32))


def test_windows_of_attention_are_an_error() -> None:
    with pytest.raises(ValueError, match="window=7 limits attention"):
        make_encoder("resnet18").feature_map(torch.randn(1, 3, 8, 8), window=7)
