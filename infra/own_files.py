"""Read the small files that this program writes for itself, and report damage.

A file that is truncated, empty, not JSON or of another shape is damaged. Code that can recompute
the content reads it with `read_or_none`, which warns. Other code reads it with `read_own`, which
raises, so that nothing overwrites a file that cannot be recomputed.
"""

import logging
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from infra import storage

logger = logging.getLogger(__name__)

T = TypeVar("T")
SHOWN_CHARS = 200


class DamagedFileError(RuntimeError):
    """One of our own files is not what we wrote; the message has the file, problem and remedy."""


def read_own(uri: str, shape: type[T], way_out: str) -> T | None:
    """Read a JSON file that we wrote; None if there is no such file.

    Args:
        uri: The file.
        shape: A pydantic model, a NamedTuple, or a type such as `dict[str, float]`.
        way_out: What to do if the file is damaged, for the error: a full clause.

    Raises:
        DamagedFileError: The file is not JSON, or not of this shape.
        StorageError: The store cannot be used.
    """
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    return parse_own(data, uri, shape, way_out)


def parse_own(data: bytes, uri: str, shape: Any, way_out: str) -> Any:
    """Parse content that has been read already, as `read_own` does."""
    try:
        return TypeAdapter(shape).validate_json(data)
    except ValidationError as error:
        raise DamagedFileError(f"{uri} is damaged ({_first(error, data)}); {way_out}") from error


def read_or_none(uri: str, shape: type[T], consequence: str) -> T | None:
    """Read a JSON file that can be recomputed; warn and return None if it is damaged.

    Args:
        uri: The file.
        shape: See `read_own`.
        consequence: What happens instead, for the warning.
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
    """Read a file with one JSON object per line, and warn about the number of damaged lines."""
    found, num_damaged = [], 0
    for line in storage.read_bytes(uri).splitlines():
        try:
            found.append(parse_own(line, uri, dict[str, Any], ""))
        except DamagedFileError:
            num_damaged += 1
    if num_damaged:
        logger.warning("%s: %d lines are damaged and not counted", uri, num_damaged)
    return found
