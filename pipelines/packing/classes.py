"""Reuse the class numbers of a set that is already packed.

Without this, a validation set that lacks a class would number the other classes differently than
the training set.
"""

import json
from typing import NamedTuple

from infra import storage
from mae_core.data.manifest import MANIFEST_NAME, parse_manifest
from mae_core.data.samples import DataError
from pipelines.outcome import ConfigError
from pipelines.packing.shard import CATEGORIES_NAME


class GivenNumbers(NamedTuple):
    classes: tuple[str, ...] | None  # in the order of their numbers; None: the set has no classes
    categories: dict[int, str]  # number to name of the boxes' categories


def read_numbers(folder: str) -> GivenNumbers:
    """Read the numbers of classes and categories from a folder that `mae prepare` packed.

    Raises:
        ConfigError: There is no such folder, or it has neither classes nor categories.
    """
    uri = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(uri):
        raise ConfigError(
            f"classes={folder}: there is no {MANIFEST_NAME}; give the folder of a set that "
            "`mae prepare` has packed"
        )
    classes = parse_manifest(storage.read_bytes(uri), uri).classes
    listed = storage.join(folder, CATEGORIES_NAME)
    categories = {}
    if storage.exists(listed):
        try:
            items = json.loads(storage.read_bytes(listed))
            categories = {int(item["id"]): str(item["name"]) for item in items}
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{listed}: not a list of ids and names ({error})") from error
    if classes is None and not categories:
        raise ConfigError(f"classes={folder}: that set has no names of classes or categories")
    return GivenNumbers(classes, categories)
