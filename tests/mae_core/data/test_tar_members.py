"""Tars written by tarfile are read as tarfile reads them; anything else is damage."""

import io
import tarfile
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mae_core.data.samples import DataError, index_shard, iter_samples
from mae_core.data.tar_members import TarDamageError, TarReader


class OneWay(io.RawIOBase):
    """A stream that can't seek."""

    def __init__(self, data: bytes) -> None:
        self._inner = io.BytesIO(data)

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        return self._inner.read(min(size, 700))


def header(name: str, kind: bytes, size: int, tar_format: int = tarfile.GNU_FORMAT) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tar_format)


def extension(kind: bytes, content: bytes) -> bytes:
    return header("x", kind, len(content)) + content + bytes(-len(content) % 512)


PICTURE = header("a.jpg", tarfile.REGTYPE, 3) + b"abc" + bytes(509)
END = bytes(1024)


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@settings(max_examples=25)
@given(st.lists(st.tuples(st.text("abé/.", min_size=1, max_size=90), st.integers(0, 1500))))
def test_members_are_those_that_tarfile_reads(
    tar_format: int, members: list[tuple[str, int]]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tar_format) as tar:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    data = buffer.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        theirs = [(info.name, info.size, info.isreg(), info.offset) for info in tar]
    assert [tuple(member) for member in TarReader(io.BytesIO(data))] == theirs


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            extension(tarfile.GNUTYPE_LONGNAME, b"n") * 5000 + PICTURE + END,
            "more than 16 extension",
        ),
        (
            extension(tarfile.XHDTYPE, b"9 a=bcde\n") * 5000 + PICTURE + END,
            "more than 16 extension",
        ),
        (header("x", tarfile.XHDTYPE, 2**40) + PICTURE + END, "claims 1099511627776 bytes"),
        (header("x", tarfile.GNUTYPE_LONGNAME, 2**21) + PICTURE + END, "claims 2097152 bytes"),
        (extension(tarfile.XHDTYPE, b"1" * 900_000) + PICTURE + END, "a pax header is broken"),
        (extension(tarfile.XHDTYPE, b"99 path=a\n") + PICTURE + END, "a pax header is broken"),
        (extension(tarfile.XHDTYPE, b"11 size=-9\n") + PICTURE + END, "claims b'-9' bytes"),
        (extension(tarfile.XHDTYPE, b"9 a=bcde\n"), "ends after an extension header"),
        (header("a.jpg", tarfile.REGTYPE, 2**62) + END, "ends within a member"),
        (PICTURE[:900], "ends within a member"),
        (PICTURE + b"not a header" * 50, "at byte 1024"),
        (b"\x1f\x8b" + bytes(2000), "compressed by gzip; unpack it first"),
        (b"", "it is empty"),
    ],
    ids=range(13),
)
def test_what_no_tar_holds_is_damage(data: bytes, told: str) -> None:
    for stream in (io.BytesIO(data), OneWay(data)):
        with pytest.raises(TarDamageError, match=told):
            list(TarReader(stream))  # type: ignore[arg-type]


def test_damage_names_the_tar_and_keeps_what_comes_before_it() -> None:
    chained = extension(tarfile.GNUTYPE_LONGNAME, b"n") * 5000
    others = header("b.jpg", tarfile.REGTYPE, 0) + header("c.jpg", tarfile.REGTYPE, 0)
    data = PICTURE + others + chained + PICTURE + END
    index = index_shard(io.BytesIO(data), "s.tar", lenient=True)
    assert index.offsets.tolist() == [0, 1024]  # of the last one before it members may be missing
    assert index.left_out == {"cut": 1}
    assert str(index.damage).startswith("s.tar: not a whole tar file (it has more than 16 ext")


def test_a_pax_header_names_and_measures_its_member() -> None:
    name = b"folder/" + b"k" * 200 + b".jpg"
    record = b"%d path=%s\n" % (len(name) + 10, name)
    plain = header("short", tarfile.REGTYPE, 0) + b"abc" + bytes(509)
    reader = TarReader(io.BytesIO(extension(tarfile.XHDTYPE, record + b"9 size=3\n") + plain + END))
    (member,) = ((member, reader.content()) for member in reader)
    assert member[0].name == name.decode()
    assert member[1] == b"abc"


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=12)), max_size=6),
    st.booleans(),
)
def test_whatever_a_tar_holds_it_is_read_or_damaged(
    changes: list[tuple[int, bytes]], repair: bool
) -> None:
    pax = extension(tarfile.XHDTYPE, b"16 path=b/c.jpg\n")
    data = bytearray(PICTURE + pax + PICTURE + extension(b"L", b"d.seg.png\0") + PICTURE + END)
    for at, harm in changes:
        data[at : at + len(harm)] = harm
    if repair:  # checksums, so that the rest of a header is looked at
        for at in range(0, len(data) - 511, 512):
            if data[at + 257 : at + 262] == b"ustar":
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    reads: tuple[Callable[[], object], ...] = (
        lambda: index_shard(io.BytesIO(data), "s.tar", lenient=True),
        lambda: list(iter_samples(io.BytesIO(data), "s.tar", lenient=True)),
        lambda: list(iter_samples(OneWay(bytes(data)), "s.tar")),  # type: ignore[arg-type]
    )
    for read in reads:
        with suppress(DataError):
            read()
