"""Read and write files by URI: a local path and s3://bucket/key behave alike.

Paths are absolute or relative local ones, or s3://; a listing is sorted by name. S3 takes its
endpoint and keys from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if set,
AWS_SESSION_TOKEN and AWS_REGION. A transient fault is retried: of a read for 30 to 60 s, of all
else, and of `open_random`, for 3 s.

Errors:
    FileNotFoundError    a file that a function was asked to read is not there
    NoShardsError        a shard specification names something that is not there
    StorageError         the store itself: unreachable, keys refused, no such bucket, disk full
"""

import argparse
import errno
import io
import logging
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from pyarrow import fs as pafs

from infra.patience import ObjectStream, fill_patiently, patiently
from infra.redaction import redact_bytes

logger = logging.getLogger(__name__)

S3_SCHEME = "s3://"
TEXT_SUFFIXES = (".json", ".jsonl", ".html", ".md", ".txt", ".csv", ".mmd", ".yaml", ".log")

# A request is sent up to 8 times, with 3.2 s of back-off; a server that hangs costs
# 8 * READ_TIMEOUT_S. Not AwsStandardS3RetryStrategy: pyarrow does not give its quota back, so that
# a client stops retrying for good after 100 retries (measured on 25.0.1: with 30 % of the
# connections reset, 89 of 1,500 reads failed, the first after 557; 0 with this one).
MAX_RETRIES = 7
CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 10

# Each read of a stream below this size would be a request of its own.
STREAM_BUFFER_BYTES = 8 * 2**20
COPY_BYTES = 8 * 2**20


# What a disk says when the same write would fail again, and what to do about it.
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full ({}). Make room, or choose another {}",
    errno.EDQUOT: "the disk quota is used up ({}). Make room, or choose another {}",
    errno.EROFS: "the disk is read-only ({}). Mount it for writing, or choose another {}",
    errno.EACCES: "access is denied ({}). Change the rights, or choose another {}",
    errno.EPERM: "access is denied ({}). Change the rights, or choose another {}",
}


class StorageError(RuntimeError):
    """The store cannot be used; says what failed, where, and what to try."""

    def __init__(self, message: str, *, is_lasting: bool = False) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting
        """Whether the same request would fail again."""


class NoShardsError(RuntimeError):
    """A shard specification matches nothing, or names a shard that is not there."""


def is_remote(uri: str) -> bool:
    return uri.startswith(S3_SCHEME)


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """One spelling for one place: local paths absolute, no empty parts, no slash at the end.

    Raises:
        ValueError: another scheme than s3://, or no bucket.
    """
    if is_remote(uri):
        parts = [part for part in uri.removeprefix(S3_SCHEME).split("/") if part]
        if not parts:
            raise ValueError(f"{uri!r} names no bucket; write s3://bucket/folder")
        if "@" in parts[0]:
            raise ValueError(
                f"s3://***@{parts[0].rpartition('@')[2]}/...: an address holds no keys; give them"
                " by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if ".." in parts or "." in parts or "\0" in uri:
            raise ValueError(
                f"{uri!r}: '.', '..' and NUL have no meaning in s3://; write it without"
            )
        return S3_SCHEME + "/".join(parts)
    if "://" in uri:
        raise ValueError(f"{uri!r}: only local paths and s3:// are supported")
    # Not Path.resolve: it would replace a linked shard's name by its target's.
    return os.path.normpath(Path(uri).expanduser().absolute())


def open_filesystem(uri: str, max_retries: int = MAX_RETRIES) -> tuple[pafs.FileSystem, str]:
    """The filesystem that holds `uri`, one a process, and the path inside it."""
    place = absolute(uri)
    if not is_remote(place):
        return _local_filesystem(), place
    variables = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    settings = [os.environ.get(name) or None for name in (*variables, "AWS_SESSION_TOKEN")]
    # With a region given, pyarrow does not ask the network for the bucket's.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return _s3_filesystem(*settings, region, max_retries), place.removeprefix(S3_SCHEME)


@lru_cache(maxsize=1)
def _local_filesystem() -> pafs.FileSystem:
    return pafs.LocalFileSystem()


@lru_cache(maxsize=8)
def _s3_filesystem(
    endpoint: str | None,
    access_key: str | None,
    secret_key: str | None,
    session_token: str | None,
    region: str,
    max_retries: int,
) -> pafs.FileSystem:
    # Without both keys pyarrow looks for a profile or an instance role.
    keys = {"access_key": access_key, "secret_key": secret_key, "session_token": session_token}
    return pafs.S3FileSystem(
        **(keys if access_key and secret_key else {}),
        endpoint_override=endpoint,
        region=region,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=max_retries),
        allow_delayed_open=True,  # a small object is one PUT, not a multipart upload
    )


