"""How well frozen features tell classes apart: weighted kNN and a linear probe.

Accuracies are top-1, in 0..1. Features are (N, D), one row an image; labels are (N,) class
indices from 0. Both protocols are deterministic.
"""

import logging
import warnings
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.integer[Any]]

logger = logging.getLogger(__name__)

_INVERSE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # sklearn's C, strong penalty first
_MAX_ITERATIONS = 1000
_SIMILARITIES_PER_CHUNK = 2**24  # 64 MiB of fp32


def encode_features(
    encoder: nn.Module, images: Float[Tensor, "B C H W"], *, pool: Literal["mean", "cls"] = "mean"
) -> Float[Tensor, "B D"]:
    """Encode whole images, nothing masked, without gradients and in eval mode.

    Args:
        encoder: Gives (B, 1 + L, D) tokens after its last norm, the class token first. Its mode
            is put back afterwards.
        images: Normalised as in pretraining.
        pool: "mean" averages the patch tokens. "cls" takes the class token, which MAE's loss
            reaches only through attention; He et al. 2021, section A.1, find either works.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            tokens = encoder(images)  # (B, 1 + L, D)
    finally:
        encoder.train(was_training)
    features = tokens[:, 1:].mean(dim=1) if pool == "mean" else tokens[:, 0]
    return features.float()


def knn_accuracy(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    test_features: Float[Tensor, "M D"],
    test_labels: Int[Tensor, " M"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Let the k most similar training images vote, each with weight exp(cosine / temperature).

    Source: Wu et al. 2018 (InstDisc), https://arxiv.org/abs/1805.01978, section 3.4; k = 20 and
    0.07 as in DINO, Caron et al. 2021, https://arxiv.org/abs/2104.14294. Of classes with equal
    votes, the lowest index wins.
    """
    _check_features(train_features, train_labels, test_features, test_labels)
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k={k} is not in 1..{len(train_features)}, the training images")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not above 0")
    bank = F.normalize(train_features.float(), dim=1)
    queries = F.normalize(test_features.float(), dim=1)
    labels = train_labels.long()
    num_classes = int(labels.max()) + 1
    num_right = 0
    rows = max(1, _SIMILARITIES_PER_CHUNK // len(bank))
    for start in range(0, len(queries), rows):
        chunk, wanted = queries[start : start + rows], test_labels[start : start + rows]
        similarity, neighbours = (chunk @ bank.T).topk(k, dim=1)  # (rows, k)
        # Less the largest: the same vote, and no overflow at a small temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, labels[neighbours], weights)
        num_right += int((votes.argmax(dim=1) == wanted).sum())
    return num_right / len(queries)


def linear_probe_accuracy(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    test_features: Float[Tensor, "M D"],
    test_labels: Int[Tensor, " M"],
    *,
    seed: int,
) -> float:
    """Fit multinomial logistic regression to standardised training features.

    The strength of the L2 penalty is chosen on a fifth of the training images, drawn with `seed`
    from each class, and the fit repeated on all of them; the test images choose nothing. As in
    Radford et al. 2021, https://arxiv.org/abs/2103.00020, section A.3. Differs: a coarse grid,
    left when accuracy falls by more than chance explains.

    Why chosen: on CIFAR-10, raw pixels (10,000 x 3072) score 0.39 at C = 0.001 and 0.31 at
    sklearn's default of 1, which is the best for 192 random features (40,000 x 192): a fixed
    penalty would flatter one of the two. Either takes about 35 s of one core.
    """
    _check_features(train_features, train_labels, test_features, test_labels)
    labels, test_labels_array = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    if len(np.unique(labels)) < 2:
        raise ValueError("train_labels hold one class: there is nothing to tell apart")
    std, mean = torch.std_mean(train_features.float(), dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)  # a constant feature stays 0
    features = ((train_features.float() - mean) / std).cpu().numpy()
    test_features_array = ((test_features.float() - mean) / std).cpu().numpy()
    inverse_penalty = _best_inverse_penalty(features, labels, seed)
    probe = _fit(LogisticRegression(C=inverse_penalty), features, labels)
    return float(probe.score(test_features_array, test_labels_array))


def _best_inverse_penalty(features: Features, labels: Labels, seed: int) -> float:
    generator = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held[members[: len(members) // 5]] = True
    if not held.any():
        raise ValueError("no class has the 5 training images that choosing the penalty needs")
    best, best_accuracy = _INVERSE_PENALTIES[0], -1.0
    probe = LogisticRegression(warm_start=True)
    for inverse_penalty in _INVERSE_PENALTIES:
        probe = _fit(probe.set_params(C=inverse_penalty), features[~held], labels[~held])
        accuracy = float(probe.score(features[held], labels[held]))
        # Weaker penalties take the longest and are known to lose by then; less than a standard
        # error may be chance.
        if accuracy < best_accuracy - (accuracy * (1 - accuracy) / held.sum()) ** 0.5:
            break
        if accuracy > best_accuracy:
            best, best_accuracy = inverse_penalty, accuracy
    return best


def _fit(probe: LogisticRegression, features: Features, labels: Labels) -> LogisticRegression:
    # tol: at 1e-3 a warm start may stop at once, and 40,000 x 192 scored 0.492 or 0.505 by the
    # number of threads.
    probe.set_params(solver="lbfgs", tol=1e-4, max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told below, with what it means
        probe.fit(features, labels)
    if probe.n_iter_.max() >= _MAX_ITERATIONS:
        logger.warning("linear probe stopped early, accuracy may be low: C=%g", probe.C)
    return probe


def _check_features(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> None:
    for name, features, labels in (
        ("train", train_features, train_labels),
        ("test", test_features, test_labels),
    ):
        if features.ndim != 2 or not len(features):
            raise ValueError(f"{name}_features is {tuple(features.shape)}, not (N, D) with N > 0")
        if labels.shape != features.shape[:1]:
            raise ValueError(
                f"{name}_labels is {tuple(labels.shape)} for {len(features)} {name}_features: "
                "each needs one label"
            )
        if labels.is_floating_point() or labels.min() < 0:
            raise ValueError(f"{name}_labels must be class indices from 0")
        if not features.isfinite().all():
            raise ValueError(f"{name}_features hold NaN or infinity")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"train_features are {train_features.shape[1]} wide, "
            f"test_features {test_features.shape[1]}"
        )
