"""A config's fields in words: for help, the reference, MLflow's params and messages."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from mae_core.config import StrictConfig
from pipelines.config.fields import (
    annotation_of,
    choices_of,
    describe,
    did_you_mean,
    flatten,
    section,
    type_in_words,
)


class Inner(StrictConfig):
    rate: float = 0.5
    """Share of
    something."""
    kind: Literal["a", "b"] = "a"


class Outer(StrictConfig):
    path: str
    inner: Inner = Inner()
    maybe: Inner | None = None
    named: dict[str, Inner] = Field(default_factory=dict)
    size: tuple[int, int] | None = None


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (str, "text"),
        (int | None, "whole number or null"),
        (Literal["a", "b", "c"], "a, b or c"),
        (Literal["a"] | None, "a or null"),
        (tuple[int, ...], "list of whole numbers"),
        (tuple[int, int], "list of 2 whole numbers"),
        (Annotated[float, Field(gt=0)], "number"),
        (dict[str, float], "section: text to number"),
        (Inner, "section"),
        (Any, "any value"),
        (bool, "true or false"),
    ],
)
def test_a_type_is_said_in_words(annotation: Any, words: str) -> None:
    assert type_in_words(annotation) == words


def test_each_field_has_its_key_type_default_and_meaning() -> None:
    assert list(describe(Outer)) == [
        ("path", "text", "needed", ""),
        ("inner.rate", "number", "0.5", "Share of something."),
        ("inner.kind", "a or b", '"a"', ""),
        ("maybe", "section or null", "null", ""),
        ("named", "section: text to section", "{}", ""),
        ("size", "list of 2 whole numbers or null", "null", ""),
    ]


@pytest.mark.parametrize(
    ("annotation", "choices"),
    [
        (Literal["a", "b"], ["a", "b"]),
        (Literal["a"] | None, ["a", "null"]),
        (bool, ["true", "false"]),
        (Literal["a"] | str, []),
        (int, []),
    ],
)
def test_choices_are_those_of_a_field_that_takes_no_other_word(
    annotation: Any, choices: list[str]
) -> None:
    assert choices_of(annotation) == choices


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (["path"], str),
        (["inner", "rate"], float),
        (["maybe", "rate"], float),
        (["named", "any", "rate"], float),
        (["inner", "rat"], Any),
        (["path", "below"], Any),
    ],
)
def test_a_key_leads_to_the_type_of_its_field(keys: list[str], found: Any) -> None:
    assert annotation_of(Outer, keys) == found


@pytest.mark.parametrize("keys", [["inner"], ["maybe"], ["named", "any"]])
def test_a_section_is_found_wherever_a_field_holds_one(keys: list[str]) -> None:
    assert section(Outer, keys) is Inner


def test_values_become_text_under_dotted_keys() -> None:
    assert flatten(Outer(path="a b", size=(2, 3), named={"x": Inner(rate=1)})) == {
        "path": "a b",
        "inner.rate": "0.5",
        "inner.kind": "a",
        "maybe": "null",
        "named.x.rate": "1.0",
        "named.x.kind": "a",
        "size": "[2, 3]",
    }


def test_only_a_similar_name_is_proposed() -> None:
    names = ["epochs", "max_steps", "warmup_epochs"]
    assert did_you_mean("epoch", names) == "; did you mean epochs?"
    assert did_you_mean("colour", names) == ""
    assert did_you_mean("epoch", []) == ""
