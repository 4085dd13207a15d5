import warnings

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.evaluation import classification, linear_probe
from mae_core.evaluation.classification import encode_features, knn_accuracy
from mae_core.evaluation.linear_probe import linear_probe_accuracy
from mae_core.model.encoder import build_encoder


def make_blobs(
    num_images: int, *, num_classes: int = 5, width: int = 16, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    noise = torch.randn(num_images, width, generator=generator)
    return centres[labels] + spread * noise, labels


def test_knn_weighs_votes_by_similarity() -> None:
    # Cosines with the test image (1, 0): 1.0 for class 0, 0.6 twice for class 1. Two votes of
    # exp(0.6 / t) beat one of exp(1 / t) when t > 0.4 / ln 2 = 0.577.
    train, labels = torch.tensor([[2.0, 0.0], [3.0, 4.0], [3.0, -4.0]]), torch.tensor([0, 1, 1])
    test, wanted = torch.tensor([[5.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, test, wanted, k=3, temperature=0.56) == 1.0
    assert knn_accuracy(train, labels, test, wanted, k=3, temperature=0.60) == 0.0


def test_knn_looks_at_k_neighbours_only() -> None:
    train, labels = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]]), torch.tensor([0, 1, 1])
    test, wanted = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, test, wanted, k=1, temperature=10.0) == 1.0
    assert knn_accuracy(train, labels, test, wanted, k=3, temperature=10.0) == 0.0


def test_knn_survives_a_small_temperature() -> None:
    # Cosines 1 and 0.995, both beyond what exp(cosine / temperature) can hold.
    train, labels = torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.tensor([1, 0])
    accuracy = knn_accuracy(train, labels, train, labels, k=2, temperature=1e-4)
    assert accuracy == 1.0


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_knn_agrees_with_sklearn(temperature: float) -> None:
    train, train_labels = make_blobs(400, spread=2.0)
    test, test_labels = make_blobs(300, spread=2.0, seed=1)

    def weights(distances: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.exp((1 - distances) / temperature)

    reference = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights)
    reference.fit(train.double().numpy(), train_labels.numpy())
    expected = reference.score(test.double().numpy(), test_labels.numpy())
    assert 0.5 < expected < 0.95
    accuracy = knn_accuracy(train, train_labels, test, test_labels, temperature=temperature)
    assert accuracy == pytest.approx(expected, abs=1e-9)


def test_knn_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    train, train_labels = make_blobs(100, spread=2.0)
    test, test_labels = make_blobs(101, spread=2.0, seed=1)
    whole = knn_accuracy(train, train_labels, test, test_labels)
    monkeypatch.setattr(classification, "_SIMILARITIES_PER_CHUNK", 700)
    assert knn_accuracy(train, train_labels, test, test_labels) == whole


def test_a_class_that_training_never_saw_is_wrong_not_an_error() -> None:
    train, labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    wanted = torch.tensor([0, 7])
    assert knn_accuracy(train, labels, train, wanted, k=1) == 0.5


def test_linear_probe_separates_what_a_line_separates() -> None:
    train, train_labels = make_blobs(300, spread=0.3)
    test, test_labels = make_blobs(200, spread=0.3, seed=1)
    assert linear_probe_accuracy(train, train_labels, test, test_labels, seed=0) == 1.0


def test_linear_probe_on_labels_without_meaning_is_chance() -> None:
    train, test = torch.randn(500, 8), torch.randn(1000, 8)
    labels = torch.arange(1000) % 4
    accuracy = linear_probe_accuracy(train, labels[:500], test, labels, seed=0)
    assert accuracy == pytest.approx(0.25, abs=0.07)


def test_linear_probe_does_not_mind_the_scale_of_a_feature() -> None:
    train, train_labels = make_blobs(300, spread=2.0)
    test, test_labels = make_blobs(200, spread=2.0, seed=1)
    plain = linear_probe_accuracy(train, train_labels, test, test_labels, seed=0)
    scale, shift = torch.logspace(-4, 4, 16), torch.linspace(-50, 50, 16)
    scaled = linear_probe_accuracy(
        (train + shift) * scale, train_labels, (test + shift) * scale, test_labels, seed=0
    )
    assert 0.5 < plain < 0.95
    assert scaled == pytest.approx(plain, abs=0.011)


def test_linear_probe_takes_its_statistics_from_training_images() -> None:
    # One feature, classes at -1 and 1; the test images are all of class 1 and lie at 1.
    train, labels = torch.tensor([[-1.0], [1.0]]).repeat(10, 1), torch.tensor([0, 1]).repeat(10)
    test, wanted = torch.full((4, 1), 1.0), torch.ones(4, dtype=torch.long)
    assert linear_probe_accuracy(train, labels, test, wanted, seed=0) == 1.0


def test_linear_probe_ignores_a_constant_feature() -> None:
    train, train_labels = make_blobs(300, spread=0.3)
    train[:, 3] = 0.7
    assert linear_probe_accuracy(train, train_labels, train, train_labels, seed=0) == 1.0


