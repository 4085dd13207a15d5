"""What each kind of arm trains, and from where."""

import pytest

from pipelines.config.arms import PREFERRED_OUTPUT, ArmKind, Trains


@pytest.mark.parametrize(
    ("word", "trains", "is_pretrained"),
    [
        ("knn", Trains.NOTHING, True),
        ("logistic", Trains.NOTHING, True),
        ("linear", Trains.HEAD, True),
        ("frozen", Trains.HEAD, True),
        ("finetune", Trains.ENCODER, True),
        ("scratch", Trains.ENCODER, False),
        ("untrained", Trains.HEAD, False),
    ],
)
def test_a_kind_is_what_the_user_writes(word: str, trains: Trains, is_pretrained: bool) -> None:
    kind = ArmKind(word)
    assert (str(kind), kind.trains, kind.is_pretrained) == (word, trains, is_pretrained)


def test_two_kinds_change_the_encoder() -> None:
    assert {kind.value for kind in ArmKind if kind.trains_encoder} == {"finetune", "scratch"}


def test_the_output_of_a_run_is_a_pretrained_model_if_it_has_one() -> None:
    assert [kind.value for kind in PREFERRED_OUTPUT] == [
        "finetune",
        "frozen",
        "attentive",
        "linear",
        "scratch",
        "untrained",
    ]
