"""Fit a linear classifier to frozen features, and measure how well it separates classes.

This is its own module because importing scikit-learn takes most of a second.
"""

import logging
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from mae_core.evaluation.classification import check_features

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer[Any]]

logger = logging.getLogger(__name__)

_INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # sklearn's C, strongest penalty first
_FEW_SHOT_INVERSE_PENALTY = 0.1  # where there are too few images to choose one
_FOLDS = 5
_FEW_IMAGES = 500
_CLEAR = 2.0  # standard errors; a smaller fall may be chance
_SCALES = tuple(10 ** (exponent / 10) for exponent in range(-20, 31))  # 0.01 to 1000
_MAX_ITERATIONS = 1000


class LinearProbe(NamedTuple):
    """A linear classifier on standardised features."""

    mean: Float[Tensor, " D"]  # of the training features
    std: Float[Tensor, " D"]  # 1 where a feature is constant
    weight: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]

    def logits(self, features: Float[Tensor, "M D"]) -> Float[Tensor, "M K"]:
        """Return a logit for each class or finding."""
        return ((features.float() - self.mean) / self.std) @ self.weight.T + self.bias


def linear_probe_accuracy(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    test_features: Float[Tensor, "M D"],
    test_labels: Int[Tensor, " M"],
    *,
    seed: int,
) -> float:
    """Return the top-1 accuracy of `fit_linear_probe` on the test images."""
    check_features(train_features, train_labels, test_features, test_labels)
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    probe = fit_linear_probe(train_features, train_labels, num_classes=num_classes, seed=seed)
    is_right = probe.logits(test_features).argmax(dim=1) == test_labels
    return float(is_right.float().mean())