def test_linear_probe_chooses_a_strong_penalty_where_labels_are_noisy() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(1400) % 2
    features = torch.randn(1400, 150, generator=generator) + 0.2 * (2 * truth[:, None] - 1)
    is_flipped = torch.rand(400, generator=generator) < 0.3
    labels = torch.where(is_flipped, 1 - truth[:400], truth[:400])
    weak = LogisticRegression(C=1.0).fit(features[:400].numpy(), labels.numpy())
    assert weak.score(features[400:].numpy(), truth[400:].numpy()) < 0.7
    assert linear_probe_accuracy(features[:400], labels, features[400:], truth[400:], seed=0) > 0.85


def test_linear_probe_chooses_a_weak_penalty_where_a_small_difference_tells() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 2
    shared = torch.randn(2000, generator=generator)
    features = torch.stack([shared, shared + 0.1 * labels], dim=1)
    strong = LogisticRegression(C=1e-3).fit(features[:1000].numpy(), labels[:1000].numpy())
    assert strong.score(features[1000:].numpy(), labels[1000:].numpy()) < 0.7
    accuracy = linear_probe_accuracy(
        features[:1000], labels[:1000], features[1000:], labels[1000:], seed=0
    )
    assert accuracy > 0.95


def test_linear_probe_repeats_itself() -> None:
    train, train_labels = make_blobs(300, spread=2.0)
    test, test_labels = make_blobs(200, spread=2.0, seed=1)
    first, second = (
        linear_probe_accuracy(train, train_labels, test, test_labels, seed=3) for _ in range(2)
    )
    assert first == second


def test_linear_probe_that_stops_early_is_logged_not_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(linear_probe, "_MAX_ITERATIONS", 1)
    train, labels = make_blobs(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe_accuracy(train, labels, train, labels, seed=0)
    assert "linear probe stopped early" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_features": torch.zeros(8)}, r"train_features is \(8,\), not \(N, D\)"),
        ({"test_features": torch.zeros(0, 3)}, r"test_features is \(0, 3\), not .* N > 0"),
        ({"train_labels": torch.zeros(7).long()}, r"train_labels is \(7,\) for 8 train_features"),
        ({"test_labels": torch.zeros(0).long()}, r"test_labels is \(0,\) for 4 test_features"),
        ({"test_labels": torch.tensor([0, 1, 1, -1])}, "test_labels must be class indices from 0"),
        ({"train_labels": torch.zeros(8)}, "train_labels must be class indices from 0"),
        ({"test_features": torch.zeros(4, 2)}, "train_features are 3 wide, test_features 2"),
        ({"test_features": torch.full((4, 3), torch.nan)}, "test_features hold NaN or infinity"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_words(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "train_features": torch.randn(8, 3),
        "train_labels": torch.arange(8) % 2,
        "test_features": torch.randn(4, 3),
        "test_labels": torch.arange(4) % 2,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**arguments, k=2)
    with pytest.raises(ValueError, match=message):
        linear_probe_accuracy(**arguments, seed=0)


def test_knn_needs_k_training_images_and_a_temperature() -> None:
    features, labels = make_blobs(8)
    with pytest.raises(ValueError, match=r"k=20 is not in 1\.\.8, the training images"):
        knn_accuracy(features, labels, features, labels)
    with pytest.raises(ValueError, match=r"k=0 is not in 1\.\.8"):
        knn_accuracy(features, labels, features, labels, k=0)
    with pytest.raises(ValueError, match=r"temperature=0\.0 is not above 0"):
        knn_accuracy(features, labels, features, labels, k=1, temperature=0.0)


def test_linear_probe_needs_two_classes_and_images_to_hold_out() -> None:
    features = torch.randn(8, 3)
    with pytest.raises(ValueError, match="train_labels hold one class"):
        linear_probe_accuracy(
            features, torch.ones(8).long(), features, torch.ones(8).long(), seed=0
        )
    with pytest.raises(ValueError, match="no class has the 5 training images"):
        linear_probe_accuracy(features, torch.arange(8) % 2, features, torch.arange(8), seed=0)


class FixedTokens(nn.Module):
    """Three tokens of width 2: the class token, then two patches."""

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 6.0]]])
        return tokens.expand(len(images), -1, -1) * (100 if self.training else 1)


def test_features_are_the_mean_of_the_patch_tokens_or_the_class_token() -> None:
    images = torch.zeros(2, 3, 4, 4)
    assert encode_features(FixedTokens(), images).tolist() == [[2.0, 4.0], [2.0, 4.0]]
    assert encode_features(FixedTokens(), images, pool="cls").tolist() == [[9.0, 9.0], [9.0, 9.0]]


@pytest.mark.parametrize("training", [True, False])
def test_encoding_puts_the_mode_back(training: bool) -> None:
    encoder = FixedTokens().train(training)
    encode_features(encoder, torch.zeros(1, 3, 4, 4))
    assert encoder.training is training


def test_the_encoder_sees_every_patch_and_gets_no_gradient() -> None:
    encoder = build_encoder(ModelConfig(encoder="vit_micro", img_size=(16, 32), patch_size=8))
    images = torch.randn(1, 3, 16, 32).repeat(9, 1, 1, 1)
    for patch in range(8):
        row, column = divmod(patch, 4)
        images[patch, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1.0
    features = encode_features(encoder, images)
    assert features.shape == (9, 192)
    assert not features.requires_grad
    assert ((features[:8] - features[8]).abs().amax(dim=1) > 1e-4).all()
