import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from mae_core.config import ModelConfig
from mae_core.evaluation import classification
from mae_core.evaluation.classification import encode_features, knn_accuracy
from mae_core.model.conv_encoder import ConvEncoder
from mae_core.model.family import build_encoder


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


def test_knn_needs_k_training_images_and_a_temperature() -> None:
    features, labels = make_blobs(8)
    with pytest.raises(ValueError, match=r"k=20 is not in 1\.\.8, the training images"):
        knn_accuracy(features, labels, features, labels)
    with pytest.raises(ValueError, match=r"k=0 is not in 1\.\.8"):
        knn_accuracy(features, labels, features, labels, k=0)
    with pytest.raises(ValueError, match=r"temperature=0\.0 is not above 0"):
        knn_accuracy(features, labels, features, labels, k=1, temperature=0.0)


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


def test_features_are_of_the_patches_or_the_mean_of_all_class_tokens() -> None:
    torch.manual_seed(0)
    model = ModelConfig(encoder="vit_nano", img_size=(16, 16), patch_size=8, class_tokens=3)
    encoder, images = build_encoder(model).eval(), torch.randn(2, 3, 16, 16)
    tokens = encoder(images)
    torch.testing.assert_close(encode_features(encoder, images), tokens[:, 3:].mean(dim=1))
    found = encode_features(encoder, images, pool="cls")
    torch.testing.assert_close(found, tokens[:, :3].mean(dim=1))


def test_an_encoder_without_a_class_token_is_averaged_alone() -> None:
    torch.manual_seed(0)
    encoder, images = (
        ConvEncoder("convnextv2_atto", patch_size=4, in_chans=3).eval(),
        torch.randn(2, 3, 8, 8),
    )
    torch.testing.assert_close(encode_features(encoder, images), encoder(images).mean(dim=1))
    with pytest.raises(ValueError, match="pool=cls needs a class token"):
        encode_features(encoder, images, pool="cls")