@contextmanager
def storage_errors(action: str, uri: str, local: Path | None = None) -> Iterator[None]:
    """Turn what pyarrow and the system raise inside into a StorageError that names `uri`.

    For code that reads from `open_stream` or `open_random`, too: their reads fail later than
    the call that opened them.

    Args:
        action: a verb, for the message.
        uri: of the file.
        local: the file on this machine that is written meanwhile, if there is one.

    Raises:
        FileNotFoundError: as it came, unless it is the bucket that is not there.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if action == "write" and not is_remote(uri):
            text = f"cannot write {absolute(uri)}: its folder can't be made, or is a file"
            raise StorageError(f"{text} ({error})") from error
        if is_remote(uri):
            _check_bucket(uri)
        message = f"cannot {action} {absolute(uri)}: it does not exist"
        raise FileNotFoundError(errno.ENOENT, message) from error
    except (OSError, pa.ArrowException) as error:
        place = absolute(uri)
        if (known := disk_error(f"{action} {place}", error, local)) is not None:
            raise known from error
        raise StorageError(f"cannot {action} {place}: {_explain(uri, error)}") from error


def disk_error(action: str, error: BaseException, local: Path | None = None) -> StorageError | None:
    """The StorageError for a disk that is full, read-only or closed to us; None for another error.

    Args:
        action: what was tried and where, such as "write runs/run.json".
        error: of the system.
        local: the file in a temporary folder that was written, if it was that.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number not in DISK_ERRORS:
        return None
    where = "" if local is None else f" to {local}"
    setting = "storage.root" if local is None else "temporary folder (TMPDIR)"
    reason = DISK_ERRORS[number].format(error, setting)
    return StorageError(f"cannot {action}{where}: {reason}", is_lasting=True)


def _check_bucket(uri: str) -> None:
    """Tell a missing bucket, or refused keys, from a missing object: both look like a 404."""
    filesystem, path = open_filesystem(uri)
    try:
        filesystem.get_file_info(pafs.FileSelector(f"{path.split('/')[0]}/.no-such-folder"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"cannot use {absolute(uri)}: {_explain(uri, error)}") from error


def _explain(uri: str, error: BaseException) -> str:
    text = str(error)
    if not is_remote(uri):
        return text
    if "ACCESS_DENIED during HeadObject" in text:
        # A HEAD has no body to say why; a listing has one.
        try:
            _check_bucket(uri)
        except StorageError as precise:
            text = str(precise.__cause__)
    endpoint = os.environ.get("AWS_ENDPOINT_URL") or "AWS (AWS_ENDPOINT_URL is not set)"
    bucket = open_filesystem(uri)[1].split("/")[0]
    for code, what in {
        "SIGNATURE_DOES_NOT_MATCH": f"{endpoint} refused the secret; check AWS_SECRET_ACCESS_KEY",
        "INVALID_ACCESS_KEY_ID": f"{endpoint} does not know the key; check AWS_ACCESS_KEY_ID",
        "NO_SUCH_BUCKET": f"there is no bucket {bucket!r} at {endpoint}; create it, or check"
        " the bucket's name and AWS_ENDPOINT_URL",
        "ACCESS_DENIED": f"{endpoint} denied access; check AWS_ACCESS_KEY_ID,"
        " AWS_SECRET_ACCESS_KEY and what the key may do",
        "NETWORK_CONNECTION": f"{endpoint} cannot be reached; start it (make up), or check"
        " AWS_ENDPOINT_URL",
    }.items():
        if code in text:
            return f"{what}. ({text})"
    return text


def exists(uri: str) -> bool:
    """Whether a file or a folder is there."""
    return _file_info(uri).type != pafs.FileType.NotFound


def file_size(uri: str) -> int:
    """Size in bytes.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
    """
    info = _file_info(uri)
    if info.type != pafs.FileType.File:
        raise FileNotFoundError(errno.ENOENT, f"{absolute(uri)} is not a file")
    return int(info.size)


def _file_info(uri: str) -> pafs.FileInfo:
    filesystem, path = open_filesystem(uri)
    with storage_errors("look at", uri):
        info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound and is_remote(uri):
        _check_bucket(uri)
    return info


def read_bytes(uri: str) -> bytes:
    with storage_errors("read", uri):
        return _read(uri, 0, None)


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop); fewer where the file ends before `stop`."""
    with storage_errors("read", uri):
        return _read(uri, start, stop)


def _read(uri: str, start: int, stop: int | None) -> bytes:
    with _open_patiently(uri) as file:
        size = file.size()
        length = max(0, min(size if stop is None else stop, size) - start)
        if not is_remote(uri):
            return file.read_at(length, start)  # without the copy below
        buffer = bytearray(length)
        fill_patiently(uri, file, start, memoryview(buffer))
    return bytes(buffer)


def _open_patiently(uri: str) -> Any:
    filesystem, path = open_filesystem(uri, max_retries=0)
    return patiently(uri, lambda: filesystem.open_input_file(path))


def open_stream(uri: str) -> BinaryIO:
    """A file to read once from its start, as tarfile's mode "r|" does."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("open", uri):
        if is_remote(uri):
            return io.BufferedReader(ObjectStream(uri, _open_patiently(uri)), STREAM_BUFFER_BYTES)
        return filesystem.open_input_stream(path, compression=None)


