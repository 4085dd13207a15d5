"""Sets with different class numbers get one numbering by name."""

import json
import logging
from pathlib import Path

import pytest

from mae_core.data.manifest import ShardInfo
from mae_core.data.samples import DataError
from pipelines.reading.class_names import (
    classes_by_name,
    read_category_names,
    read_class_names,
    warn_of_unnamed,
)
from tests.pipelines.shard_sets import shard_set


def shard(folder: Path) -> ShardInfo:
    return ShardInfo(path=f"{folder}/s.tar", index="i", num_samples=1, num_bytes=1)


def test_names_come_from_the_manifest_or_classes_json_of_each_folder(tmp_path: Path) -> None:
    shard_set(tmp_path / "a", classes=["cat", "dog"])
    (shard_set(tmp_path / "b") / "classes.json").write_text('["dog"]')
    shard_set(tmp_path / "c")
    found = read_class_names([shard(tmp_path / name) for name in "abac"])
    assert found == {
        f"{tmp_path}/a": ("cat", "dog"),
        f"{tmp_path}/b": ("dog",),
        f"{tmp_path}/c": None,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3", "none of the forms"),
        ("[" * 100_000, "not JSON"),
        ('["a", "a"]', "two classes have the name 'a'"),
    ],
)
def test_a_wrong_classes_json_is_named(tmp_path: Path, content: str, message: str) -> None:
    (shard_set(tmp_path / "a") / "classes.json").write_text(content)
    with pytest.raises(DataError, match=f"classes.json: {message}"):
        read_class_names([shard(tmp_path / "a")])


def test_categories_are_named_beside_the_shards(tmp_path: Path) -> None:
    assert read_category_names(str(tmp_path)) == {}
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 3, "name": "cat"}]))
    assert read_category_names(str(tmp_path)) == {3: "cat"}


def test_a_set_without_one_class_is_numbered_as_the_whole_one() -> None:
    classes = classes_by_name({"train": ("cat", "dog", "fox")}, {"val": ("cat", "fox")})
    assert classes.names == ("cat", "dog", "fox")
    assert classes.numbers == {"train": {0: 0, 1: 1, 2: 2}, "val": {0: 0, 1: 2}}


def test_given_names_choose_the_order_and_not_the_meaning() -> None:
    train, val = {"train": ("cat", "dog", "fox")}, {"val": ("cat", "fox")}
    classes = classes_by_name(train, val, ("fox", "cat", "dog"))
    assert classes.names == ("fox", "cat", "dog")
    assert classes.numbers == {"train": {0: 1, 1: 2, 2: 0}, "val": {0: 1, 1: 0}}


def test_given_names_that_no_set_has_rename_the_classes() -> None:
    train, val = {"train": ("cat", "dog", "fox")}, {"val": ("cat", "fox")}
    classes = classes_by_name(train, val, ("Katze", "Hund", "Fuchs"))
    assert classes.names == ("Katze", "Hund", "Fuchs")
    assert classes.numbers["val"] == {0: 0, 1: 2}


def test_a_class_that_the_given_names_spell_otherwise_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        classes_by_name({"train": ("no_finding", "mass")}, given=("no finding", "mass"))
    assert "the run's classes are no finding, mass; the sets also name 'no_finding'" in caplog.text


def test_a_class_that_the_given_names_lack_has_no_number() -> None:
    classes = classes_by_name({"train": ("cat", "dog")}, given=("cat", "fox"))
    assert classes.numbers == {"train": {0: 0}}


def test_a_set_without_names_keeps_its_numbers_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    named = {"train": ("cat", "dog"), "val": None}
    assert "val" not in classes_by_name(named).numbers
    with caplog.at_level(logging.WARNING):
        warn_of_unnamed(named)
        assert "val: its classes have no names" in caplog.text
        caplog.clear()
        warn_of_unnamed({"train": None, "val": None})
        assert caplog.text == ""


def test_two_training_sets_that_number_their_classes_otherwise_are_one() -> None:
    classes = classes_by_name({"a": ("cat", "dog"), "b": ("dog", "owl")}, {"val": ("owl", "emu")})
    assert classes.names == ("cat", "dog", "owl")
    assert classes.numbers == {"a": {0: 0, 1: 1}, "b": {0: 1, 1: 2}, "val": {0: 2}}


def test_a_rename_goes_by_the_training_sets() -> None:
    train, val = {"train": ("cat", "dog")}, {"val": ("dog", "emu")}
    classes = classes_by_name(train, val, ("Katze", "Hund"))
    assert classes.numbers["val"] == {0: 1}
