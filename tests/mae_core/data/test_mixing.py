import math

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from torch import Tensor

from mae_core.data.mixing import mix_batch, soft_targets


def make_batch(number: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.arange(number) % 5
    return torch.rand(number, 3, 8, 12), labels, soft_targets(labels, 5)


def test_soft_targets_spread_their_smoothing_over_all_classes() -> None:
    targets = soft_targets(torch.tensor([2, 0]), 4, smoothing=0.2)
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    assert torch.allclose(targets, expected)
    one_hot = soft_targets(torch.tensor([1]), 3, smoothing=0.0)
    assert one_hot.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("mixup_alpha", "cutmix_alpha", "switch_probability", "probability"),
    [(0.8, 1.0, 0.5, 1.0), (0.8, 0.0, 0.5, 1.0), (0.0, 1.0, 0.5, 1.0), (0.3, 0.6, 0.2, 0.5)],
)
def test_batches_are_mixed_as_timm_mixes_them(
    monkeypatch: pytest.MonkeyPatch,
    mixup_alpha: float,
    cutmix_alpha: float,
    switch_probability: float,
    probability: float,
) -> None:
    """timm draws from numpy's global state; here it draws from a generator like ours."""
    mixup = Mixup(
        mixup_alpha,
        cutmix_alpha,
        prob=probability,
        switch_prob=switch_probability,
        label_smoothing=0.1,
        num_classes=5,
    )
    num_mixed = 0
    for seed in range(40):
        images, labels, targets = make_batch()
        ours = mix_batch(
            images,
            targets,
            np.random.default_rng(seed),
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            switch_probability=switch_probability,
            probability=probability,
        )
        theirs = np.random.default_rng(seed)
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "rand", theirs.random)
            patch.setattr(np.random, "beta", theirs.beta)
            patch.setattr(np.random, "randint", theirs.integers)
            expected_images, expected_targets = mixup(images.clone(), labels)
        assert torch.equal(ours[0], expected_images)
        assert torch.allclose(ours[1], expected_targets, atol=1e-6)
        num_mixed += not torch.equal(ours[0], images)
    # A box may be so small that it is empty.
    assert num_mixed > 34 if probability == 1 else 10 < num_mixed < 30


def test_an_image_and_its_target_are_mixed_to_the_same_share() -> None:
    # An image is all 1 or all 0, so its mean is the share of the first class.
    images = torch.tensor([1.0, 0.0])[:, None, None, None].expand(2, 1, 10, 10).clone()
    targets = torch.eye(2)
    for seed in range(50):
        mixed, mixed_targets = mix_batch(images, targets, np.random.default_rng(seed))
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), mixed_targets[:, 0], atol=1e-6)
        assert torch.allclose(mixed_targets.sum(dim=1), torch.ones(2))


def test_cutmix_pastes_one_box_of_the_image_from_the_other_end() -> None:
    images, _, targets = make_batch()
    num_pasted = []
    for seed in range(50):
        generator = np.random.default_rng(seed)
        mixed, _ = mix_batch(images, targets, generator, mixup_alpha=0)
        is_pasted = (mixed != images).any(dim=1)  # (B, H, W)
        assert (is_pasted == is_pasted[0]).all()
        assert torch.equal(torch.where(is_pasted[:, None], images.flip(0), images), mixed)
        rows, columns = is_pasted[0].any(dim=1), is_pasted[0].any(dim=0)
        assert torch.equal(is_pasted[0], rows[:, None] & columns)
        num_pasted.append(int(is_pasted[0].sum()))
    assert min(num_pasted) < 10
    assert max(num_pasted) > 60


def test_the_same_generator_mixes_alike_and_inputs_stay() -> None:
    images, _, targets = make_batch()
    before = images.clone(), targets.clone()
    for seed in range(10):
        first, second = (mix_batch(images, targets, np.random.default_rng(seed)) for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])


def test_batches_of_an_odd_number_and_of_one_work() -> None:
    for seed in range(10):
        images, _, targets = make_batch(3)
        mixed, mixed_targets = mix_batch(images, targets, np.random.default_rng(seed))
        assert torch.allclose(mixed[1], images[1])
        assert torch.allclose(mixed_targets[1], targets[1])
        images, _, targets = make_batch(1)
        mixed, mixed_targets = mix_batch(images, targets, np.random.default_rng(seed))
        assert torch.equal(mixed, images)
        assert torch.equal(mixed_targets, targets)


def test_with_both_turned_off_nothing_is_mixed() -> None:
    images, _, targets = make_batch()
    generator = np.random.default_rng(0)
    mixed, _ = mix_batch(images, targets, generator, mixup_alpha=0, cutmix_alpha=0)
    assert torch.equal(mixed, images)
    mixed, _ = mix_batch(images, targets, generator, probability=0)
    assert torch.equal(mixed, images)


def test_kept_shares_follow_a_beta_distribution() -> None:
    images, targets = torch.zeros(2, 1, 4, 4), torch.eye(2)
    generator = np.random.default_rng(0)
    shares = [
        float(mix_batch(images, targets, generator, cutmix_alpha=0)[1][0, 0]) for _ in range(2000)
    ]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    # Of Beta(a, a): 1 / (4 (2 a + 1)).
    assert np.std(shares) == pytest.approx(math.sqrt(1 / (4 * 2.6)), abs=0.015)
