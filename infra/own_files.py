"""Read the small files that this program writes for itself, and say what is wrong with one.

A file that is cut, empty, not JSON or of another shape is damaged. Who can make its content anew
reads it with `read_or_none`, which warns; all else reads it with `read_own`, which raises, so that
nothing is written over what cannot be made again.
"""

import logging
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from infra import storage

logger = logging.getLogger(__name__)

T = TypeVar("T")
SHOWN_CHARS = 200


class DamagedFileError(RuntimeError):
    """A file of our own is not what we wrote; names it, what is wrong, and what to do."""


def read_own(uri: str, shape: type[T], way_out: str) -> T | None:
    """The content of a JSON file that we wrote; None if there is no such file.

    Args:
        uri: of the file.
        shape: a pydantic model, a NamedTuple, or a type such as `dict[str, float]`.
        way_out: what to do where the file is damaged, for the error: a full clause.

    Raises:
        DamagedFileError: it is not JSON, or not of this shape.
        StorageError: the store cannot be used.
    """
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    return parse_own(data, uri, shape, way_out)


def parse_own(data: bytes, uri: str, shape: Any, way_out: str) -> Any:
    """Do what `read_own` does with content that has been read already."""
    try:
        return TypeAdapter(shape).validate_json(data)
    except ValidationError as error:
        raise DamagedFileError(f"{uri} is damaged ({_first(error, data)}); {way_out}") from error


def read_or_none(uri: str, shape: type[T], consequence: str) -> T | None:
    """The content of a JSON file that can be made anew; None, with a warning, if it is damaged.

    Args:
        uri: of the file.
        shape: see `read_own`.
        consequence: what is done instead, for the warning.
    """
    try:
        return read_own(uri, shape, consequence)
    except DamagedFileError as error:
        logger.warning("%s", error)
        return None


def _first(error: ValidationError, data: bytes) -> str:
    if not data.strip():
        return "it is empty"
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else first["msg"][:SHOWN_CHARS]


def read_lines(uri: str) -> list[dict[str, Any]]:
    """The objects of a file with one a line; a warning counts the lines that are damaged."""
    found, num_damaged = [], 0
    for line in storage.read_bytes(uri).splitlines():
        try:
            found.append(parse_own(line, uri, dict[str, Any], ""))
        except DamagedFileError:
            num_damaged += 1
    if num_damaged:
        logger.warning("%s: %d lines are damaged and not counted", uri, num_damaged)
    return found
