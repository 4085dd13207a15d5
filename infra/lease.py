"""Let at most one process at a time work in a folder, on one machine or on many.

On a local disk the operating system holds the lock and releases it when the process ends. On S3 a
conditional write creates an object, and a heartbeat keeps it fresh. If it has not been refreshed
for STALE_S, another process may take it over, by a write that the store refuses if someone else was
faster. Releasing it is such a write too: it leaves an empty object and never deletes a lease that
another process holds by now. Ages are measured by the store's clock.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any

import psutil

from infra import storage
from infra.conditional import get, put_if
from infra.own_files import DamagedFileError, parse_own

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
STALE_S = 60.0
GIVEN_BACK = b""


class HeldError(storage.StorageError):
    """Another process works in the folder; the message says which."""


class Lease:
    """A lease that this process holds, or has lost to another."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.is_lost = False
        self.tag = ""  # ETag of what we wrote last, on S3

    def check(self) -> None:
        """Raise a HeldError if another process has taken the lease over."""
        if self.is_lost:
            raise HeldError(f"{self.uri}: another process took it over while it was not refreshed")


@contextmanager
def lease(uri: str, purpose: str) -> Iterator[Lease]:
    """Hold the lease at `uri` for the duration of the block.

    Raises:
        HeldError: Another process holds it.
        StorageError: The store cannot be used.
    """
    holder = {"purpose": purpose, "host": socket.gethostname(), "pid": os.getpid()}
    text = json.dumps({**holder, "token": secrets.token_hex(8)})
    hold = _hold_object if storage.is_remote(uri) else _hold_file
    with hold(uri, text) as held:
        yield held


@contextmanager
def _hold_file(uri: str, text: str) -> Iterator[Lease]:
    path = Path(storage.absolute(uri))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+")
    except OSError as error:
        raise storage.StorageError(f"cannot take {uri}: {error}") from error
    with opened as file:
        _lock(file, uri)
        file.seek(0)
        file.truncate()
        file.write(text)
        file.flush()
        yield Lease(uri)


def _lock(file: IO[str], uri: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise HeldError(_held_by(uri, file.read())) from None


def _held_by(uri: str, text: str) -> str:
    try:
        holder = parse_own(text.encode(), uri, dict[str, Any], "")
    except DamagedFileError:  # its holder has written half of it
        holder = {}
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return f"{uri}: {holder.get('purpose', 'another run')} is at work here ({who})"


@contextmanager
def _hold_object(uri: str, text: str) -> Iterator[Lease]:
    held = Lease(uri)
    held.tag = _take(uri, text)
    stopped = threading.Event()
    beating = threading.Thread(target=_beat, args=(held, text, stopped), daemon=True)
    beating.start()
    try:
        yield held
    finally:
        stopped.set()
        beating.join(timeout=HEARTBEAT_S)
        with suppress(storage.StorageError):
            if put_if(uri, GIVEN_BACK, IfMatch=held.tag) is None:
                # A heartbeat whose answer got lost has changed our ETag.
                found = get(uri)
                if found is not None and found["Body"].decode() == text:
                    put_if(uri, GIVEN_BACK, IfMatch=found["ETag"])


def _take(uri: str, text: str) -> str:
    """Write the object if there is none or only a stale one; return its ETag."""
    if (tag := put_if(uri, text.encode(), IfNoneMatch="*")) is not None:
        return tag
    found = get(uri)
    if found is None:  # released in the meantime
        return _take(uri, text)
    holder = found["Body"].decode()
    if holder == text:  # our own write, whose answer got lost
        return str(found["ETag"])
    now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
    age_s = (now - found["LastModified"]).total_seconds()
    is_given_back = found["Body"] == GIVEN_BACK
    if is_given_back or age_s >= STALE_S or _is_dead_here(holder):
        if not is_given_back:
            logger.warning("%s: not refreshed for %.0f s; taken over", _held_by(uri, holder), age_s)
        if (tag := put_if(uri, text.encode(), IfMatch=found["ETag"])) is not None:
            return tag
    raise HeldError(f"{_held_by(uri, holder)}, refreshed {max(age_s, 0):.0f} s ago")


def _is_dead_here(text: str) -> bool:
    """Return whether the holder was a process on this machine that has ended."""
    with suppress(ValueError, KeyError, TypeError):
        holder = json.loads(text)
        return holder["host"] == socket.gethostname() and not psutil.pid_exists(holder["pid"])
    return False


def _beat(held: Lease, text: str, stopped: threading.Event) -> None:
    while not stopped.wait(HEARTBEAT_S):
        try:
            written = put_if(held.uri, text.encode(), IfMatch=held.tag)
            if written is None and not _is_ours(held.uri, text):
                logger.error("%s: another process took it over", held.uri)
                held.is_lost = True
                return
            held.tag = written or held.tag
        except storage.StorageError as error:
            logger.warning("%s: could not be refreshed: %s", held.uri, error)


def _is_ours(uri: str, text: str) -> bool:
    found = get(uri)
    return found is not None and found["Body"].decode() == text
