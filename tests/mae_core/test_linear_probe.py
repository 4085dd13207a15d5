import warnings
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

from mae_core.evaluation import linear_probe
from mae_core.evaluation.linear_probe import fit_linear_probe, linear_probe_accuracy


def make_blobs(
    num_images: int, *, num_classes: int = 5, width: int = 16, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    centres = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    noise = torch.randn(num_images, width, generator=generator)
    return centres[labels] + spread * noise, labels


def test_it_separates_what_a_line_separates() -> None:
    train, train_labels = make_blobs(300, spread=0.3)
    test, test_labels = make_blobs(200, spread=0.3, seed=1)
    assert linear_probe_accuracy(train, train_labels, test, test_labels, seed=0) == 1.0


def test_labels_without_meaning_are_chance() -> None:
    train, test = torch.randn(500, 8), torch.randn(1000, 8)
    labels = torch.arange(1000) % 4
    accuracy = linear_probe_accuracy(train, labels[:500], test, labels, seed=0)
    assert accuracy == pytest.approx(0.25, abs=0.07)


def test_it_does_not_mind_the_scale_of_a_feature() -> None:
    train, train_labels = make_blobs(300, spread=2.0)
    test, test_labels = make_blobs(200, spread=2.0, seed=1)
    plain = linear_probe_accuracy(train, train_labels, test, test_labels, seed=0)
    scale, shift = torch.logspace(-4, 4, 16), torch.linspace(-50, 50, 16)
    scaled = linear_probe_accuracy(
        (train + shift) * scale, train_labels, (test + shift) * scale, test_labels, seed=0
    )
    assert 0.5 < plain < 0.95
    assert scaled == pytest.approx(plain, abs=0.011)


def test_it_takes_its_statistics_from_training_images() -> None:
    # One feature, classes at -1 and 1; the test images are all of class 1 and lie at 1.
    train, labels = torch.tensor([[-1.0], [1.0]]).repeat(10, 1), torch.tensor([0, 1]).repeat(10)
    test, wanted = torch.full((4, 1), 1.0), torch.ones(4, dtype=torch.long)
    assert linear_probe_accuracy(train, labels, test, wanted, seed=0) == 1.0


def test_it_ignores_a_constant_feature() -> None:
    train, train_labels = make_blobs(300, spread=0.3)
    train[:, 3] = 0.7
    assert linear_probe_accuracy(train, train_labels, train, train_labels, seed=0) == 1.0


def test_it_chooses_a_strong_penalty_where_labels_are_noisy() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(1400) % 2
    features = torch.randn(1400, 150, generator=generator) + 0.2 * (2 * truth[:, None] - 1)
    is_flipped = torch.rand(400, generator=generator) < 0.3
    labels = torch.where(is_flipped, 1 - truth[:400], truth[:400])
    weak = LogisticRegression(C=1.0).fit(features[:400].numpy(), labels.numpy())
    assert weak.score(features[400:].numpy(), truth[400:].numpy()) < 0.7
    assert linear_probe_accuracy(features[:400], labels, features[400:], truth[400:], seed=0) > 0.85


def test_it_chooses_a_weak_penalty_where_a_small_difference_tells() -> None:
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


def test_it_repeats_itself() -> None:
    train, train_labels = make_blobs(300, spread=2.0)
    test, test_labels = make_blobs(200, spread=2.0, seed=1)
    first, second = (
        linear_probe_accuracy(train, train_labels, test, test_labels, seed=3) for _ in range(2)
    )
    assert first == second


def test_a_fit_that_stops_early_is_logged_not_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(linear_probe, "_MAX_ITERATIONS", 1)
    train, labels = make_blobs(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe_accuracy(train, labels, train, labels, seed=0)
    assert "linear probe stopped early" in caplog.text


def test_it_needs_two_classes() -> None:
    features = torch.randn(8, 3)
    with pytest.raises(ValueError, match="train_labels hold one class"):
        linear_probe_accuracy(
            features, torch.ones(8).long(), features, torch.ones(8).long(), seed=0
        )


def test_one_image_of_each_class_is_enough() -> None:
    features = 4 * torch.eye(3)
    labels = torch.arange(3)
    assert linear_probe_accuracy(features, labels, features + 0.5, labels, seed=0) == 1.0


def test_a_class_without_an_image_is_the_least_likely_one() -> None:
    train, labels = make_blobs(300, num_classes=3, spread=0.3)
    probe = fit_linear_probe(train, 2 * labels, num_classes=5, seed=0)
    assert probe.weight.shape == (5, 16)
    logits = probe.logits(train)
    assert set(logits.argmax(dim=1).tolist()) == {0, 2, 4}
    assert set(logits.argmin(dim=1).tolist()) <= {1, 3}
    assert torch.equal(logits[:, 1], logits[:1, 1].expand(300))


def test_two_classes_get_a_logit_each() -> None:
    train, labels = make_blobs(300, num_classes=2, spread=0.3)
    probe = fit_linear_probe(train, labels, num_classes=2, seed=0)
    logits = probe.logits(train)
    assert (logits.argmax(dim=1) == labels).all()
    assert torch.allclose(logits.sum(dim=1), torch.zeros(300), atol=1e-6)


def test_each_finding_is_decided_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator)
    labels = torch.stack([features[:, 0] > 0, features[:, 1] > 1, features[:, 2] > 99], dim=1)
    probe = fit_linear_probe(features, labels.long(), num_classes=3, seed=0)
    found = probe.logits(features) > 0
    assert (found == labels).float().mean(dim=0).tolist() == pytest.approx([1, 1, 1], abs=0.03)
    assert probe.weight[2].tolist() == [0] * 6  # nobody has it
    assert probe.bias[2].item() == pytest.approx(-6.6859, abs=1e-3)  # ln(0.5 / 400.5)


def test_features_that_cannot_be_scored_are_refused() -> None:
    features, labels = make_blobs(20)
    with pytest.raises(ValueError, match="train_features hold NaN or infinity"):
        linear_probe_accuracy(features * torch.nan, labels, features, labels, seed=0)


def test_a_probe_is_not_sure_of_what_it_can_not_know() -> None:
    """On 100 features and random labels, a weak penalty fits the training images by heart."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(120, 100, generator=generator)
    labels = torch.arange(120) % 4
    unseen = torch.randn(400, 100, generator=generator)
    probe = fit_linear_probe(features, labels, num_classes=4, seed=0)
    loss = torch.nn.functional.cross_entropy(probe.logits(unseen), torch.arange(400) % 4)
    assert loss < 1.45  # a guess has 1.39, the same fit without a scale 5.45


def test_a_probe_is_sure_of_what_it_can_know() -> None:
    train, labels = make_blobs(300, spread=0.3)
    probe = fit_linear_probe(train, labels, num_classes=5, seed=0)
    assert probe.logits(train).softmax(dim=1).max(dim=1).values.mean() > 0.95


def test_few_images_of_weak_signal_are_not_left_to_one_fifth() -> None:
    """One fifth of 100 images often chooses a penalty under which nothing is learned."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 4
    centres = torch.randn(4, 32, generator=generator) * 0.6
    features = centres[labels] + torch.randn(100, 32, generator=generator)
    test_labels = torch.arange(400) % 4
    test = centres[test_labels] + torch.randn(400, 32, generator=generator)
    accuracies, losses = [], []
    for seed in range(10):
        probe = fit_linear_probe(features, labels, num_classes=4, seed=seed)
        logits = probe.logits(test)
        accuracies.append(float((logits.argmax(dim=1) == test_labels).float().mean()))
        losses.append(float(torch.nn.functional.cross_entropy(logits, test_labels)))
    assert min(accuracies) > 0.8
    assert max(losses) < 0.7  # a guess has 1.39


def test_a_fit_takes_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other made it fifty times slower on two busy cores."""
    threads = []
    fit = LogisticRegression.fit

    def watched(*arguments: Any) -> Any:
        threads.extend(x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas")
        return fit(*arguments)

    monkeypatch.setattr(LogisticRegression, "fit", watched)
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    with threadpool_limits(2, user_api="blas"):
        fit_linear_probe(features, torch.arange(40) % 2, num_classes=2, seed=0)
    assert set(threads) == {1}
