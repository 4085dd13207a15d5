"""State what pretraining gives, by differences between paired arms.

Arms are paired by share of the labels and seed: they train on the same labelled images, in the same
order and with the same augmentation. So their difference is less noisy than either result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mae_core.data.label_budget import LabelBudget
from mae_core.evaluation.arms_picture import ArmBar, PairedBar, arms_picture
from pipelines.config.arms import ArmKind, Trains
from pipelines.downstream.arms import Arm

Found = Mapping[Arm, Mapping[str, float]]

CLEAR = 2.0  # number of standard errors; a smaller difference may be chance
NEAR_CHANCE = 0.005  # a result this close to guessing has learned nothing
UNMOVED = 0.001  # a smaller difference from the start counts as none

# How pretraining is measured: each kind of arm against the same treatment of an encoder without
# pretraining. Of each tuple, the first pair that the run has is used.
_PAIRS = (
    ((ArmKind.FINETUNE, ArmKind.SCRATCH),),
    (
        (ArmKind.LOGISTIC, ArmKind.UNTRAINED),
        (ArmKind.FROZEN, ArmKind.UNTRAINED),
        (ArmKind.FINETUNE, ArmKind.UNTRAINED),
    ),
)
_ADVICE = (
    "what to try: pretrain longer or on more images like these, use fewer labels "
    "(label_fraction), give optim.base_lr several rates to choose from"
)
# Kinds that an optimizer trains, except the one that is not expected to learn much.
_LEARNS = [
    kind for kind in ArmKind if kind.trains is not Trains.NOTHING and kind is not ArmKind.UNTRAINED
]
_BEGINS_AS = {ArmKind.FINETUNE: ArmKind.LOGISTIC, ArmKind.SCRATCH: ArmKind.UNTRAINED}  # classify
# Arms that should not end below another arm, and what it means if they do.
_SUSPECT = (
    (
        ArmKind.FINETUNE,
        ArmKind.LOGISTIC,
        "fine-tuning loses what the encoder knows: try a smaller optim.base_lr, more steps, and "
        "classify.head_start=logistic",
    ),
    (
        ArmKind.FINETUNE,
        ArmKind.FROZEN,
        "training the encoder makes it worse: try a smaller optim.base_lr",
    ),
    (
        ArmKind.FINETUNE,
        ArmKind.UNTRAINED,
        "a head on random features does better: the steps or the rates do not suit the encoder",
    ),
    (
        ArmKind.SCRATCH,
        ArmKind.UNTRAINED,
        "training the encoder makes random features worse: its rate or number of steps does not "
        "suit it, so a gain over scratch says little",
    ),
    (
        ArmKind.LOGISTIC,
        ArmKind.UNTRAINED,
        "pretraining made the features worse than random ones: look at its reconstructions, and "
        "pretrain longer",
    ),
    (
        ArmKind.FROZEN,
        ArmKind.UNTRAINED,
        "pretraining made the features worse than random ones: look at its reconstructions, and "
        "pretrain longer",
    ),
)


@dataclass(frozen=True)
class Comparison:
    """One kind of arm against another, with one label budget."""

    kind: ArmKind
    other: ArmKind
    budget: LabelBudget
    differences: tuple[float, ...]  # one for each seed

    @property
    def mean(self) -> float:
        return float(np.mean(self.differences))

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean of the paired differences; None for one seed."""
        count = len(self.differences)
        if count < 2:
            return None
        return float(np.std(self.differences, ddof=1) / count**0.5)

    @property
    def is_gain(self) -> bool:
        """Whether the mean is above 0 by `CLEAR` standard errors."""
        error = self.standard_error
        return error is not None and self.mean > CLEAR * error

    @property
    def is_loss(self) -> bool:
        error = self.standard_error
        return error is not None and self.mean < -CLEAR * error

    @property
    def text(self) -> str:
        """The verdict, such as `pretraining +0.081 ± 0.022 over scratch (3 seeds, ...)`."""
        count, error = len(self.differences), self.standard_error
        spread = "" if error is None else f" ± {error:.3f}"
        seeds = "1 seed" if count == 1 else f"{count} seeds"
        place = f"({seeds}, {self.budget.phrase})"
        found = f"pretraining {self.mean:+.3f}{spread} over {self.other} {place}"
        if self.other is ArmKind.UNTRAINED:
            found += f", compared by {self.kind}"
        if error is None:
            return f"{found}; one seed shows nothing about the spread: give several seeds"
        if self.is_gain:
            return found
        if self.is_loss:
            return f"{found}: it does not help; {_ADVICE}"
        return f"{found}: no gain that these seeds can tell from chance; {_ADVICE}"


