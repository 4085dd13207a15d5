"""Read and write files by URI: a local path and s3://bucket/key behave alike.

Paths are absolute or relative local paths, or s3://. Listings are sorted by name. For S3 the
endpoint and keys come from AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, if set,
AWS_SESSION_TOKEN and AWS_REGION. Transient errors are retried: reads for 30 to 60 s, everything
else including `open_random` for 3 s.

Errors:
    FileNotFoundError    a file to read does not exist
    NoShardsError        a shard specification names something that does not exist
    StorageError         the store itself: unreachable, keys refused, no such bucket, disk full
"""

import argparse
import errno
import io
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
# 8 * READ_TIMEOUT_S. AwsStandardS3RetryStrategy is not used: pyarrow never restores its quota, so a
# client stops retrying for good after 100 retries (measured on 25.0.1: with 30 % of the connections
# reset, 89 of 1,500 reads failed, the first after 557; with this strategy 0).
MAX_RETRIES = 7
CONNECT_TIMEOUT_S = 3
READ_TIMEOUT_S = 10

# Without a buffer, each smaller read of a stream would be a request.
STREAM_BUFFER_BYTES = 8 * 2**20
COPY_BYTES = 8 * 2**20
TELL_EVERY_S = 4.0


# Disk errors that the same write would hit again, and what to do about them.
DISK_ERRORS = {
    errno.ENOSPC: "the disk is full ({}). Make room, or choose another {}",
    errno.EDQUOT: "the disk quota is used up ({}). Make room, or choose another {}",
    errno.EROFS: "the disk is read-only ({}). Mount it for writing, or choose another {}",
    errno.EACCES: "access is denied ({}). Change the rights, or choose another {}",
    errno.EPERM: "access is denied ({}). Change the rights, or choose another {}",
}


class StorageError(RuntimeError):
    """The store cannot be used; the message says what failed, where, and what to try."""

    def __init__(self, message: str, *, is_lasting: bool = False) -> None:
        super().__init__(message)
        self.is_lasting = is_lasting
        """Whether the same request would fail again."""


class NoShardsError(RuntimeError):
    """A shard specification matches nothing, or names a shard that does not exist."""


def is_remote(uri: str) -> bool:
    return uri.startswith(S3_SCHEME)


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute(uri: str) -> str:
    """Return the canonical spelling: absolute, without empty parts or a slash at the end.

    Raises:
        ValueError: The scheme is not s3://, or there is no bucket.
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
    # Not Path.resolve, which would replace a linked shard's name with its target's.
    return os.path.normpath(Path(uri).expanduser().absolute())


def open_filesystem(uri: str, max_retries: int = MAX_RETRIES) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem that holds `uri`, cached per process, and the path inside it."""
    place = absolute(uri)
    if not is_remote(place):
        return _local_filesystem(), place
    variables = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    settings = [os.environ.get(name) or None for name in (*variables, "AWS_SESSION_TOKEN")]
    # Given a region, pyarrow does not ask the network for the bucket's.
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
    # Without both keys, pyarrow looks for a profile or an instance role.
    keys = {"access_key": access_key, "secret_key": secret_key, "session_token": session_token}
    return pafs.S3FileSystem(
        **(keys if access_key and secret_key else {}),
        endpoint_override=endpoint,
        region=region,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=max_retries),
        allow_delayed_open=True,  # a small object is then one PUT, not a multipart upload
    )


@contextmanager
def storage_errors(action: str, uri: str, local: Path | None = None) -> Iterator[None]:
    """Convert errors of pyarrow and the system in the block to a StorageError that names `uri`.

    Also use it around reads from `open_stream` or `open_random`, which fail later than the call
    that opened them.

    Args:
        action: A verb, for the message.
        uri: The file.
        local: The local file that is being written, if there is one.

    Raises:
        FileNotFoundError: Unchanged, unless the bucket itself does not exist.
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
    """Return the StorageError for a full, read-only or inaccessible disk; None for other errors.

    Args:
        action: What was tried and where, such as "write runs/run.json".
        error: The system's error.
        local: The file in a temporary folder that was being written, if it was one.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number not in DISK_ERRORS:
        return None
    where = "" if local is None else f" to {local}"
    setting = "storage.root" if local is None else "temporary folder (TMPDIR)"
    reason = DISK_ERRORS[number].format(error, setting)
    return StorageError(f"cannot {action}{where}: {reason}", is_lasting=True)


def _check_bucket(uri: str) -> None:
    """Raise a StorageError for a missing bucket or refused keys, which look like a 404 as well."""
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
        # The answer to a HEAD has no body with the reason; the answer to a listing has one.
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
    """Return whether a file or a folder exists."""
    return _file_info(uri).type != pafs.FileType.NotFound


def is_file(uri: str) -> bool:
    return bool(_file_info(uri).type == pafs.FileType.File)


