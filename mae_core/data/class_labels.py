"""Read the class labels of a sample from its `.cls` or `.json`."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from mae_core.data.samples import DataError

RawLabel = int | str  # a class's number or its name


def read_labels(data: bytes | None, where: str, *, key: str | None) -> tuple[RawLabel, ...]:
    """Read the class labels of one sample as they are written.

    Args:
        data: The `.cls` file: numbers separated by spaces, commas or bars; or the `.json` file.
        where: Shard and key, for errors.
        key: Key in the JSON object, whose value is a number, a name, or a list of them; a name may
            hold several, separated by bars, as in NIH's `Finding Labels`. None reads `.cls`.

    Raises:
        DataError: There is no label, or it has another form; names `where`.
    """
    if data is None:
        raise DataError(f"{where} has no label ({'.cls' if key is None else f'{key} in .json'})")
    if key is None:
        text = data.decode(errors="replace").strip()
        parts = re.split(r"[\s,|]+", text) if text else []
        if not all(re.fullmatch(r"\d{1,9}", part) for part in parts):
            raise DataError(f"{where}.cls holds {text[:40]!r}, not the number of a class")
        return tuple(int(part) for part in parts)
    try:
        fields = json.loads(data)
        value = fields[key]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}.json has no {key!r} ({type(error).__name__})") from error
    labels: list[RawLabel] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            labels += [name.strip() for name in item.split("|") if name.strip()]
        elif isinstance(item, int) and not isinstance(item, bool) and item >= 0:
            labels.append(item)
        else:
            raise DataError(f"{where}.json: {key} holds {item!r}, neither a name nor a number")
    return tuple(labels)


def class_indices(
    labels: Sequence[RawLabel],
    where: str,
    names: Sequence[str],
    numbers: Mapping[int, int] | None = None,
) -> tuple[int, ...]:
    """Convert labels to class indices from 0.

    Args:
        labels: The result of `read_labels`.
        where: Shard and key, for errors.
        names: Names of the run's classes.
        numbers: Maps class numbers of the sample's own data set to those of the run; None where
            they are the same.

    Raises:
        DataError: A class is not in `names`; names `where` and the class.
    """
    indices = []
    for label in labels:
        number = label if numbers is None or isinstance(label, str) else numbers.get(label)
        if isinstance(number, int) and number < len(names):
            indices.append(number)
        elif isinstance(label, str) and label in names:
            indices.append(names.index(label))
        else:
            raise DataError(
                f"{where}: class {label!r}, but there are {len(names)}: {', '.join(names[:20])}"
            )
    return tuple(indices)


LabelT = TypeVar("LabelT", bound=RawLabel)


def one_class(indices: Sequence[LabelT], where: str) -> LabelT:
    """Return the only class of a sample, or raise a DataError if it has none or several."""
    if len(indices) != 1:
        raise DataError(
            f"{where} has {len(indices)} classes where one is expected; for several, set "
            "classify.labels=many"
        )
    return indices[0]


def names_of(labels: Sequence[Sequence[RawLabel]]) -> tuple[str, ...]:
    """Name all classes that samples have: the names as written, or the numbers from 0."""
    found = {label for sample in labels for label in sample}
    numbers = [label for label in found if isinstance(label, int)]
    if len(numbers) == len(found):
        return tuple(str(number) for number in range(max(numbers, default=-1) + 1))
    return tuple(sorted(map(str, found)))
