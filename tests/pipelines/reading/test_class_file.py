"""Every common form of a list of classes gives the same names."""

import json
from pathlib import Path
from typing import Any

import pytest

from mae_core.data.samples import DataError
from pipelines.reading.class_file import parse_class_names


@pytest.mark.parametrize(
    "listed",
    [
        ["cat", "dog"],
        [{"index": 1, "name": "dog"}, {"index": 0, "name": "cat"}],
        [{"id": 0, "label": "cat"}, {"id": 1, "label": "dog"}],
        [{"name": "cat"}, {"name": "dog"}],
        {"1": "dog", "0": "cat"},
        {"dog": 1, "cat": 0},
        {"classes": ["cat", "dog"], "num_classes": 2},
        {"classes": [{"id": 0, "name": "cat", "color": [1, 2, 3]}, {"id": 1, "name": "dog"}]},
        {"id2label": {"0": "cat", "1": "dog"}},
        {"class_to_idx": {"cat": 0, "dog": 1}},
    ],
)
def test_names_are_in_the_order_of_their_numbers(listed: Any) -> None:
    assert parse_class_names(listed, "f") == ("cat", "dog")


def test_a_class_without_a_name_is_named_by_its_other_values() -> None:
    listed = [{"index": i, "alphabet": "Latin", "character": 3 + i} for i in range(2)]
    assert parse_class_names(listed, "f") == ("Latin 3", "Latin 4")


def test_classes_of_one_name_are_told_apart_by_their_other_values() -> None:
    listed = [
        {"index": 0, "wnid": "n02012849", "name": "crane"},
        {"index": 1, "wnid": "n03126707", "name": "crane"},
        {"index": 2, "wnid": "n02123045", "name": "cat"},
    ]
    names = parse_class_names(listed, "f")
    assert names == ("crane (n02012849)", "crane (n03126707)", "cat")


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"1": "cat", "2": "dog"}, "numbered 0 to 1, each once; number 0 is missing"),
        ([{"id": 0, "name": "a"}, {"id": 0, "name": "b"}], "number 1 is missing"),
        ({"cat": 0, "dog": 2}, "number 1 is missing"),
        ({"0": "cat", "1": "cat"}, "two classes have the name 'cat'"),
        ([1, 2], "none of the forms"),
        ("cat", "none of the forms"),
        ({"cat": True, "dog": False}, "none of the forms"),
        ({"9" * 5000: "cat"}, "none of the forms"),
        ([{"index": 0}], "none of the forms"),
        (["cat", {"name": "dog"}], "none of the forms"),
    ],
)
def test_another_form_is_refused_in_words(listed: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^f: .*{message}"):
        parse_class_names(listed, "f")


@pytest.mark.parametrize(
    ("name", "count", "first"),
    [("omniglot", 201, "Early_Aramaic 1"), ("imagenet_sample", 1000, "tench")],
)
def test_real_files_are_read(real_data: Path, name: str, count: int, first: str) -> None:
    names = parse_class_names(json.loads((real_data / name / "classes.json").read_text()), name)
    assert len(names) == len(set(names)) == count
    assert names[0] == first
