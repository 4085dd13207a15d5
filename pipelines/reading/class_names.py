"""Read the class names of each folder of shards, and number several folders' classes alike.

The names are in a folder's manifest, in classes.json, or for boxes in categories.json. Two folders
may number a class differently. If both have names, the name decides; the numbers are compared only
where names are missing.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from infra import storage
from mae_core.data.manifest import MANIFEST_NAME, ShardInfo, parse_manifest
from mae_core.data.samples import DataError
from pipelines.reading.class_file import parse_class_names

logger = logging.getLogger(__name__)

CLASSES_FILE = "classes.json"
CATEGORIES_FILE = "categories.json"

# For each folder with class names: its class number to the run's class number.
Numbers = Mapping[str, Mapping[int, int]]


class Classes(NamedTuple):
    """The classes of a run."""

    names: tuple[str, ...]  # in the order of the run's numbers; empty if there are no names
    numbers: Numbers


def folder_of(shard: str) -> str:
    return shard.rpartition("/")[0]


def folders_of(shards: Iterable[ShardInfo]) -> list[str]:
    """List the folders of the shards, each once, in order."""
    return list(dict.fromkeys(folder_of(shard.path) for shard in shards))


def read_json_beside(folder: str, name: str) -> tuple[str, Any]:
    """Read a JSON file in a folder of shards; return its URI and content, None if missing.

    Raises:
        DataError: The file is not JSON.
    """
    uri = storage.join(folder, name)
    if not storage.exists(uri):
        return uri, None
    try:
        return uri, json.loads(storage.read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{uri}: not JSON ({error})") from error


def read_class_names(shards: Iterable[ShardInfo]) -> dict[str, tuple[str, ...] | None]:
    """Return class names by folder, in the order of their numbers; None without names.

    Raises:
        DataError: A manifest or classes.json is damaged, or gives two classes the same name.
    """
    return {folder: _class_names(folder) for folder in folders_of(shards)}


def _class_names(folder: str) -> tuple[str, ...] | None:
    uri = storage.join(folder, MANIFEST_NAME)
    names = None
    if storage.exists(uri):
        names = parse_manifest(storage.read_bytes(uri), uri).classes
    if not names:
        uri, listed = read_json_beside(folder, CLASSES_FILE)
        if listed is None:
            return None
        return parse_class_names(listed, uri) or None
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{uri}: two classes have the name {twice[0]!r}")
    return names or None


def read_category_names(folder: str) -> dict[int, str]:
    """Return box category names by category_id, from categories.json beside the shards.

    Raises:
        DataError: It is not COCO's list of ids and names.
    """
    uri, listed = read_json_beside(folder, CATEGORIES_FILE)
    try:
        return {int(item["id"]): str(item["name"]) for item in listed or ()}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f'{uri}: not a list of {{"id": 1, "name": "..."}} ({error})') from error


def united_names(named: Mapping[str, Sequence[str] | None]) -> tuple[str, ...]:
    """Return all class names of the folders, in the order of their first occurrence."""
    return tuple(dict.fromkeys(name for names in named.values() for name in names or ()))


def classes_by_name(
    train: Mapping[str, Sequence[str] | None],
    val: Mapping[str, Sequence[str] | None] = MappingProxyType({}),
    given: Sequence[str] | None = None,
) -> Classes:
    """Give the classes of several folders one numbering, by their names.

    Args:
        train: For each folder its names in the order of its numbers, or None.
        val: In the same form; names that only these have get no number.
        given: The names of the run; by default those of `train`. If no folder knows any of them,
            they rename the folders' classes in the folders' order.
    """
    own = united_names(train) or united_names(val)
    names = own if given is None else tuple(given)
    renamed = len(names) == len(own) and not set(names) & set(own)
    if not renamed and (left_out := [name for name in own if name not in names]):
        logger.warning(
            "the run's classes are %s; the sets also name %s: a sample of such a class is an error",
            ", ".join(names[:20]),
            ", ".join(repr(name) for name in left_out[:20]),
        )
    places = {name: place for place, name in enumerate(own if renamed else names)}
    numbers = {
        folder: {number: places[name] for number, name in enumerate(listed) if name in places}
        for folder, listed in {**train, **val}.items()
        if listed is not None
    }
    return Classes(names, numbers)


def warn_of_unnamed(named: Mapping[str, Sequence[str] | None]) -> None:
    """Warn about folders whose class numbers are used as they are, beside folders with names."""
    unnamed = [folder for folder, names in named.items() if names is None]
    if unnamed and any(named.values()):
        logger.warning(
            "%s: its classes have no names, so its numbers are assumed to mean the same as in the "
            "other sets. If they do not, put a %s beside the shards",
            ", ".join(unnamed),
            CLASSES_FILE,
        )
