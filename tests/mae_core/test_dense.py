"""The map that a head gets is well conditioned, the same in training and evaluation."""

import pytest
import torch
from torch import Tensor, nn

from mae_core.model.dense import Conditioning, ConditioningKind, DenseModel, MapOptions


def make_places(count: int = 4096) -> Tensor:
    """Vectors of four channels: a large mean, and one direction with most of the variance."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 4, generator=generator)
    common = torch.randn(count, 1, generator=generator)
    mean = torch.tensor([9.0, -5.0, 3.0, 0.0])
    return 0.1 * noise + 2 * common * torch.tensor([1.0, 1.0, -1.0, 0.5]) + mean


def fitted(kind: ConditioningKind, places: Tensor) -> Conditioning:
    conditioning = Conditioning(4, kind)
    conditioning.fit(places)
    return conditioning


def apply(conditioning: Conditioning, places: Tensor) -> Tensor:
    return conditioning(places.T[None, :, :, None])[0, :, :, 0].T


def test_whitening_gives_every_direction_the_variance_one() -> None:
    places = make_places()
    found = apply(fitted("whiten", places), places).double()
    assert found.mean(dim=0).abs().max() < 1e-4
    # The small directions hold a bit less than 1: a thousandth of the mean variance was added.
    values = torch.linalg.eigvalsh(found.T.cov())
    assert 0.6 < values.min() < values.max() < 1.001


def test_whitening_turns_no_direction() -> None:
    """The matrix is symmetric (ZCA), so a channel stays nearest to itself."""
    matrix = fitted("whiten", make_places()).matrix
    torch.testing.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_standardizing_gives_every_channel_the_variance_one_and_keeps_their_correlation() -> None:
    places = make_places()
    found = apply(fitted("standardize", places), places).double()
    assert found.mean(dim=0).abs().max() < 1e-4
    torch.testing.assert_close(found.var(dim=0), torch.ones(4).double(), atol=5e-3, rtol=0)
    assert found.T.cov()[0, 2] < -0.95


def test_a_direction_with_hardly_any_variance_stays_small() -> None:
    places = make_places()
    places[:, 3] = places[:, 0] + 1e-5 * places[:, 3]
    values = torch.linalg.eigvalsh(apply(fitted("whiten", places), places).double().T.cov())
    assert values.min() < 1e-3
    assert values.max() < 1.001


def test_a_constant_map_becomes_zero_and_not_nan() -> None:
    places = torch.full((9, 4), 7.0)
    for kind in ("whiten", "standardize"):
        assert torch.equal(apply(fitted(kind, places), places), torch.zeros(9, 4))


def test_what_can_not_be_fitted_is_refused_in_words() -> None:
    for places in (torch.zeros(0, 4), torch.full((2, 4), float("nan"))):
        with pytest.raises(ValueError, match=rf"can't be conditioned: {len(places)} places"):
            fitted("whiten", places)


class Scaled(nn.Module):
    """An encoder with patches of two pixels, whose map is a multiple of their first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.patch_size = 4, 2
        self.scale = nn.Parameter(torch.tensor(2.0))

    def feature_map(self, images: Tensor, *, window: int = 0) -> Tensor:
        return self.scale * images[..., ::2, ::2]


def test_the_head_gets_the_conditioned_map_and_the_conditioning_is_not_trained() -> None:
    model = DenseModel(Scaled(), MapOptions(conditioning="whiten"))
    model.conditioning.fit(make_places())
    images = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    found = model.feature_map(images)
    expected = fitted("whiten", make_places())(2 * images[..., ::2, ::2])
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert model.encoder.scale.grad is not None
    assert [name for name, _ in model.named_parameters()] == ["encoder.scale"]


def test_the_conditioning_is_kept_with_the_weights() -> None:
    model, other = (DenseModel(Scaled(), MapOptions(conditioning="whiten")) for _ in range(2))
    model.conditioning.fit(make_places())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.conditioning.matrix, model.conditioning.matrix)
    torch.testing.assert_close(other.conditioning.mean, model.conditioning.mean)


def test_places_are_sampled_of_the_picture_alone_and_unconditioned() -> None:
    model = DenseModel(Scaled(), MapOptions(conditioning="whiten"))
    model.conditioning.fit(make_places())
    images = torch.zeros(2, 4, 8, 12)
    images[0, :, :3, :4] = 5  # of the first, only the picture is not 0
    images[1] = torch.arange(96.0).reshape(8, 12)
    whole, limited = (model.sampled_places(images, [(3, 4), (8, 12)], limit=n) for n in (99, 3))
    assert whole[0].tolist() == [[10.0] * 4] * 4  # two rows and two columns of patches
    assert whole[1].shape == (24, 4)
    assert limited[1][:, 0].tolist() == [0, 2 * (2 * 12 + 4), 2 * (4 * 12 + 8)]  # every eighth
    assert torch.equal(model.sampled_places(images, limit=99)[1], whole[1])


def test_without_conditioning_the_map_is_the_encoders_own() -> None:
    model = DenseModel(Scaled(), MapOptions())
    model.conditioning.fit(make_places())
    images = torch.randn(2, 4, 6, 6)
    assert torch.equal(model.feature_map(images), 2 * images[..., ::2, ::2])


class Staged(nn.Module):
    """An encoder with a map of every fourth pixel, and a finer one of every second."""

    embed_dim, patch_size, channels, strides = 4, 4, (1, 4), (2, 4)

    def feature_map(self, images: Tensor, *, window: int = 0) -> Tensor:
        return self.stages(images)[-1]

    def stages(self, images: Tensor) -> list[Tensor]:
        return [images[:, :1, ::2, ::2], images[..., ::4, ::4]]


def test_every_map_of_a_staged_encoder_is_conditioned_on_its_own() -> None:
    model = DenseModel(Staged(), MapOptions(conditioning="whiten"))
    fine = torch.randn(4096, 1, generator=torch.Generator().manual_seed(2)) * 5 + 20
    model.conditioning.fit(torch.cat([fine, make_places()], dim=1))
    images = torch.randn(2, 4, 8, 8)
    first, second = model.feature_map(images)
    torch.testing.assert_close(
        first, (images[:, :1, ::2, ::2] - fine.mean()) / fine.std(), atol=1e-2, rtol=1e-2
    )
    torch.testing.assert_close(second, fitted("whiten", make_places())(images[..., ::4, ::4]))


def test_places_of_several_maps_lie_side_by_side() -> None:
    model = DenseModel(Staged(), MapOptions(conditioning="whiten"))
    images = torch.arange(4 * 64.0).reshape(1, 4, 8, 8)
    (places,) = model.sampled_places(images, [(8, 4)], limit=9)
    # Of the finer map, what lies in the middle of a place: at row and column 2 of the first.
    assert places.tolist() == [[18, 0, 64, 128, 192], [50, 32, 96, 160, 224]]


def test_a_staged_encoder_has_no_windows() -> None:
    with pytest.raises(ValueError, match="window=7 limits attention"):
        DenseModel(Staged(), MapOptions(window=7))
