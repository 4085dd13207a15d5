import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
    top_k_accuracy_score,
)
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from mae_core.data.label_budget import LabelBudget
from mae_core.evaluation import classifier_report
from mae_core.evaluation.classifier_report import (
    ClassificationScores,
    confusion_picture,
    label_fraction_picture,
    markdown_table,
    most_wrong_picture,
    reliability_picture,
    roc_picture,
    score_classification,
    score_multilabel,
)

NAMES = ["airplane", "bird", "cat", "deer", "dog", "frog", "horse"]


def make_logits(number: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, len(NAMES), (number,), generator=generator)
    logits = torch.randn(number, len(NAMES), generator=generator)
    logits[torch.arange(number), labels] += 1.5
    return logits, labels


def make_scores() -> ClassificationScores:
    return score_classification(*make_logits(), NAMES)


def make_findings() -> tuple[Tensor, Tensor, list[str]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200, 4), generator=generator)
    labels[:, 1], labels[:, 3] = 0, 1
    logits = labels * 1.5 + torch.randn(200, 4, generator=generator)
    return logits, labels, ["mass", "hernia", "edema", "film"]


def logits_of(probabilities: list[list[float]]) -> Tensor:
    return torch.tensor(probabilities).log()


def check_picture(picture: np.ndarray) -> None:
    assert picture.dtype == np.uint8
    assert picture.ndim == 3
    assert picture.shape[2] == 3
    assert min(picture.shape[:2]) > 150
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    # Nothing is cut off: the edges are white.
    edges = [picture[0], picture[-1], picture[:, 0], picture[:, -1]]
    assert all((edge == 255).all() for edge in edges)


def test_scores_are_scikit_learns() -> None:
    logits, labels = make_logits()
    scores = score_classification(logits, labels, NAMES)
    predicted, expected = logits.argmax(dim=1).numpy(), labels.numpy()
    assert scores.top1 == pytest.approx((predicted == expected).mean())
    assert scores.top5 == pytest.approx(top_k_accuracy_score(expected, logits.numpy(), k=5))
    assert scores.confusion.dtype == np.int64
    assert np.array_equal(scores.confusion, confusion_matrix(expected, predicted))
    table = np.array(list(scores.per_class.values())).T
    assert np.allclose(table, precision_recall_fscore_support(expected, predicted))
    assert list(scores.per_class) == NAMES


def test_calibration_error_is_torchmetrics_and_that_of_the_bins() -> None:
    logits, labels = make_logits()
    scores = score_classification(logits, labels, NAMES)
    theirs = multiclass_calibration_error(logits.softmax(dim=1), labels, len(NAMES), n_bins=15)
    assert scores.ece == pytest.approx(float(theirs), abs=1e-6)
    assert len(scores.bins) == 15
    assert sum(b.num_images for b in scores.bins) == len(labels)
    for b in scores.bins:
        assert b.num_images == 0 or b.lower <= b.confidence <= b.upper


def test_calibration_error_worked_out_by_hand() -> None:
    # Two images at 0.8, one of them right; two at 0.5 + 0.1, both right: (0.3 + 0.4) / 2.
    logits = logits_of([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]])
    scores = score_classification(logits, torch.tensor([0, 1, 1, 1]), ["a", "b"])
    assert scores.ece == pytest.approx(0.35, abs=1e-6)
    filled = [(b.num_images, b.accuracy) for b in scores.bins if b.num_images]
    assert filled == [(2, 1.0), (2, 0.5)]
    assert math.isnan(scores.bins[0].accuracy)


def test_logits_between_0_and_1_are_not_taken_for_probabilities() -> None:
    scores = score_classification(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), ["a", "b"])
    assert scores.ece == pytest.approx(1 - 1 / (1 + math.exp(-1)), abs=1e-6)


def test_a_sure_prediction_is_in_the_last_bin() -> None:
    scores = score_classification(torch.tensor([[0.0, 200.0]]), torch.tensor([1]), ["a", "b"])
    assert scores.bins[-1].num_images == 1
    assert scores.ece == 0


def test_top_5_needs_more_than_5_classes() -> None:
    logits, labels = make_logits()
    five = score_classification(logits[:, :5], labels.clamp(max=4), NAMES[:5])
    assert five.top5 is None
    six = score_classification(logits[:, :6], labels.clamp(max=5), NAMES[:6])
    assert six.top5 is not None
    assert six.top5 > six.top1


