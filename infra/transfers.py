"""Copy whole folders between this machine and the store."""

import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from infra import storage
from infra.file_names import path_below


class WrongSizeError(ValueError):
    """A file's size differs from its manifest."""


def upload_folder(
    local: Path, uri: str, *, last: str, before_last: Callable[[], None] = lambda: None
) -> None:
    """Copy a folder, with the file named `last` after all others: its presence means "complete".

    A `last` that already exists at `uri` is removed first, so that it never marks a mixture as
    complete. `before_last` is called before it is written; if that raises, it is not written.
    """
    files = sorted(file for file in local.rglob("*") if file.is_file())
    marker = local / last
    if marker not in files:
        raise FileNotFoundError(errno.ENOENT, f"{local} has no {last!r} to write last")
    storage.delete_file(storage.join(uri, last))
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


def download_files(uri: str, sizes: Mapping[str, int], local: Path) -> None:
    """Copy the named files of a folder, and no others, to a local one.

    Args:
        uri: The folder.
        sizes: Bytes of each file, by its path in the folder. They come from a manifest: a file of
            another size is refused before it is fetched.
        local: The folder that no file may leave.

    Raises:
        FileNotFoundError: A file does not exist.
        UnsafeNameError: A name leads out of the folder.
        WrongSizeError: A file has another size.
        StorageError: The store cannot be used, or a file was received incompletely.
    """
    targets = {name: path_below(local, name, uri) for name in sizes}
    for name, target in targets.items():
        place = storage.join(uri, name)
        if (found := storage.file_size(place)) != sizes[name]:
            raise WrongSizeError(f"{place}: has {found} bytes, not {sizes[name]}")
        with storage.storage_errors("download", place, target):
            target.parent.mkdir(parents=True, exist_ok=True)
            # "x" refuses to write through a file or link that already exists.
            with storage.open_stream(place) as source, target.open("xb") as file:
                shutil.copyfileobj(source, file, storage.COPY_BYTES)
            if target.stat().st_size != found:
                raise storage.StorageError(
                    f"cannot download {place}: got {target.stat().st_size} of {found} bytes."
                    " Try again"
                )
