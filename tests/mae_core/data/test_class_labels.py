"""Labels as people write them, and the errors for wrong ones."""

import pytest

from mae_core.data.class_labels import class_indices, names_of, one_class, read_labels
from mae_core.data.samples import DataError

WHERE = "a.tar: k7"


@pytest.mark.parametrize(
    ("data", "key", "expected"),
    [
        (b"3", None, (3,)),
        (b" 3\n", None, (3,)),
        (b"1 4,7|9", None, (1, 4, 7, 9)),
        (b"", None, ()),
        (b'{"label": 2}', "label", (2,)),
        (b'{"label": "cat"}', "label", ("cat",)),
        (b'{"Finding Labels": "Edema|Mass"}', "Finding Labels", ("Edema", "Mass")),
        (b'{"f": ["Edema", 3]}', "f", ("Edema", 3)),
        (b'{"f": []}', "f", ()),
    ],
)
def test_labels_are_read(data: bytes, key: str | None, expected: tuple[object, ...]) -> None:
    assert read_labels(data, WHERE, key=key) == expected


@pytest.mark.parametrize(
    ("data", "key", "message"),
    [
        (None, None, "k7 has no label"),
        (b"cat", None, r"k7\.cls holds 'cat', not the number"),
        (b"-1", None, r"k7\.cls holds '-1'"),
        (b"{}", "f", r"k7\.json has no 'f'"),
        (b"[1]", "f", r"k7\.json has no 'f'"),
        (b"{", "f", r"k7\.json has no 'f'"),
        (b'{"f": 1.5}', "f", r"k7\.json: f holds 1\.5"),
        (b'{"f": true}', "f", r"k7\.json: f holds True"),
    ],
)
def test_a_wrong_label_is_named_with_its_sample(
    data: bytes | None, key: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_labels(data, WHERE, key=key)
    assert "a.tar" in str(error.value)


def test_classes_are_found_by_number_and_by_name() -> None:
    assert class_indices((1, "cat"), WHERE, ("cat", "dog")) == (1, 0)


@pytest.mark.parametrize("label", [2, "fox"])
def test_an_unknown_class_is_named_with_its_sample(label: int | str) -> None:
    with pytest.raises(DataError, match=rf"k7: class {label!r}, but there are 2: cat, dog"):
        class_indices((label,), WHERE, ("cat", "dog"))


@pytest.mark.parametrize("indices", [(), (1, 2)])
def test_none_or_several_classes_are_refused_where_one_is_expected(
    indices: tuple[int, ...],
) -> None:
    with pytest.raises(DataError, match=rf"k7 has {len(indices)} classes"):
        one_class(indices, WHERE)


def test_names_are_those_written_or_the_numbers() -> None:
    assert names_of([(0,), (3,), (1,)]) == ("0", "1", "2", "3")
    assert names_of([("dog",), ("cat", "dog")]) == ("cat", "dog")
