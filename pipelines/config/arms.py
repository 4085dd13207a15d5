"""Define the kinds of arm that a downstream run compares: what is trained, and from where."""

from enum import Enum, StrEnum
from typing import Self


class Trains(Enum):
    NOTHING = "nothing"  # only frozen features are measured
    HEAD = "the head"
    ENCODER = "the encoder and the head"


class ArmKind(StrEnum):
    """A way to use the encoder; the value is what the user writes and what labels begin with."""

    trains: Trains
    is_pretrained: bool  # if False, the arm starts from random weights

    def __new__(cls, word: str, trains: Trains, is_pretrained: bool = True) -> Self:
        kind = str.__new__(cls, word)
        kind._value_ = word
        kind.trains = trains
        kind.is_pretrained = is_pretrained
        return kind

    KNN = "knn", Trains.NOTHING  # nearest neighbours of frozen features
    LOGISTIC = "logistic", Trains.NOTHING  # logistic regression on frozen features
    LINEAR = "linear", Trains.HEAD  # the paper's linear probe, on augmented images
    ATTENTIVE = "attentive", Trains.HEAD  # a learned query over the patches of a frozen encoder
    FROZEN = "frozen", Trains.HEAD  # the head of a detector or segmenter
    FINETUNE = "finetune", Trains.ENCODER
    SCRATCH = "scratch", Trains.ENCODER, False  # as finetune, from random weights
    # A head on a frozen encoder with random weights; in classify, logistic regression on it.
    UNTRAINED = "untrained", Trains.HEAD, False

    @property
    def trains_encoder(self) -> bool:
        return self.trains is Trains.ENCODER


# The output of a run is the model of the first of these kinds that the run has.
PREFERRED_OUTPUT = (
    ArmKind.FINETUNE,
    ArmKind.FROZEN,
    ArmKind.ATTENTIVE,
    ArmKind.LINEAR,
    ArmKind.SCRATCH,
    ArmKind.UNTRAINED,
)
