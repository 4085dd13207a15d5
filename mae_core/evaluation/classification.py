"""Measure how well frozen features separate classes, with a weighted kNN classifier.

Accuracies are top-1, in 0..1. Features are (N, D), one row per image; labels are (N,) class
indices from 0.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

_SIMILARITIES_PER_CHUNK = 2**24  # 64 MiB of fp32


def encode_features(
    encoder: nn.Module, images: Float[Tensor, "B C H W"], *, pool: Literal["mean", "cls"] = "mean"
) -> Float[Tensor, "B D"]:
    """Encode whole images without masking, without gradients and in eval mode.

    Args:
        encoder: Returns tokens after its last norm, (B, T, D). The first `num_prefix_tokens`, by
            default one class token, are of no patch. Its mode is restored afterwards.
        images: Normalised as in pretraining.
        pool: "mean" averages the patch tokens. "cls" takes the class token, or the mean of several.
            MAE's loss reaches it only through attention; in He et al. 2021, section A.1, either
            works.
    """
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            tokens = encoder(images)  # (B, T, D)
    finally:
        encoder.train(was_training)
    num_prefix: int = getattr(encoder, "num_prefix_tokens", 1)
    if pool == "cls" and not num_prefix:
        raise ValueError("pool=cls needs a class token, this encoder has none: set pool=mean")
    pooled = tokens[:, num_prefix:] if pool == "mean" else tokens[:, :num_prefix]
    return pooled.mean(dim=1).float()


def knn_accuracy(
    train_features: Float[Tensor, "N D"],
    train_labels: Int[Tensor, " N"],
    test_features: Float[Tensor, "M D"],
    test_labels: Int[Tensor, " M"],
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Classify by the k most similar training images, with weights exp(cosine / temperature).

    Source: Wu et al. 2018 (InstDisc), https://arxiv.org/abs/1805.01978, section 3.4; k = 20 and
    0.07 as in DINO, Caron et al. 2021, https://arxiv.org/abs/2104.14294. If classes have equal
    votes, the lowest index wins.
    """
    check_features(train_features, train_labels, test_features, test_labels)
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
        # Subtracting the largest gives the same vote without overflow at a small temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(chunk), num_classes)
        votes.scatter_add_(1, labels[neighbours], weights)
        num_right += int((votes.argmax(dim=1) == wanted).sum())
    return num_right / len(queries)


def check_features(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> None:
    """Raise a ValueError if the features and labels can't be scored; it names what is wrong."""
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