class Verdict(NamedTuple):
    """What all arms of a run show together."""

    metric: str  # by which the arms are compared
    compared: tuple[Comparison, ...]
    warnings: tuple[str, ...]  # which arms end below one that they should beat

    @property
    def texts(self) -> list[str]:
        return [f"{self.metric}: {x.text}" for x in self.compared]

    @property
    def page(self) -> str:
        """The verdict as Markdown; empty if nothing was compared."""
        lines = [f"- {text}" for text in self.texts]
        lines += [f"- **Warning**: {text}" for text in self.warnings]
        if not lines:
            return ""
        head = "What pretraining gives, paired by seed; after ± stands the standard error:"
        return "\n".join(["", head, "", *lines, ""])

    @property
    def metrics(self) -> dict[str, float]:
        """Each paired difference and its standard error, by the name of a metric."""
        several = len({x.budget for x in self.compared}) > 1
        metrics = {}
        for x in self.compared:
            share = f"-{x.budget}" if several else ""
            metrics[f"over_{x.other}{share}/{self.metric}"] = x.mean
            if x.standard_error is not None:
                metrics[f"over_{x.other}{share}/{self.metric}_se"] = x.standard_error
        return metrics


def judge(found: Found, metric: str, num_classes: int) -> Verdict:
    """Compare the pretrained arms with those from random weights, for each label budget."""
    compared: list[Comparison] = []
    warned: list[str] = []
    for budget in sorted({arm.budget for arm in found}):
        for pairs in _PAIRS:
            candidates = (_paired(found, metric, budget, *pair) for pair in pairs)
            compared += [x for x in candidates if x is not None][:1]
        warned += _warnings(found, metric, budget)
        warned += _unmoved(found, metric, budget, num_classes)
    return Verdict(metric, tuple(compared), tuple(warned))


def _paired(
    found: Found, metric: str, budget: LabelBudget, kind: ArmKind, other: ArmKind
) -> Comparison | None:
    ours, theirs = _by_seed(found, metric, budget, kind), _by_seed(found, metric, budget, other)
    if not ours or not theirs:
        return None
    # With all of the labels, frozen features that are read without steps are the same for every
    # seed, and are measured once.
    if len(ours) == 1 and kind is ArmKind.LOGISTIC:
        ours = dict.fromkeys(theirs, *ours.values())
    differences = tuple(ours[seed] - theirs[seed] for seed in ours if seed in theirs)
    return Comparison(kind, other, budget, differences) if differences else None


def _by_seed(found: Found, metric: str, budget: LabelBudget, kind: ArmKind) -> dict[int, float]:
    return {
        arm.seed: values[metric]
        for arm, values in found.items()
        if arm.kind is kind and arm.budget == budget and metric in values
    }


def _warnings(found: Found, metric: str, budget: LabelBudget) -> list[str]:
    """Describe which arms end below another one that they should beat."""
    texts = []
    for kind, other, meaning in _SUSPECT:
        ours = list(_by_seed(found, metric, budget, kind).values())
        theirs = list(_by_seed(found, metric, budget, other).values())
        if ours and theirs and np.mean(ours) < np.mean(theirs):
            texts.append(
                f"{kind} ends at {metric} {np.mean(ours):.3f}, below {other} at "
                f"{np.mean(theirs):.3f} ({budget.phrase}): {meaning}"
            )
    return texts


def _unmoved(found: Found, metric: str, budget: LabelBudget, num_classes: int) -> list[str]:
    """Describe which trained arms end where they began.

    A classifier begins as the logistic regression on its frozen features, and the head of a
    detector or segmenter begins at chance.
    """
    place = f"({budget.phrase})"
    chance = {"ap": 0.0, "auroc": 0.5}.get(metric, 1 / num_classes)
    texts = []
    for kind in _LEARNS:
        values = list(_by_seed(found, metric, budget, kind).values())
        if values and np.mean(values) < chance + NEAR_CHANCE:
            texts.append(
                f"{kind} ends at {metric} {np.mean(values):.3f}, where a guess is {chance:.3f} "
                f"{place}: it learned nothing; try more steps and other optim.base_lr"
            )
    for tuned, start in _BEGINS_AS.items():
        pair = _paired(found, metric, budget, tuned, start)
        if pair is not None and abs(pair.mean) < UNMOVED:
            texts.append(
                f"{tuned} ends where it began, at the {metric} of {start} {place}: fine-tuning "
                "adds nothing; try more steps or a larger optim.base_lr"
            )
    return texts


def verdict_picture(found: Found, verdict: Verdict, title: str) -> npt.NDArray[np.uint8]:
    """Draw the arms with their seeds, and the paired differences."""
    grouped: dict[str, list[float]] = {}
    for arm, values in found.items():
        if verdict.metric in values:
            label = f"{arm.kind}, {arm.budget.text}"
            grouped.setdefault(label, []).append(values[verdict.metric])
    pairs = [
        PairedBar(f"over {x.other}, {x.budget.text}", x.mean, x.standard_error)
        for x in verdict.compared
    ]
    arms = [ArmBar(label, values) for label, values in grouped.items()]
    return arms_picture(arms, pairs, title, metric=verdict.metric)