def fit_linear_probe(
    features: Float[Tensor, "N D"],
    labels: Int[Tensor, "N *K"],
    *,
    num_classes: int,
    seed: int,
) -> LinearProbe:
    """Fit a logistic regression to standardised features.

    It is multinomial for a class per image, and binary per finding for (N, K) labels of 0 and 1.
    The strength of the L2 penalty is chosen on a fifth of the images, drawn with `seed` from each
    class, or of 500 images or fewer on each fifth in turn, because the choice would be chance on
    a single one; then the fit is repeated on all of them. As in Radford et al. 2021,
    https://arxiv.org/abs/2103.00020, section A.3. Differs: a coarse grid, and the search stops when
    the score falls by more than chance explains. Findings are chosen by log loss, because most are
    rare and accuracy would not see them; a class per image by accuracy, and the logits are then
    scaled by the factor with the smallest log loss on the held images (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). Where no class has the five images that the choice needs, the
    penalty is fixed.

    Reason for the choice: on CIFAR-10, raw pixels (10,000 x 3072) score 0.39 at C = 0.001 and 0.31
    at sklearn's default of 1, which is best for 192 random features (40,000 x 192). A fixed
    penalty would favour one of the two.
    """
    is_many = labels.ndim == 2
    labels_array = labels.cpu().numpy()
    if not is_many and len(np.unique(labels_array)) < 2:
        raise ValueError("train_labels hold one class: there is nothing to classify")
    std, mean = torch.std_mean(features.float(), dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a constant feature becomes 0
    scaled = ((features.float() - mean) / std).cpu().numpy()
    parts = _held_parts(labels_array, seed)
    penalty, scale = _FEW_SHOT_INVERSE_PENALTY, 1.0
    if parts:
        score = _log_likelihoods if is_many else _are_right
        penalty, logits, truth = _best_penalty(scaled, labels_array, parts, score)
        if not is_many:
            scale = _best_scale(logits, truth)
    fit = _fit_many if is_many else _fit_one
    weight, bias = fit(penalty, scaled, labels_array, num_classes)
    return LinearProbe(mean, std, scale * torch.from_numpy(weight), scale * torch.from_numpy(bias))


Held = list[npt.NDArray[np.bool_]]  # each True where an image is held out
Score = Callable[
    [Tensor, Tensor], Tensor
]  # of logits and truth, one for each image; more is better


def _held_parts(labels: Labels, seed: int) -> Held:
    """Choose a fifth of each class, rounded down, or all five; none if no class has five images.

    Findings count as classes by combination.
    """
    generator = np.random.default_rng(seed)
    num_parts = _FOLDS if len(labels) <= _FEW_IMAGES else 1
    parts = [np.zeros(len(labels), dtype=bool) for _ in range(num_parts)]
    _, strata = np.unique(labels, axis=0, return_inverse=True)
    strata = strata.reshape(-1)
    for stratum in range(int(strata.max()) + 1):
        members = generator.permutation(np.flatnonzero(strata == stratum))
        fifth = len(members) // _FOLDS
        for number, held in enumerate(parts):
            held[members[number * fifth : (number + 1) * fifth]] = True
    return [held for held in parts if held.any()]


def _best_penalty(
    features: Features, labels: Labels, parts: Held, score: Score
) -> tuple[float, Tensor, Tensor]:
    """Return the penalty with the best mean score of the held images, their logits and labels."""
    is_many = labels.ndim == 2
    fit, num_classes = (_fit_many, labels.shape[1]) if is_many else (_fit_one, labels.max() + 1)
    truth = torch.cat([torch.from_numpy(labels[held]) for held in parts])
    best, best_mean, best_logits = _INVERSE_PENALTIES[0], -math.inf, torch.empty(0)
    for inverse_penalty in _INVERSE_PENALTIES:
        rows = []
        for held in parts:
            weight, bias = fit(inverse_penalty, features[~held], labels[~held], int(num_classes))
            rows.append(torch.from_numpy(features[held] @ weight.T + bias))
        logits = torch.cat(rows)
        found = score(logits, truth).double()
        mean, error = float(found.mean()), float(found.std(correction=0)) / len(found) ** 0.5
        # Weaker penalties take the longest and cannot win any more by then.
        if mean < best_mean - _CLEAR * error:
            break
        if mean > best_mean:
            best, best_mean, best_logits = inverse_penalty, mean, logits
    return best, best_logits, truth


def _best_scale(logits: Tensor, truth: Tensor) -> float:
    """Return the factor on the logits with the smallest log loss."""
    losses = [F.cross_entropy(scale * logits, truth.long()).item() for scale in _SCALES]
    return _SCALES[losses.index(min(losses))]


def _are_right(logits: Tensor, truth: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == truth).float()


def _log_likelihoods(logits: Tensor, truth: Tensor) -> Tensor:
    if truth.ndim == 2:
        losses = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
        return -losses.mean(dim=1)
    return -F.cross_entropy(logits, truth.long(), reduction="none")


def _fit_one(
    inverse_penalty: float, features: Features, labels: Labels, num_classes: int
) -> tuple[Features, Features]:
    """Return weight (K, D) and bias (K,); a class without an image gets a low, constant logit."""
    probe = _fit(LogisticRegression(C=inverse_penalty), features, labels)
    found, offsets = probe.coef_, probe.intercept_
    if len(probe.classes_) == 2:  # sklearn keeps one logit for both
        found, offsets = (
            np.concatenate([-found, found]) / 2,
            np.concatenate([-offsets, offsets]) / 2,
        )
    weight = np.zeros((num_classes, features.shape[1]), np.float32)
    bias = np.full(num_classes, offsets.min() - math.log(len(labels)), np.float32)
    weight[probe.classes_], bias[probe.classes_] = found, offsets
    return weight, bias


def _fit_many(
    inverse_penalty: float, features: Features, labels: Labels, num_classes: int
) -> tuple[Features, Features]:
    """Return weight (K, D) and bias (K,); a finding that all or none have gets a constant logit."""
    weight = np.zeros((num_classes, features.shape[1]), np.float32)
    shares = (labels.sum(axis=0) + 0.5) / (len(labels) + 1)
    bias = np.log(shares / (1 - shares)).astype(np.float32)
    for finding in range(num_classes):
        truth = labels[:, finding]
        if truth.min() != truth.max():
            probe = _fit(LogisticRegression(C=inverse_penalty), features, truth)
            weight[finding], bias[finding] = probe.coef_[0], probe.intercept_[0]
    return weight, bias


def _fit(probe: LogisticRegression, features: Features, labels: Labels) -> LogisticRegression:
    # tol: with 1e-3 a warm start may stop at once, and 40,000 x 192 scored 0.492 or 0.505 depending
    # on the number of threads.
    probe.set_params(solver="lbfgs", tol=1e-4, max_iter=_MAX_ITERATIONS)
    # One thread: the products of a step are small, and threads that wait for each other turn 0.3 s
    # into 13 (3,000 x 192, two busy cores). It also makes the result independent of their number.
    with warnings.catch_warnings(), threadpool_limits(1, user_api="blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # logged below with its consequence
        probe.fit(features, labels)
    if probe.n_iter_.max() >= _MAX_ITERATIONS:
        logger.warning("linear probe stopped early, accuracy may be low: C=%g", probe.C)
    return probe
