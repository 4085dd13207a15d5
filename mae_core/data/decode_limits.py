"""Bound what a sample may cost: pixels, bytes, seconds, and memory over all threads.

A file's claims are checked before anything is allocated. What a file does not claim, such as the
inflated size of its chunks, is bounded while it is read piece by piece. All limits except the time
limit depend on the file alone, so a sample is readable or a hole on every machine alike.
"""

import io
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mae_core.data.pixels import CorruptSampleError

MAX_PIXELS = 178_956_970  # Pillow's own limit: a file that claims more is treated as an attack
MAX_PIXEL_BYTES = 2**30  # of one picture with all its channels
MAX_CPU_S = 20.0  # the slowest allowed picture takes 8: CMYK, progressive
IN_FLIGHT_BYTES = 2**31  # memory that all decoders of a process may use together
_SMALL_BYTES = 2**25  # smaller pictures are not counted: even many threads use little for them
_READS_PER_LOOK = 64

# Bytes per value of each TIFF type.
_TYPE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)


def check_size(height: int, width: int, pixel_bytes: int = 1) -> None:
    """Raise a CorruptSampleError if a picture of this size exceeds the limits.

    Args:
        height: In pixels, as the header claims.
        width: In pixels, as the header claims.
        pixel_bytes: Bytes of one pixel with all its channels.
    """
    num_pixels = height * width
    if num_pixels > MAX_PIXELS or num_pixels * pixel_bytes > MAX_PIXEL_BYTES:
        raise CorruptSampleError(
            f"claims {height} x {width} pixels, {num_pixels * pixel_bytes} bytes; at most "
            f"{MAX_PIXELS} pixels and {MAX_PIXEL_BYTES} bytes are decoded",
            "bomb",
        )


class WatchedBytes(io.BytesIO):
    """A file in memory that can't be read after `MAX_CPU_S` of its thread's CPU time.

    Decoders read piece by piece, so this stops one that hangs in a maliciously slow file. It
    counts CPU time, not wall time, because a busy machine must not turn good samples into bad.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._num_reads = 0
        self._end_s = time.thread_time() + MAX_CPU_S

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to `size` bytes.

        Raises:
            CorruptSampleError: The time is over.
        """
        self._num_reads += 1
        # A large piece may stand for much work; small pieces are checked in groups.
        large = size is None or not 0 <= size < 4096
        if (large or self._num_reads % _READS_PER_LOOK == 0) and time.thread_time() > self._end_s:
            raise CorruptSampleError(f"takes more than {MAX_CPU_S:.0f} s to decode", "bomb")
        return super().read(size)


class _Budget:
    """Bytes that threads may hold together; a thread that is alone may hold any number."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    def take(self, num_bytes: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + num_bytes <= self._limit)
            self._held += num_bytes

    def give_back(self, num_bytes: int) -> None:
        with self._changed:
            self._held -= num_bytes
            self._changed.notify_all()


_budget = _Budget(IN_FLIGHT_BYTES)
_per_thread = threading.local()


@contextmanager
def memory_in_flight() -> Iterator[None]:
    """Release at the end of the block the memory that `hold_memory` reserved in it.

    Blocks may be nested; the outermost one releases. End it where the decoded picture is no longer
    needed.
    """
    if getattr(_per_thread, "depth", 0):
        yield
        return
    _per_thread.depth, _per_thread.held = 1, 0
    try:
        yield
    finally:
        _per_thread.depth = 0
        if _per_thread.held:
            _budget.give_back(_per_thread.held)
            _per_thread.held = 0


def hold_memory(num_bytes: int) -> None:
    """Wait until other threads leave room for `num_bytes`, and reserve them.

    Call it inside `memory_in_flight`. A thread that already holds memory releases it first, so
    that two threads never wait for each other.
    """
    if num_bytes <= _SMALL_BYTES:
        return
    if _per_thread.held:
        num_bytes = max(num_bytes, _per_thread.held)
        _budget.give_back(_per_thread.held)
        _per_thread.held = 0
    _budget.take(num_bytes)
    _per_thread.held = num_bytes


def check_tiff_directory(data: bytes) -> None:
    """Raise a CorruptSampleError if the first directory of a TIFF, or of EXIF, is a bomb.

    Readers copy each tag's value, and nothing stops a thousand tags from pointing to the same
    megabyte. In an honest file values do not overlap, so their sum is at most the file's length.
    """
    order = "<" if data[:2] == b"II" else ">"
    try:
        version, at = struct.unpack_from(order + "HI", data, 2)
        count_format, entry = order + "H", struct.Struct(order + "HHI4s")
        if version == 43:  # BigTIFF
            (at,) = struct.unpack_from(order + "Q", data, 8)
            count_format, entry = order + "Q", struct.Struct(order + "HHQ8s")
        (num_tags,) = struct.unpack_from(count_format, data, at)
        at += struct.calcsize(count_format)
        claimed = 0
        for i in range(min(num_tags, (len(data) - at) // entry.size)):
            _, kind, count, inline = entry.unpack_from(data, at + i * entry.size)
            num_bytes = count * (_TYPE_BYTES[kind] if kind < len(_TYPE_BYTES) else 0)
            # A value beyond the end of the file can't be copied.
            if len(inline) < num_bytes <= len(data):
                claimed += num_bytes
    except struct.error:  # truncated: the reader reports it
        return
    if claimed > max(len(data), 2**16):
        raise CorruptSampleError(
            f"its {num_tags} tags claim {claimed} bytes of a file of {len(data)}", "bomb"
        )
