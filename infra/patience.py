"""Reads over a bad network: tried again while their fault is one that may pass.

A read is ours to try again, each try one request: pyarrow takes some faults for success, and does
not retry an error whose text is longer than the range asked for.
"""

import io
import logging
import re
from collections.abc import Callable
from typing import Any, NoReturn

import tenacity

logger = logging.getLogger(__name__)

# An outage of 29 s is waited out, at most 58 s; a server that hangs is given up after READ_TRIES
# times the client's timeout more.
READ_TRIES = 20
READ_BACKOFF_S = 0.1
READ_BACKOFF_MAX_S = 4.0
_TRANSIENT = re.compile(
    "NETWORK_CONNECTION|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT"
    r"|HTTP status (429|5\d\d)|SHORT_READ"
)


def patiently(uri: str, action: Callable[[], Any]) -> Any:
    """What `action` returns, tried again while its fault is one that may pass."""

    def warn(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning("reading %s, try %d failed: %s", uri, state.attempt_number, error)

    def give_up(state: tenacity.RetryCallState) -> NoReturn:
        error = state.outcome.exception() if state.outcome else None
        raise OSError(f"{error}; gave up after {state.attempt_number} tries") from error

    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(READ_TRIES),
        # Half of it random, or all workers would come back at once.
        wait=tenacity.wait_exponential(READ_BACKOFF_S / 2, READ_BACKOFF_MAX_S / 2)
        + tenacity.wait_random_exponential(READ_BACKOFF_S / 2, READ_BACKOFF_MAX_S / 2),
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=warn,
        retry_error_callback=give_up,
    )(action)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and _TRANSIENT.search(str(error)) is not None


def _fill(file: Any, start: int, buffer: memoryview) -> None:
    # On S3 pyarrow counts the bytes that it asked for, whatever came, and leaves the rest of the
    # buffer as it was (25.0.1). So what stood in its last byte must be gone; twice, since the
    # byte that belongs there may be the same.
    for mark in b"U\xaa":
        buffer[-1] = mark
        file.seek(start)
        count = file.readinto(buffer)
        if count == len(buffer) and buffer[-1] != mark:
            return
    raise OSError(f"SHORT_READ: fewer than the {len(buffer)} bytes from {start} on came")


def fill_patiently(uri: str, file: Any, start: int, buffer: memoryview) -> None:
    """Read exactly `buffer`'s length from `start` on."""
    if len(buffer):
        patiently(uri, lambda: _fill(file, start, buffer))


class ObjectStream(io.RawIOBase):
    """An object on S3, read by ranges, each of which may be tried again."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file, self._position = uri, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._file.size() - self._position)
        fill_patiently(self._uri, self._file, self._position, memoryview(buffer)[:length])
        self._position += length
        return length