def test_what_a_missing_class_scores_is_undefined() -> None:
    # Class b is in no image and said of none; c is said once, and wrongly.
    logits = logits_of([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    scores = score_classification(logits, torch.tensor([0, 0]), ["a", "b", "c"])
    assert scores.per_class["a"] == pytest.approx((1.0, 0.5, 2 / 3, 2))
    assert all(math.isnan(value) for value in scores.per_class["b"][:3])
    precision, recall, f1, support = scores.per_class["c"]
    assert (precision, f1, support) == (0, 0, 0)
    assert math.isnan(recall)


@pytest.mark.parametrize(
    ("logits", "labels", "names", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), ["a", "b"], "not \\(N, K\\)"),
        (torch.full((1, 2), math.nan), torch.tensor([0]), ["a", "b"], "NaN or infinity"),
        (torch.zeros(1, 2), torch.tensor([0]), ["a"], "1 names for 2 columns"),
        (torch.zeros(1, 2), torch.tensor([0]), ["a", "a"], "two classes are named 'a'"),
        (torch.zeros(1, 2), torch.tensor([2]), ["a", "b"], r"label 2 is not in 0\.\.1"),
        (torch.zeros(1, 2), torch.tensor([-1]), ["a", "b"], r"label -1 is not in 0\.\.1"),
        (torch.zeros(2, 2), torch.tensor([0]), ["a", "b"], r"labels are \(1,\), not \(2,\)"),
    ],
)
def test_what_can_not_be_scored_is_an_error(
    logits: Tensor, labels: Tensor, names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_classification(logits, labels, names)


def test_findings_are_scored_as_scikit_learn_scores_them() -> None:
    logits, labels, names = make_findings()
    scores = score_multilabel(logits, labels, names)
    for place in (0, 2):
        truth, column = labels[:, place].numpy(), logits[:, place].numpy()
        name = names[place]
        assert scores.auroc[name] == pytest.approx(roc_auc_score(truth, column))
        expected = average_precision_score(truth, column)
        assert scores.average_precision[name] == pytest.approx(expected)
    assert scores.macro_auroc == pytest.approx((scores.auroc["mass"] + scores.auroc["edema"]) / 2)


def test_a_finding_of_one_class_is_left_out_and_said() -> None:
    logits, labels, names = make_findings()
    scores = score_multilabel(logits, labels, names)
    assert scores.left_out == ("hernia", "film")
    assert set(scores.auroc) == set(scores.average_precision) == {"mass", "edema"}
    assert scores.support["hernia"] == 0
    assert scores.support["film"] == 200
    nothing = score_multilabel(logits[:, 1:2], labels[:, 1:2], ["hernia"])
    assert math.isnan(nothing.macro_auroc)
    assert math.isnan(nothing.macro_average_precision)


def test_large_logits_are_still_told_apart() -> None:
    logits = torch.tensor([[50.0], [60.0], [70.0], [80.0]])
    labels = torch.tensor([[0], [0], [1], [1]])
    assert score_multilabel(logits, labels, ["mass"]).auroc["mass"] == 1.0


def test_findings_are_0_or_1() -> None:
    with pytest.raises(ValueError, match="other values than 0 and 1"):
        score_multilabel(torch.zeros(2, 1), torch.tensor([[0], [-1]]), ["mass"])
    with pytest.raises(ValueError, match="labels are"):
        score_multilabel(torch.zeros(2, 1), torch.tensor([0, 1]), ["mass"])


def test_pictures_of_scores_are_whole() -> None:
    scores = make_scores()
    check_picture(confusion_picture(scores, "Confusion"))
    check_picture(reliability_picture(scores, "Reliability"))


@pytest.mark.parametrize("num_classes", [2, 30, 60])
def test_confusion_of_few_and_of_many_classes_is_drawn(num_classes: int) -> None:
    labels = torch.arange(num_classes)
    names = [f"a class with a long name, number {n}" for n in range(num_classes)]
    scores = score_classification(torch.eye(num_classes), labels, names)
    check_picture(confusion_picture(scores, "Confusion"))


def test_roc_curves_are_drawn_also_if_there_are_none() -> None:
    logits, labels, names = make_findings()
    check_picture(roc_picture(logits, labels, names, "Findings"))
    check_picture(roc_picture(logits[:, :1], torch.zeros(200, 1), ["mass"], "Findings"))


def test_the_most_wrong_images_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    draw = classifier_report._shown

    def recorded(pixels: np.ndarray) -> np.ndarray:
        shown.append(int(pixels[0, 0, 0]))
        return draw(pixels)

    monkeypatch.setattr(classifier_report, "_shown", recorded)
    pixels = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    logits = logits_of([[0.9, 0.1], [0.3, 0.7], [0.01, 0.99], [0.6, 0.4]])
    labels = torch.tensor([0, 0, 0, 1])
    picture = most_wrong_picture(pixels, logits, labels, ["a", "b"], "Wrong", max_images=3)
    assert shown == [30, 20, 40]
    check_picture(picture)


def test_images_of_any_kind_are_shown() -> None:
    rng = np.random.default_rng(0)
    pixels = [
        rng.integers(0, 200, (8, 12, 1), dtype=np.uint8),
        rng.integers(0, 4000, (16, 8, 1), dtype=np.uint16),
        rng.integers(0, 200, (8, 8, 2), dtype=np.uint8),
        rng.integers(0, 200, (8, 8, 5), dtype=np.uint8),
        np.zeros((8, 8, 1), np.uint16),
    ]
    logits = torch.zeros(5, 2)
    labels = torch.zeros(5, dtype=torch.long)
    check_picture(most_wrong_picture(pixels, logits, labels, ["a", "b"], "Wrong"))
    assert classifier_report._shown(pixels[1]).max() == 255
    with pytest.raises(ValueError, match="4 pixels, 5 logits"):
        most_wrong_picture(pixels[:4], logits, labels, ["a", "b"], "Wrong")


ROWS = [
    ("finetune", LabelBudget(1.0), [0.9, 0.92, 0.91]),
    ("finetune", LabelBudget(0.01), [0.5, 0.6]),
    ("linear", LabelBudget(0.01), [0.55]),
]


def test_label_fractions_are_drawn() -> None:
    check_picture(label_fraction_picture(ROWS, "Labels", metric="top-1 accuracy"))
    check_picture(label_fraction_picture(ROWS[:1], "Labels", metric="top-1 accuracy"))
    with pytest.raises(ValueError, match="no rows"):
        label_fraction_picture([], "Labels", metric="top-1 accuracy")


def test_label_fractions_make_a_table() -> None:
    pm = "\N{PLUS-MINUS SIGN}"
    assert markdown_table(ROWS).splitlines() == [
        "| labels | finetune | linear |",
        "|---:|---|---|",
        f"| 1 % | 0.550 {pm} 0.071 (2 seeds) | 0.550 (1 seed) |",
        f"| 100 % | 0.910 {pm} 0.010 (3 seeds) |  |",
    ]
