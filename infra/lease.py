"""At most one at a time works in a folder, on one machine or on many.

On a local disk the operating system keeps the lock, and drops it with the process. On S3 an object
that only one can create is kept fresh by a heartbeat; when it was not for STALE_S, whoever wants
it takes it over, by a write that the store refuses if another came first. Ages are by the store's
clock.
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
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import boto3
import psutil
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra import storage

logger = logging.getLogger(__name__)

HEARTBEAT_S = 15.0
STALE_S = 60.0
logging.getLogger("botocore.credentials").setLevel(logging.WARNING)  # says that it found some
REFUSED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")


class HeldError(storage.StorageError):
    """Another process works there; says which."""


class Lease:
    """One that is held, or was lost to another."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.is_lost = False

    def check(self) -> None:
        """Raises: HeldError: another took it over."""
        if self.is_lost:
            raise HeldError(f"{self.uri}: another took it over while we did not keep it fresh")


@contextmanager
def lease(uri: str, purpose: str) -> Iterator[Lease]:
    """Hold the file at `uri` while inside.

    Raises:
        HeldError: another holds it.
        StorageError: the store cannot be used.
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
        holder = json.loads(text)
    except ValueError:
        holder = {}
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return f"{uri}: {holder.get('purpose', 'another run')} is at work here ({who})"


@contextmanager
def _hold_object(uri: str, text: str) -> Iterator[Lease]:
    bucket, _, key = storage.absolute(uri).removeprefix(storage.S3_SCHEME).partition("/")
    tag = _take(uri, bucket, key, text)
    held = Lease(uri)
    stopped = threading.Event()
    beating = threading.Thread(
        target=_beat, args=(held, bucket, key, text, tag, stopped), daemon=True
    )
    beating.start()
    try:
        yield held
    finally:
        stopped.set()
        beating.join(timeout=HEARTBEAT_S)
        with suppress(ClientError, BotoCoreError):
            if _read(bucket, key) == text:
                _client().delete_object(Bucket=bucket, Key=key)


def _take(uri: str, bucket: str, key: str, text: str) -> str:
    """Write the object, if none is there or the one there is stale; returns its ETag."""
    with _store_errors(uri):
        if (tag := _put(bucket, key, text, IfNoneMatch="*")) is not None:
            return tag
        try:
            found = _client().get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):  # given back since
                return _take(uri, bucket, key, text)
            raise
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        holder = found["Body"].read().decode()
        if holder == text:  # our own write, whose answer was lost
            return str(found["ETag"])
        age_s = (now - found["LastModified"]).total_seconds()
        if age_s >= STALE_S or _is_dead_here(holder):
            logger.warning("%s: not heard of for %.0f s; taken over", _held_by(uri, holder), age_s)
            if (tag := _put(bucket, key, text, IfMatch=found["ETag"])) is not None:
                return tag
    raise HeldError(f"{_held_by(uri, holder)}, heard of {max(age_s, 0):.0f} s ago")


def _is_dead_here(text: str) -> bool:
    """The holder was a process of this machine that is gone: no need to wait."""
    with suppress(ValueError, KeyError, TypeError):
        holder = json.loads(text)
        return holder["host"] == socket.gethostname() and not psutil.pid_exists(holder["pid"])
    return False


def _beat(
    held: Lease, bucket: str, key: str, text: str, tag: str, stopped: threading.Event
) -> None:
    while not stopped.wait(HEARTBEAT_S):
        try:
            written = _put(bucket, key, text, IfMatch=tag)
            if written is None and _read(bucket, key) != text:
                logger.error("%s: another took it over", held.uri)
                held.is_lost = True
                return
            tag = written or tag
        except (ClientError, BotoCoreError) as error:
            logger.warning("%s: could not be kept fresh: %s", held.uri, error)


def _read(bucket: str, key: str) -> str:
    return str(_client().get_object(Bucket=bucket, Key=key)["Body"].read().decode())


def _put(bucket: str, key: str, text: str, **condition: str) -> str | None:
    """ETag of what was written; None where the condition does not hold."""
    try:
        written = _client().put_object(Bucket=bucket, Key=key, Body=text.encode(), **condition)
    except ClientError as error:
        if error.response["Error"]["Code"] in REFUSED:
            return None
        raise
    return str(written["ETag"])


@contextmanager
def _store_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        raise storage.StorageError(f"cannot take {uri}: {error}") from error


def _client() -> Any:
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    return _client_of(*(os.environ.get(name) for name in names))


@lru_cache(maxsize=4)
def _client_of(endpoint: str | None, *_keys: str | None) -> Any:
    # A session of its own: the default one keeps the first keys that it saw.
    # A request that hangs must not outlast the time in which others take the lease for stale.
    patience = Config(connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 2})
    return boto3.Session().client("s3", endpoint_url=endpoint, config=patience)
