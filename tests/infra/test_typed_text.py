"""The field decides what text means: a number in one field is a name in another."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from infra.typed_text import Word, Written, read_word, typed
from infra.yaml_files import Plain, YamlFileError, read_yaml_text

Name = Annotated[str, Field(pattern="^[a-z]*$")]

ODD_WORDS = [
    "2024",
    "on",
    "no",
    "010",
    "1_000",
    "0x10",
    "1e3",
    "2024-01-01",
    "2024-13-45",
    "12:30:45",
    "set #2",
    "a: b",
    "Camera #2",
    "- x",
    "* x",
    "&a",
    "!x",
    "%d",
    "@x",
    "`x`",
    "it's",
    "{000000..000003}.tar",
    "{pretrain}",
    "[0-9].tar",
    " padded ",
    "#1",
    "?",
    "|",
    ".nan",
    "\U0001f600",
]


@pytest.mark.parametrize("annotation", [str, str | None, Name, Name | None, str | tuple[str, ...]])
@pytest.mark.parametrize("word", ODD_WORDS)
def test_a_word_for_a_text_is_taken_as_it_was_typed(annotation: Any, word: str) -> None:
    found = typed(annotation, read_word(annotation, word))
    assert (found, type(found)) == (word, str)


@pytest.mark.parametrize("word", [word for word in ODD_WORDS if word.strip() == word])
def test_items_of_a_list_of_texts_are_taken_as_they_were_typed(word: str) -> None:
    annotation = str | tuple[str, ...]
    assert typed(annotation, read_word(annotation, f"[/a, {word}]")) == ["/a", word]


@pytest.mark.parametrize(
    ("word", "items"),
    [
        ("[]", []),
        ("[a]", ["a"]),
        ("[a, ]", ["a"]),
        ("['a, b', \"c #d\"]", ["a, b", "c #d"]),
        ("[s3://b/{0..3}.tar,{a,b}.tar]", ["s3://b/{0..3}.tar", "{a,b}.tar"]),
    ],
)
def test_a_list_is_parted_at_its_own_commas(word: str, items: list[str]) -> None:
    assert typed(tuple[str, ...], read_word(tuple[str, ...], word)) == items


@pytest.mark.parametrize(
    ("word", "text"), [('"null"', "null"), ("'2024'", "2024"), ("'a' and 'b'", "'a' and 'b'")]
)
def test_what_is_wholly_in_quotes_is_the_text_within(word: str, text: str) -> None:
    assert typed(str | None, read_word(str | None, word)) == text


@pytest.mark.parametrize("word", ["null", "~", ""])
def test_a_text_that_may_be_left_out_is_left_out(word: str) -> None:
    assert typed(str | None, read_word(str | None, word)) is None


def test_a_text_that_is_needed_can_be_called_null_and_can_not_be_empty() -> None:
    assert typed(str, read_word(str, "null")) == "null"
    assert typed(str, read_word(str, "")) is None


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "010", 10),
        (int, "1_000", 1000),
        (int, "0x10", 16),
        (int, "0o17", 15),
        (int, "-3", -3),
        (int, "1:30", "1:30"),
        (int, "on", "on"),
        (int, "2024-13-45", "2024-13-45"),
        (int, "9" * 5000, "9" * 5000),
        (float, "1e-3", 0.001),
        (float, "1.5e4", 15000.0),
        (float, ".5", 0.5),
        (float, "yes", "yes"),
        (int | None, "null", None),
        (bool, "on", True),
        (bool, "No", False),
        (bool, "1", 1),
        (Literal["none", "on"], "on", "on"),
        (Literal["shapes"] | None, "shapes", "shapes"),
        (Literal[1, 2], "2", 2),
        (tuple[int, int], "224", 224),
        (int | str, "7", 7),
        (int | str, "a", "a"),
        (Path, "2024", "2024"),
        (Any, "7", 7),
        (Any, "no", False),
        (Any, "2024-13-45", "2024-13-45"),
    ],
)
def test_the_field_decides(annotation: Any, text: str, value: Any) -> None:
    found = typed(annotation, Plain(text))
    assert (found, type(found)) == (value, type(value))


class Size(Enum):
    BIG = 2


class Inner(BaseModel):
    name: str = ""
    size: Size = Size.BIG


class Outer(BaseModel):
    inner: Inner | None = None
    names: dict[int, str] | None = None
    pairs: tuple[tuple[int, str], ...] = ()
    rest: dict[str, Annotated[Any, Written]] = {}


def test_types_are_found_below_sections_lists_and_keys() -> None:
    tree = read_yaml_text(
        "{inner: {name: 1, size: 2}, names: {1: no, 02: 3}, pairs: [[1, 2]], rest: {a: 1}}"
    )
    outer = Outer.model_validate(typed(Outer, tree))
    assert outer.inner == Inner(name="1", size=Size.BIG)
    assert outer.names == {1: "no", 2: "3"}
    assert outer.pairs == ((1, "2"),)
    assert type(outer.rest["a"]) is Plain


def test_what_is_for_another_reader_stays_as_it_was_written() -> None:
    assert type(read_word(Annotated[Any, Written], "[a]")) is Word


def test_keys_that_are_the_same_number_are_refused() -> None:
    with pytest.raises(YamlFileError, match="two of the keys 1, 01 are the same number"):
        typed(dict[int, str], read_yaml_text("{1: a, 01: b}"))


def test_a_text_that_a_comment_may_have_cut_is_refused() -> None:
    values = read_yaml_text("path: set #2\n")
    with pytest.raises(YamlFileError, match="'set' is followed by '#2': put the whole in quotes"):
        typed(dict[str, str], values)
    assert typed(dict[str, int], read_yaml_text("seed: 1 #2\n")) == {"seed": 1}
