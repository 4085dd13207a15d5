"""Read the members of a tar safely, whatever the file contains.

The standard library's tarfile reads the same formats, but it follows extension headers by
recursion, allocates what they claim, searches them with patterns whose time grows with the square
of the length, and takes a damaged header for the end of the tar. Here each step is bounded, and a
fault raises an error with its byte position.

Source: POSIX.1-2024, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual,
"Basic Tar Format".
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK_BYTES = tarfile.BLOCKSIZE
_READ_BYTES = 2**20
_MAX_EXTENSION_BYTES = 2**20  # of one header: names have a few thousand bytes at most
_MAX_EXTENSIONS = 16  # of one member; writers use up to three
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"(\xb5/\xfd", "zstd"),
)


class TarDamageError(ValueError):
    """A tar ends early or has invalid content; the message says what and at which byte."""


class Member(NamedTuple):
    name: str
    size: int
    is_file: bool  # False for folders, links, devices and sparse files
    offset: int  # of its first header


class TarReader:
    """Reads the headers of a tar or of a slice that begins with one, and contents on demand.

    Args:
        stream: Need not be seekable.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._can_seek = stream.seekable()
        self._ahead = bytearray()  # read from an unseekable stream before it was needed
        self._start = self._size = 0
        if self._can_seek:
            self._start = stream.tell()
            self._size = stream.seek(0, 2) - self._start
            stream.seek(self._start)
        self._block = b""  # the last header
        self._unread = 0  # bytes left of the member, including the padding of its last block
        self._content_size = 0
        self.position = 0
        self.has_end_marker = False

    def __iter__(self) -> Iterator[Member]:
        """Yield each member up to the end marker, or to the end of the bytes.

        Raises:
            TarDamageError: The tar contains something else.
        """
        while (header := self._next_header()) is not None:
            yield self._member(header)

    def content(self) -> bytes:
        """Read the bytes of the member that was yielded last.

        Raises:
            TarDamageError: The tar ends before the member does.
        """
        data = self._read(self._content_size)
        self._unread -= len(data)
        if len(data) < self._content_size:
            raise self._damage("it ends within a member")
        self._content_size = 0
        return data

    def _damage(self, what: str) -> TarDamageError:
        return TarDamageError(f"{what}, at byte {self.position}")

    def _next_header(self) -> tarfile.TarInfo | None:
        self._skip(self._unread)
        self._unread = 0
        at = self.position
        block = self._block = self._read(BLOCK_BYTES)
        if not block and at > 0:
            return None
        if len(block) == BLOCK_BYTES and not block.strip(b"\0"):
            self.position = at
            self.has_end_marker = True
            return None
        if len(block) < BLOCK_BYTES:
            raise self._damage("it ends within a header" if block else "it is empty")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            for magic, method in _COMPRESSED:
                if at == 0 and block.startswith(magic):
                    raise TarDamageError(
                        f"it is compressed by {method}; unpack it first"
                    ) from error
            raise TarDamageError(f"{error}, at byte {at}") from error
        if not 0 <= header.size < 2**63:
            raise self._damage(f"a header claims {header.size} bytes")
        header.offset = at
        return header

    def _member(self, header: tarfile.TarInfo | None) -> Member:
        """Build the member that a header begins, including its extension headers."""
        told: dict[str, bytes] = {}
        first: int | None = None
        for _ in range(_MAX_EXTENSIONS + 1):
            if header is None:
                raise self._damage("it ends after an extension header")
            kind = header.type
            if kind == tarfile.XGLTYPE:
                self._extension(header)  # global attributes are not needed
            elif kind in (*_PAX, _LONG_NAME, _LONG_LINK):
                first = header.offset if first is None else first
                data = self._extension(header)
                if kind in _PAX:
                    told = {**self._pax_records(data), **told}
                elif kind == _LONG_NAME:
                    told = {"path": data.partition(b"\0")[0], **told}
            else:
                return self._plain_member(header, told, header.offset if first is None else first)
            header = self._next_header()
        raise self._damage(f"it has more than {_MAX_EXTENSIONS} extension headers in a row")

    def _plain_member(self, header: tarfile.TarInfo, told: dict[str, bytes], offset: int) -> Member:
        name, size = header.name, header.size
        if "path" in told:
            name = told["path"].decode("utf-8", "surrogateescape").rstrip("/")
        if "size" in told:
            if not told["size"].isdigit() or len(told["size"]) > 18:
                raise self._damage(f"a header claims {told['size'][:40]!r} bytes")
            size = int(told["size"])
        if header.type == tarfile.GNUTYPE_SPARSE:
            self._skip_sparse_map()
        has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        self._content_size = size if has_data else 0
        self._unread = -(-self._content_size // BLOCK_BYTES) * BLOCK_BYTES
        is_file = header.type in _FILES and not any(key.startswith("GNU.sparse") for key in told)
        return Member(name, size, is_file, offset)

    def _extension(self, header: tarfile.TarInfo) -> bytes:
        if header.size > _MAX_EXTENSION_BYTES:
            raise self._damage(f"an extension header claims {header.size} bytes")
        self._content_size = header.size
        self._unread = -(-header.size // BLOCK_BYTES) * BLOCK_BYTES
        return self.content()

    def _pax_records(self, data: bytes) -> dict[str, bytes]:
        """Parse the records of a pax header, each `length key=value` and a newline."""
        records: dict[str, bytes] = {}
        at = 0
        while at < len(data) and data[at] != 0:
            space = data.find(b" ", at, at + 9)
            length = int(data[at:space]) if space > at and data[at:space].isdigit() else 0
            end = at + length
            if end <= space or end > len(data) or data[end - 1 : end] != b"\n":
                raise self._damage("a pax header is broken")
            key, _, value = data[space + 1 : end - 1].partition(b"=")
            records[key.decode("utf-8", "replace")] = value
            at = end
        return records

    def _skip_sparse_map(self) -> None:
        """Skip the blocks that list the pieces of a sparse file."""
        goes_on = self._block[482:483]
        while goes_on.strip(b"\0"):
            goes_on = self._read(BLOCK_BYTES)[504:505]

    def _read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end of the tar."""
        if self._can_seek:
            # Never ask for more than there is, because some streams allocate what they are asked.
            data = self._stream.read(min(size, max(0, self._size - self.position)))
        else:
            while len(self._ahead) < size:
                piece = self._stream.read(_READ_BYTES)
                if not piece:
                    break
                self._ahead += piece
            data = bytes(self._ahead[:size])
            del self._ahead[:size]
        self.position += len(data)
        return data

    def _skip(self, size: int) -> None:
        if self._can_seek:
            if self.position + size > self._size:
                raise self._damage("it ends within a member")
            self.position += size
            if size:
                self._stream.seek(self._start + self.position)
            return
        while size > 0:
            data = self._read(min(size, _READ_BYTES))
            size -= len(data)
            if not data:
                raise self._damage("it ends within a member")
