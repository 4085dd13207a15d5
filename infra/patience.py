"""Read over an unreliable network: retry after errors that may pass.

Retries are done here, with one request each, because pyarrow takes some errors for success, and
does not retry an error whose text is longer than the requested range.
"""

import io
import logging
import re
from collections.abc import Callable
from typing import Any, NoReturn

import tenacity

logger = logging.getLogger(__name__)

# Outages of 29 s are always survived, and some of up to 58 s. A server that hangs takes READ_TRIES
# times the client's timeout in addition.
READ_TRIES = 20
READ_BACKOFF_S = 0.1
READ_BACKOFF_MAX_S = 4.0
_TRANSIENT = re.compile(
    "NETWORK_CONNECTION|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|REQUEST_TIMEOUT"
    r"|HTTP status (429|5\d\d)|SHORT_READ"
)


def patiently(uri: str, action: Callable[[], Any]) -> Any:
    """Return the result of `action`, retried while its error is one that may pass."""

    def warn(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.warning("reading %s, try %d failed: %s", uri, state.attempt_number, error)

    def give_up(state: tenacity.RetryCallState) -> NoReturn:
        error = state.outcome.exception() if state.outcome else None
        raise OSError(f"{error}; gave up after {state.attempt_number} tries") from error

    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(READ_TRIES),
        # Half of the wait is random, or all workers would retry at once.
        wait=tenacity.wait_exponential(READ_BACKOFF_S / 2, READ_BACKOFF_MAX_S / 2)
        + tenacity.wait_random_exponential(READ_BACKOFF_S / 2, READ_BACKOFF_MAX_S / 2),
        retry=tenacity.retry_if_exception(_may_pass),
        before_sleep=warn,
        retry_error_callback=give_up,
    )(action)


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, OSError) and _TRANSIENT.search(str(error)) is not None


def _fill(file: Any, start: int, buffer: memoryview) -> None:
    # On S3 pyarrow (25.0.1) reports the number of bytes requested, whatever it received, and leaves
    # the rest of the buffer unchanged. So the mark in the last byte must have been overwritten;
    # two marks are tried, because the byte that belongs there may equal the first.
    for mark in b"U\xaa":
        buffer[-1] = mark
        file.seek(start)
        count = file.readinto(buffer)
        if count == len(buffer) and buffer[-1] != mark:
            return
    raise OSError(f"SHORT_READ: received fewer than the {len(buffer)} bytes from {start} on")


def fill_patiently(uri: str, file: Any, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with the bytes from `start` on; raise an OSError if there are fewer."""
    if len(buffer):
        patiently(uri, lambda: _fill(file, start, buffer))


class ObjectStream(io.RawIOBase):
    """An object on S3, read in ranges; each range may be retried."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file, self._position = uri, file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._file.size() - self._position)
        fill_patiently(self._uri, self._file, self._position, memoryview(buffer)[:length])
        self._position += length
        return length
