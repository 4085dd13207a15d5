"""Copy whole folders between this machine and the store."""

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from pyarrow import fs as pafs

from infra import storage


def upload_folder(
    local: Path, uri: str, *, last: str, before_last: Callable[[], None] = lambda: None
) -> None:
    """Copy a folder, the file named `last` after all others: its presence says "complete".

    A `last` that is already at `uri` is removed first, so that it never vouches for a mixture.
    `before_last` is called before it is written; if that raises, it is not.
    """
    files = sorted(file for file in local.rglob("*") if file.is_file())
    marker = local / last
    if marker not in files:
        raise FileNotFoundError(errno.ENOENT, f"{local} has no {last!r} to write last")
    if storage.exists(storage.join(uri, last)):
        filesystem, path = storage.open_filesystem(storage.join(uri, last))
        with storage.storage_errors("delete", storage.join(uri, last)):
            filesystem.delete_file(path)
    for file in [*(file for file in files if file != marker), marker]:
        if file == marker:
            before_last()
        storage.write_chunks(
            storage.join(uri, file.relative_to(local).as_posix()), _read_chunks(file)
        )


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(storage.COPY_BYTES):
            yield chunk


def download_folder(uri: str, local: Path) -> None:
    """Copy a folder with all its subfolders to a local one.

    Raises:
        FileNotFoundError: the folder is not there.
        StorageError: also when a file came out shorter than it was listed.
    """
    filesystem, path = storage.open_filesystem(uri)
    with storage.storage_errors("download", uri):
        for info in filesystem.get_file_info(pafs.FileSelector(path, recursive=True)):
            if info.type != pafs.FileType.File:
                continue
            name = Path(info.path).relative_to(path).as_posix()
            target = local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with storage.open_stream(storage.join(uri, name)) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, storage.COPY_BYTES)
            if target.stat().st_size != info.size:
                raise storage.StorageError(
                    f"cannot download {storage.join(uri, name)}:"
                    f" got {target.stat().st_size} of {info.size} bytes. Try again"
                )
