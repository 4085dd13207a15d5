"""Watch all processes and a folder for a password that must not show."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PLANTED = "pl4nted-s3cret"  # a password in the environment, of which nothing may show


@contextmanager
def watched(folder: Path) -> Iterator[set[str]]:
    """Inside, collect the processes and the files in `folder` that show the planted password."""
    found: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(1.0):
            for process in psutil.process_iter(["cmdline"]):
                if PLANTED in " ".join(process.info["cmdline"] or []):
                    found.add(f"process {process.pid}")
            found.update(holders(folder))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        found.update(holders(folder))


def holders(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        with suppress(OSError):  # it may be gone by now
            if file.is_file() and PLANTED.encode() in file.read_bytes():
                yield str(file)
