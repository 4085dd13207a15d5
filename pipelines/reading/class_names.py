"""What the numbers of classes mean in each folder of shards, and one numbering for several.

A folder names its classes by its manifest, by classes.json, or by categories.json of boxes. Two
folders may give a class different numbers. Where both name it, the name decides; numbers alone
are compared only where names are missing.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from infra import storage
from mae_core.data.manifest import MANIFEST_NAME, ShardInfo, parse_manifest
from mae_core.data.samples import DataError

logger = logging.getLogger(__name__)

CLASSES_FILE = "classes.json"
CATEGORIES_FILE = "categories.json"

# Of each folder whose classes have names: the number there to the number of the run.
Numbers = Mapping[str, Mapping[int, int]]


class Classes(NamedTuple):
    """The classes of a run."""

    names: tuple[str, ...]  # in the order of the run's numbers; empty where nothing names them
    numbers: Numbers


def folder_of(shard: str) -> str:
    return shard.rpartition("/")[0]


def folders_of(shards: Iterable[ShardInfo]) -> list[str]:
    """The folders that shards lie in, each once, in order."""
    return list(dict.fromkeys(folder_of(shard.path) for shard in shards))


def read_json_beside(folder: str, name: str) -> tuple[str, Any]:
    """A JSON file in a folder of shards: its URI, and what it holds; None without one.

    Raises:
        DataError: it is no JSON.
    """
    uri = storage.join(folder, name)
    if not storage.exists(uri):
        return uri, None
    try:
        return uri, json.loads(storage.read_bytes(uri))
    except ValueError as error:
        raise DataError(f"{uri}: is no JSON ({error})") from error


def read_class_names(shards: Iterable[ShardInfo]) -> dict[str, tuple[str, ...] | None]:
    """The names of the classes by folder, in the order of their numbers; None without names.

    Raises:
        DataError: a manifest or classes.json is damaged, or gives two classes one name.
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
        if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
            raise DataError(f'{uri}: not a list of names such as ["cat", "dog"]')
        names = tuple(listed)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{uri}: two classes have the name {twice[0]!r}")
    return names or None


def read_category_names(folder: str) -> dict[int, str]:
    """Names of the categories of boxes by category_id, as categories.json beside the shards has it.

    Raises:
        DataError: it is not COCO's list of ids and names.
    """
    uri, listed = read_json_beside(folder, CATEGORIES_FILE)
    try:
        return {int(item["id"]): str(item["name"]) for item in listed or ()}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f'{uri}: not a list of {{"id": 1, "name": "..."}} ({error})') from error


def united_names(named: Mapping[str, Sequence[str] | None]) -> tuple[str, ...]:
    """All names that folders give their classes, in the order in which they first come."""
    return tuple(dict.fromkeys(name for names in named.values() for name in names or ()))


def classes_by_name(
    train: Mapping[str, Sequence[str] | None],
    val: Mapping[str, Sequence[str] | None] = MappingProxyType({}),
    given: Sequence[str] | None = None,
) -> Classes:
    """Number the classes of several folders alike, by their names.

    Args:
        train: of each folder, its names in the order of its numbers, or None.
        val: likewise; names that only these have get no number.
        given: the names of the run; those of `train` where left out. Names of which the folders
            know none rename the folders' classes, in the folders' order.
    """
    own = united_names(train) or united_names(val)
    names = own if given is None else tuple(given)
    renamed = len(names) == len(own) and not set(names) & set(own)
    places = {name: place for place, name in enumerate(own if renamed else names)}
    numbers = {
        folder: {number: places[name] for number, name in enumerate(listed) if name in places}
        for folder, listed in {**train, **val}.items()
        if listed is not None
    }
    return Classes(names, numbers)


def warn_of_unnamed(named: Mapping[str, Sequence[str] | None]) -> None:
    """Say which folders' numbers have to be taken as they are, beside folders with names."""
    unnamed = [folder for folder, names in named.items() if names is None]
    if unnamed and any(named.values()):
        logger.warning(
            "%s: nothing names the classes; their numbers are taken to mean what they mean in the "
            "other sets. If they do not, put a %s beside the shards",
            ", ".join(unnamed),
            CLASSES_FILE,
        )
