"""Parse the forms in which classes.json files list class names.

["cat", "dog"]
[{"index": 0, "name": "cat"}, {"index": 1, "name": "dog"}]    also "id", or neither: the order
{"0": "cat", "1": "dog"}                                      Hugging Face's id2label
{"cat": 0, "dog": 1}                                          torchvision's class_to_idx
{"classes": ...}                                              any of these, beside other keys
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from mae_core.data.samples import DataError

_NUMBER_KEYS = ("index", "id", "class_id", "label_id")
_NAME_KEYS = ("name", "label", "class")
_MAX_DIGITS = 10
_LIST_KEYS = ("classes", "names", "categories", "id2label", "class_to_idx")


def parse_class_names(listed: Any, uri: str) -> tuple[str, ...]:
    """Return the class names in the order of their numbers.

    A class without a name of its own is named by its other values ("Latin 3"), which also tell
    classes of the same name apart ("crane (n02012849)").

    Args:
        listed: What the file holds.
        uri: Where it lies, for the error.

    Raises:
        DataError: It has none of the forms above, its numbers do not run from 0 on, or two classes
            can't be told apart.
    """
    if isinstance(listed, dict):
        listed = next((listed[key] for key in _LIST_KEYS if _holds_classes(listed, key)), listed)
    pairs = _pairs(listed)
    if pairs is None:
        raise DataError(
            f'{uri}: none of the forms ["cat", "dog"], [{{"index": 0, "name": "cat"}}, ...], '
            '{"0": "cat", ...} and {"cat": 0, ...}'
        )
    numbers = sorted(number for number, _ in pairs)
    if numbers != list(range(len(numbers))):
        wrong = next(i for i, number in enumerate(numbers) if number != i)
        raise DataError(
            f"{uri}: classes have to be numbered 0 to {len(numbers) - 1}, each once; "
            f"number {wrong} is missing"
        )
    names = tuple(name for _, name in sorted(pairs))
    if twice := sorted({name for name, count in Counter(names).items() if count > 1}):
        raise DataError(f"{uri}: two classes have the name {twice[0]!r}")
    return names


def _holds_classes(listed: dict[str, Any], key: str) -> bool:
    return isinstance(listed.get(key), list | dict)


def _pairs(listed: Any) -> list[tuple[int, str]] | None:
    """Return the number and name of each class, or None if the form is another one."""
    if isinstance(listed, dict):
        return _mapped(listed)
    if not isinstance(listed, list):
        return None
    if all(isinstance(item, str) for item in listed):
        return list(enumerate(listed))
    if not all(isinstance(item, dict) for item in listed):
        return None
    return _described(listed)


def _mapped(listed: Mapping[str, Any]) -> list[tuple[int, str]] | None:
    if all(_is_number(key) and isinstance(name, str) for key, name in listed.items()):
        return [(int(key), name) for key, name in listed.items()]
    if all(type(number) is int for number in listed.values()):
        return [(number, name) for name, number in listed.items()]
    return None


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < _MAX_DIGITS


def _described(items: list[dict[str, Any]]) -> list[tuple[int, str]] | None:
    number_key = next((k for k in _NUMBER_KEYS if all(type(i.get(k)) is int for i in items)), None)
    name_key = next((k for k in _NAME_KEYS if all(isinstance(i.get(k), str) for i in items)), None)
    others = [
        " ".join(
            str(value)
            for key, value in item.items()
            if key not in (number_key, name_key) and isinstance(value, str | int)
        )
        for item in items
    ]
    names = [item[name_key] for item in items] if name_key else others
    if not all(names):
        return None
    counts = Counter(names)
    told_apart = [
        f"{name} ({other})" if name_key and counts[name] > 1 and other else name
        for name, other in zip(names, others, strict=True)
    ]
    numbers = [item[number_key] for item in items] if number_key else range(len(items))
    return list(zip(numbers, told_apart, strict=True))
