"""Levels have the right size for any stride; windows attend only to themselves."""

import pytest
import torch

from mae_core.config import ModelConfig
from mae_core.model.family import build_encoder
from mae_core.model.feature_pyramid import FeaturePyramid, StagePyramid, build_pyramid


@pytest.mark.parametrize(
    ("stride", "strides"), [(16, (4, 8, 16, 32)), (8, (8, 16)), (4, (2, 4)), (14, (7, 14, 28))]
)
def test_each_level_has_the_size_that_its_stride_says(
    stride: int, strides: tuple[int, ...]
) -> None:
    pyramid = FeaturePyramid(24, stride, strides=strides, channels=16)
    levels = pyramid(torch.randn(2, 24, 4, 8))
    assert [level.shape for level in levels] == [
        (2, 16, 4 * stride // s, 8 * stride // s) for s in strides
    ]


def test_a_stride_that_no_doubling_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match="stride 12 is not the encoder's stride times a"):
        FeaturePyramid(24, 16, strides=(12,))


def test_a_level_of_one_place_is_not_all_bias() -> None:
    pyramid = FeaturePyramid(24, 16, strides=(16,), channels=32).eval()
    first, second = (pyramid(torch.randn(1, 24, 1, 1))[0] for _ in range(2))
    assert not torch.allclose(first, second)


def make_encoder(depth_seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(depth_seed)
    return build_encoder(ModelConfig(encoder="vit_micro", img_size=32, patch_size=8)).eval()


def test_the_map_has_the_patch_tokens_in_their_places() -> None:
    encoder = make_encoder()
    images = torch.randn(2, 3, 32, 48)
    tokens, features = encoder(images), encoder.feature_map(images)
    assert features.shape == (2, 192, 4, 6)
    assert torch.equal(features[1, :, 2, 5], tokens[1, 1 + 2 * 6 + 5])


def test_windows_that_hold_the_whole_image_see_all_of_it_but_the_class_token() -> None:
    encoder = make_encoder()
    images = torch.randn(1, 3, 32, 32)
    whole, windowed = encoder.feature_map(images, window=4), encoder.feature_map(images, window=2)
    patches = encoder._embed(images)
    expected = encoder.norm(encoder.blocks(patches)).transpose(1, 2).reshape(1, 192, 4, 4)
    assert torch.allclose(whole, expected, atol=1e-5)
    assert not torch.allclose(whole, windowed, atol=1e-3)


def test_a_patch_sees_only_its_window_before_the_first_global_block() -> None:
    """Of 12 blocks every third is global; the first two stay in their windows."""
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(encoder="vit_tiny", img_size=32, patch_size=8)).eval()
    encoder.blocks[2] = torch.nn.Identity()  # the first global one
    encoder.blocks = encoder.blocks[:3]
    encoder.blocks.extend([torch.nn.Identity()] * 9)
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[..., 16:, 16:] += 1.0  # the last window
    before, after = (encoder.feature_map(x, window=2) for x in (images, changed))
    assert torch.equal(before[..., :2, :], after[..., :2, :])
    assert torch.equal(before[..., 2:, :2], after[..., 2:, :2])
    assert not torch.allclose(before[..., 2:, 2:], after[..., 2:, 2:])


def test_an_image_that_windows_do_not_tile_is_padded_and_cut_back() -> None:
    encoder = make_encoder()
    assert encoder.feature_map(torch.randn(2, 3, 40, 56), window=3).shape == (2, 192, 5, 7)


def test_stochastic_depth_is_off_in_eval_mode_and_drops_in_training() -> None:
    torch.manual_seed(0)
    config = ModelConfig(encoder="vit_micro", img_size=16, patch_size=8)
    encoder = build_encoder(config, drop_path_rate=0.9)
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(encoder.eval()(images), encoder(images))
    torch.manual_seed(1)
    first = encoder.train()(images)
    assert not torch.allclose(first, encoder(images))


class Stages(torch.nn.Module):
    """An encoder whose maps hold the number of their stage."""

    embed_dim, patch_size = 24, 32
    channels, strides = (4, 8, 16, 24), (4, 8, 16, 32)

    def feature_map(self, images: torch.Tensor, *, window: int = 0) -> torch.Tensor:
        return self.stages(images)[-1]

    def stages(self, images: torch.Tensor) -> list[torch.Tensor]:
        height, width = images.shape[-2:]
        return [
            torch.full((len(images), c, height // s, width // s), float(i))
            for i, (c, s) in enumerate(zip(self.channels, self.strides, strict=True))
        ]


@pytest.mark.parametrize(
    ("strides", "sources"),
    [
        ((4, 8, 16, 32), (0, 1, 2, 3)),  # directly
        ((8, 32, 64), (1, 3, 3)),  # the last is pooled from the coarsest map
        ((2, 4), (0, 0)),  # the first is deconvolved from the finest
    ],
)
def test_each_level_of_a_staged_encoder_reads_the_map_of_its_stride(
    strides: tuple[int, ...], sources: tuple[int, ...]
) -> None:
    pyramid = build_pyramid(Stages(), strides=strides, channels=16)
    assert isinstance(pyramid, StagePyramid)
    assert pyramid.sources == sources
    levels = pyramid(Stages().stages(torch.zeros(2, 3, 64, 128)))
    assert [tuple(x.shape) for x in levels] == [(2, 16, 64 // s, 128 // s) for s in strides]


def test_of_maps_with_one_stride_the_deepest_is_read() -> None:
    pyramid = StagePyramid([(4, 1), (8, 1), (16, 2)], strides=(1, 2), channels=16)
    assert pyramid.sources == (1, 2)


@pytest.mark.parametrize(("top_down", "changes"), [(True, True), (False, False)])
def test_a_finer_level_knows_the_coarser_one_if_asked_for(top_down: bool, changes: bool) -> None:
    torch.manual_seed(0)
    pyramid = build_pyramid(Stages(), strides=(8, 32), channels=16, top_down=top_down)
    maps = Stages().stages(torch.zeros(1, 3, 64, 64))
    before = pyramid(maps)
    maps[3] = torch.randn(1, 24, 2, 2)
    after = pyramid(maps)
    assert not torch.equal(before[1], after[1])
    assert torch.equal(before[0], after[0]) is not changes


def test_an_encoder_with_one_map_gets_the_simple_pyramid() -> None:
    assert isinstance(build_pyramid(make_encoder(), strides=(8,), channels=16), FeaturePyramid)
