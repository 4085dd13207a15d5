"""The map that a head gets is well conditioned, the same in training and evaluation."""

import pytest
import torch
from torch import Tensor, nn

from mae_core.model.dense import Conditioning, ConditioningKind, DenseModel, MapMoments, MapOptions


def make_features(num_maps: int = 64) -> Tensor:
    """Maps of four channels: a large mean, and one direction with most of the variance."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num_maps, 4, 8, 8, generator=generator)
    common = torch.randn(num_maps, 1, 8, 8, generator=generator)
    mean = torch.tensor([9.0, -5.0, 3.0, 0.0])[:, None, None]
    return 0.1 * noise + 2 * common * torch.tensor([1.0, 1.0, -1.0, 0.5])[:, None, None] + mean


def moments_of(*parts: Tensor) -> MapMoments:
    moments = MapMoments(4)
    for part in parts:
        moments.add(part)
    return moments


def fitted(kind: ConditioningKind, features: Tensor) -> Conditioning:
    conditioning = Conditioning(4, kind)
    conditioning.fit(moments_of(features))
    return conditioning


def test_moments_are_those_of_all_places_whatever_the_parts() -> None:
    features = make_features()
    places = features.movedim(1, -1).flatten(0, 2).double()
    for moments in (moments_of(features), moments_of(*features.split(5))):
        assert moments.count == 64 * 64
        torch.testing.assert_close(moments.mean, places.mean(dim=0))
        torch.testing.assert_close(moments.covariance, places.T.cov(correction=0))


def test_whitening_gives_every_direction_the_variance_one() -> None:
    features = make_features()
    moments = moments_of(fitted("whiten", features)(features))
    assert moments.mean.abs().max() < 1e-4
    # The small directions hold a bit less than 1: a thousandth of the mean variance was added.
    assert moments.covariance.diagonal().min() > 0.6
    values = torch.linalg.eigvalsh(moments.covariance)
    assert 0.6 < values.min() < values.max() < 1.001


def test_standardizing_gives_every_channel_the_variance_one_and_keeps_their_correlation() -> None:
    features = make_features()
    moments = moments_of(fitted("standardize", features)(features))
    assert moments.mean.abs().max() < 1e-4
    torch.testing.assert_close(
        moments.covariance.diagonal(), torch.ones(4).double(), atol=5e-3, rtol=0
    )
    assert moments.covariance[0, 2] < -0.95


def test_a_direction_with_hardly_any_variance_stays_small() -> None:
    features = make_features()
    features[:, 3] = features[:, 0] + 1e-5 * features[:, 3]
    values = torch.linalg.eigvalsh(moments_of(fitted("whiten", features)(features)).covariance)
    assert values.min() < 1e-3
    assert values.max() < 1.001


def test_a_constant_map_becomes_zero_and_not_nan() -> None:
    features = torch.full((2, 4, 3, 3), 7.0)
    for kind in ("whiten", "standardize"):
        assert torch.equal(fitted(kind, features)(features), torch.zeros(2, 4, 3, 3))


def test_what_can_not_be_fitted_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="no feature map to fit"):
        Conditioning(4, "whiten").fit(MapMoments(4))
    with pytest.raises(ValueError, match="not finite"):
        fitted("whiten", torch.full((1, 4, 2, 2), float("nan")))


class Doubler(nn.Module):
    """An encoder whose map depends on its mode, as one with stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_dim, self.patch_size = 4, 1
        self.scale = nn.Parameter(torch.tensor(1.0))

    def feature_map(self, images: Tensor, *, window: int = 0) -> Tensor:
        return self.scale * images * (2 if self.training else 1)


def test_a_model_is_fitted_to_the_map_of_its_encoder_in_eval_mode() -> None:
    model = DenseModel(Doubler(), MapOptions(conditioning="whiten")).train()
    features = make_features()
    unfitted = model.eval().feature_map(features)
    torch.testing.assert_close(unfitted, features)
    model.train().fit_conditioning(features.split(10))
    assert model.training
    assert model.encoder.training
    torch.testing.assert_close(
        model.eval().feature_map(features), fitted("whiten", features)(features)
    )


def test_gradients_pass_and_the_conditioning_is_kept_but_not_trained() -> None:
    model = DenseModel(Doubler(), MapOptions(conditioning="whiten"))
    model.fit_conditioning([make_features()])
    model.feature_map(make_features(2)).square().sum().backward()
    assert model.encoder.scale.grad is not None
    assert [name for name, _ in model.named_parameters()] == ["encoder.scale"]
    other = DenseModel(Doubler(), MapOptions(conditioning="whiten"))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.conditioning.matrix, model.conditioning.matrix)


def test_without_conditioning_the_map_is_the_encoders_own() -> None:
    model = DenseModel(Doubler(), MapOptions()).eval()
    model.fit_conditioning([make_features()])
    features = make_features(2)
    assert torch.equal(model.feature_map(features), features)