def file_size(uri: str) -> int:
    """Return the size in bytes.

    Raises:
        FileNotFoundError: There is no such file, or it is a folder.
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
    """Read the bytes [start, stop), or fewer if the file ends before `stop`."""
    with storage_errors("read", uri):
        return _read(uri, start, stop)


def _read(uri: str, start: int, stop: int | None) -> bytes:
    with _open_patiently(uri) as file:
        size = file.size()
        length = max(0, min(size if stop is None else stop, size) - start)
        if not is_remote(uri):
            return file.read_at(length, start)  # avoids the copy below
        buffer = bytearray(length)
        fill_patiently(uri, file, start, memoryview(buffer))
    return bytes(buffer)


def _open_patiently(uri: str) -> Any:
    filesystem, path = open_filesystem(uri, max_retries=0)
    return patiently(uri, lambda: filesystem.open_input_file(path))


def open_stream(uri: str) -> BinaryIO:
    """Open a file to read once from its start, as tarfile's mode "r|" does."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("open", uri):
        if is_remote(uri):
            return io.BufferedReader(ObjectStream(uri, _open_patiently(uri)), STREAM_BUFFER_BYTES)
        return filesystem.open_input_stream(path, compression=None)


def open_random(uri: str) -> BinaryIO:
    """Open a seekable file; on S3 each read is one request."""
    filesystem, path = open_filesystem(uri)
    with storage_errors("open", uri):
        return filesystem.open_input_file(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file; a reader sees the old content or the new, never a part.

    In text files, recognised by name (records, tables, pages), secrets are redacted.
    """
    write_chunks(uri, [redact_bytes(data) if uri.endswith(TEXT_SUFFIXES) else data])


def write_chunks(uri: str, chunks: Iterable[bytes]) -> None:
    """Write a file like `write_bytes`, from content that comes in pieces."""
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
        # pyarrow cannot abort an upload: closing it makes an object of what was sent so far.
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
    # The new name is safely on disk only after its folder is synced.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def list_files(uri: str) -> list[str]:
    """List the names of the files directly in a folder; empty if it does not exist."""
    return _list_names(uri, pafs.FileType.File)


def list_folders(uri: str) -> list[str]:
    """List the names of the folders directly in a folder; empty if it does not exist."""
    return _list_names(uri, pafs.FileType.Directory)


def _list_names(uri: str, kind: pafs.FileType) -> list[str]:
    filesystem, path = open_filesystem(uri)
    try:
        with storage_errors("list", uri):
            # Not allow_not_found, which treats a missing bucket as an empty one.
            infos = filesystem.get_file_info(pafs.FileSelector(path))
    except FileNotFoundError:
        return []
    return sorted(
        name for info in infos if info.type == kind and _is_name(name := info.base_name, uri)
    )


def _is_name(name: str, uri: str) -> bool:
    """Return whether a listed name is a valid file name: a store may list any key."""
    if name and "\0" not in name and not {".", "..", ""} & set(name.split("/")):
        return True
    logger.warning("%s lists %r, which is not a file name; it is left out", uri, name)
    return False


class FileFacts(NamedTuple):
    num_bytes: int
    changed_at_ns: int


def list_tree(uri: str, *, deep: bool = True) -> dict[str, FileFacts]:
    """Return size and time of change of each file below a folder, by its path in the folder.

    The result is empty if there is no such folder. For a file, it has that file under its name.
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
    """Delete a file; do nothing if it does not exist."""
    filesystem, path = open_filesystem(uri)
    try:
        with storage_errors("delete", uri):
            filesystem.delete_file(path)
    except FileNotFoundError:
        return


def delete_folder(uri: str) -> None:
    """Delete a folder and all its contents; do nothing if it does not exist."""
    filesystem, path = open_filesystem(uri)
    if "/" not in path.strip("/"):
        raise ValueError(f"{absolute(uri)} is a whole bucket or disk; not deleted")
    try:
        with storage_errors("delete", uri):
            filesystem.delete_dir(path)
    except FileNotFoundError:
        return


def copy_files(source: str, target: str, tell: Callable[[str], object] = lambda _line: None) -> int:
    """Copy the files directly in a folder to another place; return their number.

    `tell` is called every few seconds with how far the copy is.
    """
    names = list_files(source)
    if not names:
        raise NoShardsError(f"no files in {absolute(source)}")
    num_bytes, told_s = 0, time.monotonic()

    def read(stream: BinaryIO, number: int) -> Iterator[bytes]:
        nonlocal num_bytes, told_s
        while chunk := stream.read(COPY_BYTES):
            yield chunk
            num_bytes += len(chunk)
            if time.monotonic() - told_s >= TELL_EVERY_S:
                told_s = time.monotonic()
                tell(f"copying file {number} of {len(names)}, {num_bytes / 1e6:.0f} MB so far")

    for number, name in enumerate(names, 1):
        with storage_errors("read", join(source, name)), open_stream(join(source, name)) as stream:
            write_chunks(join(target, name), read(stream, number))
    return len(names)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m infra.storage copy FOLDER s3://BUCKET/FOLDER`, in either direction."""
    parser = argparse.ArgumentParser(prog="python -m infra.storage", description=main.__doc__)
    parser.add_argument("action", choices=["copy"])
    parser.add_argument("source", help="folder or s3:// prefix; folders in it are not copied")
    parser.add_argument("target", help="folder or s3:// prefix")
    arguments = parser.parse_args(argv)
    tell = partial(print, file=sys.stderr, flush=True)
    try:
        count = copy_files(arguments.source, arguments.target, tell)
        left_out = list_folders(arguments.source)
    except (StorageError, NoShardsError) as error:
        tell(f"error: {error}")
        return 4 if isinstance(error, NoShardsError) else 5
    tell(f"copied {count} files to {absolute(arguments.target)}")
    if left_out:
        tell(f"not copied, because they are folders: {', '.join(left_out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