def open_random(uri: str) -> BinaryIO:
    """A seekable file; on S3 each read is one request."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("open", uri):
        return filesystem.open_input_file(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file: a reader sees the old one or the new one, never a part.

    Secrets are taken out of what is text, by its name: records, tables, pages.
    """
    write_chunks(uri, [redact_bytes(data) if uri.endswith(TEXT_SUFFIXES) else data])


def write_chunks(uri: str, chunks: Iterable[bytes]) -> None:
    """Do what `write_bytes` does with a file that comes in pieces."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("write", uri):
        if is_remote(uri):
            _put_object(filesystem, path, chunks)
        else:
            _replace_file(Path(path), chunks)


def _put_object(filesystem: pafs.FileSystem, path: str, chunks: Iterable[bytes]) -> None:
    stream = filesystem.open_output_stream(path)
    try:
        for chunk in chunks:
            stream.write(chunk)
    except BaseException:
        # pyarrow cannot give an upload up: closing it makes an object of what came so far.
        with suppress(OSError):
            stream.close()
            filesystem.delete_file(path)
        raise
    stream.close()


def _replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    # The new name is on the disk only when its folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def list_files(uri: str) -> list[str]:
    """Names of the files directly in a folder; none if it is not there."""
    return _list_names(uri, pafs.FileType.File)


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly in a folder; none if it is not there."""
    return _list_names(uri, pafs.FileType.Directory)


def _list_names(uri: str, kind: pafs.FileType) -> list[str]:
    filesystem, path = open_filesystem(uri)
    try:
        with storage_errors("list", uri):
            # Not allow_not_found: it takes a missing bucket for an empty one.
            infos = filesystem.get_file_info(pafs.FileSelector(path))
    except FileNotFoundError:
        return []
    return sorted(
        name for info in infos if info.type == kind and _is_name(name := info.base_name, uri)
    )


def _is_name(name: str, uri: str) -> bool:
    """Whether a listed name is one that a file can have: a store may list any key."""
    if name and "\0" not in name and not {".", "..", ""} & set(name.split("/")):
        return True
    logger.warning("%s lists %r, which is no file name; it is left out", uri, name)
    return False


class FileFacts(NamedTuple):
    num_bytes: int
    changed_at_ns: int


def list_tree(uri: str, *, deep: bool = True) -> dict[str, FileFacts]:
    """Size and time of change of each file below a folder, by its path in it; none if there is no
    such folder. Of a file, that of the file, by its name.
    """
    filesystem, path = open_filesystem(uri)
    try:
        with storage_errors("list", uri):
            infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=deep))
    except FileNotFoundError:
        info = _file_info(uri)
        infos = [info] if info.type == pafs.FileType.File else []
        path = path.rpartition("/")[0]
    return {
        name: FileFacts(int(info.size), int(info.mtime_ns or 0))
        for info in infos
        if info.type == pafs.FileType.File
        and _is_name(name := info.path.removeprefix(path).removeprefix("/"), uri)
    }


def delete_file(uri: str) -> None:
    """Delete a file; nothing happens if it is not there."""
    filesystem, path = open_filesystem(uri)
    try:
        with storage_errors("delete", uri):
            filesystem.delete_file(path)
    except FileNotFoundError:
        return


def delete_folder(uri: str) -> None:
    """Delete a folder and all in it; nothing happens if it is not there."""
    filesystem, path = open_filesystem(uri)
    if "/" not in path.strip("/"):
        raise ValueError(f"{absolute(uri)} is a whole bucket or disk; not deleted")
    try:
        with storage_errors("delete", uri):
            filesystem.delete_dir(path)
    except FileNotFoundError:
        return


def copy_files(source: str, target: str) -> int:
    """Copy the files directly in a folder to another place; returns how many."""
    names = list_files(source)
    if not names:
        raise NoShardsError(f"no files in {absolute(source)}")
    for name in names:
        with storage_errors("read", join(source, name)), open_stream(join(source, name)) as stream:
            chunks = iter(partial(stream.read, COPY_BYTES), b"")
            write_chunks(join(target, name), chunks)
    return len(names)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m infra.storage copy FOLDER s3://BUCKET/FOLDER`, either way round."""
    parser = argparse.ArgumentParser(prog="python -m infra.storage", description=main.__doc__)
    parser.add_argument("action", choices=["copy"])
    parser.add_argument("source", help="folder or s3:// prefix")
    parser.add_argument("target", help="folder or s3:// prefix")
    arguments = parser.parse_args(argv)
    try:
        count = copy_files(arguments.source, arguments.target)
    except (StorageError, NoShardsError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 4 if isinstance(error, NoShardsError) else 5
    sys.stderr.write(f"copied {count} files to {absolute(arguments.target)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
