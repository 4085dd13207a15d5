"""Reads over a bad network: tried again while their fault is one that may pass.

A read is ours to try again, each try one request: pyarrow takes some faults for success, and does
not retry an error whose text is longer than the range asked for.
"""

import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

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
    num_tries = 1
    while True:
        try:
            return action()
        except OSError as error:
            if not _TRANSIENT.search(str(error)):
                raise
            if num_tries >= READ_TRIES:
                raise OSError(f"{error}; gave up after {num_tries} tries") from error
            logger.warning("reading %s, try %d failed: %s", uri, num_tries, error)
        delay_s = min(READ_BACKOFF_S * 2 ** (num_tries - 1), READ_BACKOFF_MAX_S)
        # Jitter, or all workers would come back at once.
        time.sleep(delay_s * secrets.SystemRandom().uniform(0.5, 1.0))
        num_tries += 1


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
