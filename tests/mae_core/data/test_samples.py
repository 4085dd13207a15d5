"""Reading tars: which members count, where each sample lies, and no damage is silent."""

import io
import itertools
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from mae_core.data.samples import (
    MAX_MEMBER_BYTES,
    DataError,
    Sample,
    describe_unused,
    index_shard,
    iter_samples,
    sample_checksums,
    split_name,
)

Members = list[tuple[str, bytes]]
THREE: Members = [
    ("a.cls", b"1"),
    ("a.jpg", b"first"),
    ("b.jpg", b"second" * 200),
    ("c.jpg", b"third"),
    ("c.txt", b"a caption"),
]


class OneWay(io.RawIOBase):
    """A stream like a socket: it cannot seek and returns at most `most` bytes at a time."""

    def __init__(self, data: bytes, most: int) -> None:
        self._data, self._most, self._position = data, most, 0

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        size = self._most if size < 0 else min(size, self._most)
        piece = self._data[self._position : self._position + size]
        self._position += len(piece)
        return piece


def make_tar(members: Members, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data: bytes, most: int | None = None) -> list[Sample]:
    stream = io.BytesIO(data) if most is None else cast(BinaryIO, OneWay(data, most))
    return list(iter_samples(stream, "s.tar"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.JPG", ("a", "jpg")),
        ("./a.jpg", ("a", "jpg")),
        ("a.seg.png", ("a", "seg.png")),
        ("a.SEG.Png", ("a", "seg.png")),
        ("v1.2/a.jpg", ("v1.2/a", "jpg")),  # a dot in a folder's name splits nothing
        ("x/y/a.b.c", ("x/y/a", "b.c")),
        ("Key With Space.jpg", ("Key With Space", "jpg")),
        ("a", None),
        (".a.jpg", None),
        ("x/.a.jpg", None),
        ("__meta__.json", None),
        ("x/__a.jpg", None),
        (".x/a.jpg", (".x/a", "jpg")),
    ],
)
def test_name_is_split_at_the_first_dot_of_its_base(
    name: str, expected: tuple[str, str] | None
) -> None:
    assert split_name(name) == expected


def test_samples_come_in_the_order_of_the_tar_with_all_their_parts() -> None:
    samples = read(make_tar(THREE))
    assert [s.key for s in samples] == ["a", "b", "c"]
    assert samples[0].parts == {"cls": b"1", "jpg": b"first"}
    assert samples[1].parts == {"jpg": b"second" * 200}
    assert samples[2].parts == {"jpg": b"third", "txt": b"a caption"}
    assert samples[2].image == b"third"


def test_offsets_are_those_of_the_headers() -> None:
    # A header and its content take whole blocks of 512 bytes: a 2 x (512 + 512), b 512 + 1536.
    index = index_shard(io.BytesIO(make_tar(THREE)), "s.tar")
    assert index.offsets.tolist() == [0, 2048, 4096, 6144]
    assert index.num_samples == 3
    assert [s.offset for s in read(make_tar(THREE))] == [0, 2048, 4096]


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "Png", "webp", "TIF", "tiff"])
def test_image_extensions_count_in_any_case(extension: str) -> None:
    (sample,) = read(make_tar([(f"a.{extension}", b"bytes")]))
    assert sample.parts == {extension.lower(): b"bytes"}
    assert sample.image == b"bytes"


@pytest.mark.parametrize("extension", ["seg.png", "txt", "gif", "json", "jpg.bak"])
def test_group_without_an_image_is_left_out_and_counted(extension: str) -> None:
    data = make_tar([(f"a.{extension}", b"x"), ("b.jpg", b"y"), (f"c.{extension}", b"z")])
    assert [s.key for s in read(data)] == ["b"]
    index = index_shard(io.BytesIO(data), "s.tar")
    assert (index.num_samples, index.left_out) == (1, {"no_image": 2})
    assert index.offsets.tolist() == [1024, 3072]


def test_folders_links_hidden_files_and_metadata_are_no_samples() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, kind in [("f.jpg", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
        for name in ["._a.jpg", "__index__.json", "noextension", "a.jpg"]:
            tar.addfile(tarfile.TarInfo(name))
    assert [s.key for s in read(buffer.getvalue())] == ["a"]
    assert index_shard(io.BytesIO(buffer.getvalue()), "s.tar").offsets.tolist() == [2560, 3072]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_keep_their_extra_headers(tar_format: int) -> None:
    long = "folder/" + "k" * 300
    members = [
        ("short.jpg", b"0"),
        (f"{long}.jpg", b"1"),
        (f"{long}.cls", b"7"),
        ("Äffin.jpg", b"2"),
    ]
    data = make_tar(members, tar_format)
    offsets = index_shard(io.BytesIO(data), "s.tar").offsets
    assert [s.key for s in read(data)] == ["short", long, "Äffin"]
    for i, key in enumerate(["short", long, "Äffin"]):
        assert [s.key for s in read(data[offsets[i] : offsets[i + 1]])] == [key]


def test_names_that_are_not_utf8_become_keys_that_are() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w:", format=tarfile.USTAR_FORMAT, encoding="latin-1"
    ) as tar:
        tar.addfile(tarfile.TarInfo("caf\xe9/1.jpg"))
        tar.addfile(tarfile.TarInfo("caf\xe8/1.jpg"))
    assert [s.key for s in read(buffer.getvalue())] == ["caf\\xe9/1", "caf\\xe8/1"]


def test_empty_tar_has_no_samples() -> None:
    index = index_shard(io.BytesIO(make_tar([])), "s.tar")
    assert index.offsets.tolist() == [0]
    assert index.num_samples == 0
    assert read(make_tar([])) == []


def test_tar_of_groups_without_images_has_no_samples() -> None:
    index = index_shard(io.BytesIO(make_tar([("a.txt", b"x")])), "s.tar")
    assert (index.offsets.tolist(), index.left_out) == ([0], {"no_image": 1})


def test_members_of_a_key_that_lie_apart_are_an_error() -> None:
    data = make_tar([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")])
    for function in (lambda: read(data), lambda: index_shard(io.BytesIO(data), "s.tar")):
        with pytest.raises(DataError, match=r"s\.tar: key 'a' comes twice, or its members are not"):
            function()


def test_member_that_comes_twice_is_an_error() -> None:
    with pytest.raises(DataError, match=r"s\.tar: a\.jpg comes twice"):
        read(make_tar([("a.jpg", b"1"), ("a.JPG", b"2")]))


@pytest.mark.parametrize("most", [None, 1 << 20, 97])
def test_tar_cut_anywhere_is_an_error_of_the_index(most: int | None) -> None:
    data = make_tar(THREE)
    end = 6144  # the last member ends here; zeros follow
    assert data[end:] == bytes(len(data) - end)
    for size in range(0, end + 512, 256):
        stream = (
            io.BytesIO(data[:size]) if most is None else cast(BinaryIO, OneWay(data[:size], most))
        )
        with pytest.raises(DataError, match=r"s\.tar: "):
            index_shard(stream, "s.tar")
    assert index_shard(io.BytesIO(data[: end + 512]), "s.tar").num_samples == 3


@pytest.mark.parametrize("most", [None, 1 << 20, 97])
def test_tar_cut_inside_a_member_is_an_error_of_the_reader(most: int | None) -> None:
    data = make_tar(THREE)
    between_members = {1024: 0, 2048: 1, 4096: 2, 5120: 3, 6144: 3}  # a slice may end there, too
    for size in range(256, 6144 + 256, 256):
        if size in between_members:
            assert len(read(data[:size], most)) == between_members[size]
        else:
            with pytest.raises(DataError, match=r"s\.tar: "):
                read(data[:size], most)


@pytest.mark.parametrize("most", [None, 1 << 20])
@pytest.mark.parametrize("place", [0, 2048, 4096, 6144])
def test_damaged_header_is_an_error_not_the_end(place: int, most: int | None) -> None:
    data = bytearray(make_tar(THREE))
    data[place + 100] ^= 0x55
    stream = io.BytesIO(bytes(data))
    with pytest.raises(DataError, match=r"s\.tar: "):
        index_shard(stream, "s.tar")
    with pytest.raises(DataError, match=r"s\.tar: "):
        read(bytes(data), most)


@pytest.mark.parametrize(
    "data", [b"", b"not a tar" * 200, b"<html>404</html>", b"\x1f\x8b" + b"z" * 999]
)
def test_what_is_no_tar_is_an_error(data: bytes) -> None:
    for function in (lambda: read(data), lambda: index_shard(io.BytesIO(data), "s.tar")):
        with pytest.raises(DataError, match=r"s\.tar: "):
            function()


def test_of_a_cut_tar_the_samples_before_the_cut_are_taken() -> None:
    data = make_tar(THREE)
    whole = index_shard(io.BytesIO(data), "s.tar")
    assert whole.damage is None
    for size in range(512, len(data) - 512, 512):
        cut = index_shard(io.BytesIO(data[:size]), "s.tar", lenient=True)
        if cut.damage is None:  # only zeros are missing
            assert size >= int(whole.offsets[-1]) + 512
            continue
        num_whole = int((whole.offsets[1:] <= size).sum())
        assert max(0, num_whole - 1) <= cut.num_samples <= num_whole
        assert cut.offsets.tolist() == whole.offsets[: cut.num_samples + 1].tolist()
        assert cut.left_out == {"cut": 1}
        assert "s.tar: " in str(cut.damage)


def test_of_a_key_that_comes_twice_the_first_is_taken() -> None:
    data = make_tar(
        [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.cls", b"4"), ("c.jpg", b"5")]
    )
    index = index_shard(io.BytesIO(data), "s.tar", lenient=True)
    assert (index.num_samples, index.left_out) == (3, {"duplicate_key": 1})
    pieces = [data[a:b] for a, b in itertools.pairwise(index.offsets)]
    first = [next(iter_samples(io.BytesIO(piece), "s.tar")) for piece in pieces]
    assert [(s.key, s.image) for s in first] == [("a", b"1"), ("b", b"2"), ("c", b"5")]


def test_a_member_that_claims_to_be_gigantic_is_refused() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = MAX_MEMBER_BYTES + 1
    data = info.tobuf() + bytes(1024)
    with pytest.raises(DataError, match=r"s\.tar: a\.jpg claims 1073741825 bytes"):
        read(data)


def test_of_a_member_that_comes_twice_the_first_is_taken() -> None:
    data = make_tar([("a.JPG", b"1"), ("a.jpg", b"2"), ("b.jpg", b"3")])
    index = index_shard(io.BytesIO(data), "s.tar", lenient=True)
    assert (index.num_samples, index.left_out) == (2, {"duplicate_key": 1})
    samples = iter_samples(io.BytesIO(data), "s.tar", lenient=True)
    assert [(s.key, s.image) for s in samples] == [("a", b"1"), ("b", b"3")]


def test_pictures_that_are_nobody_s_image_are_counted() -> None:
    names = ["a.jpg", "a.1.jpg", "a.2.JPG", "a.seg.png", "b.jpg", "b.1.jpg", "c.jpg", "c.png"]
    index = index_shard(io.BytesIO(make_tar([(name, b"x") for name in names])), "s.tar")
    assert (index.num_samples, index.left_out) == (3, {"unused_picture": 4})
    assert index.unused == ("1.jpg", "2.jpg", "png")
    dotted = make_tar([(f"IMG.10.{i}.jpg", b"x") for i in range(3)])
    index = index_shard(io.BytesIO(dotted), "s.tar", lenient=True)
    assert index.left_out == {"no_image": 1, "unused_picture": 3}
    assert "extensions .10.0.jpg, .10.1.jpg, .10.2.jpg" in describe_unused(index.unused)


def test_a_sparse_member_is_no_sample() -> None:
    """Write a kilobyte of tar that would expand to a gigabyte of zeros."""
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    size = f"{2**29:011o}\0".encode()
    header[386:410] = b"00000000000\0" * 2  # one piece of nothing
    header[483:495] = size
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    data = bytes(header) + make_tar([("b.jpg", b"1")])
    assert [s.key for s in read(data)] == ["b"]
    assert index_shard(io.BytesIO(data), "s.tar").num_samples == 1


def test_checksums_tell_one_flipped_bit() -> None:
    data = make_tar(THREE)
    offsets = index_shard(io.BytesIO(data), "s.tar").offsets
    before = sample_checksums(data, offsets)
    flipped = bytearray(data)
    flipped[int(offsets[1]) + 700] ^= 1
    changed = before != sample_checksums(bytes(flipped), offsets)
    assert changed.tolist() == [False, True, False]


@st.composite
def tars(draw: st.DrawFn) -> Members:
    keys = draw(st.lists(st.integers(0, 99), min_size=1, max_size=8, unique=True))
    members: Members = []
    for key in keys:
        extensions = draw(st.sets(st.sampled_from(["cls", "jpg", "png", "txt"]), min_size=1))
        extensions -= {"png"} if "jpg" in extensions else set()
        for extension in sorted(extensions):
            members.append((f"k{key}.{extension}", draw(st.binary(max_size=1100))))
    return members


@settings(max_examples=60)
@given(members=tars(), most=st.integers(1, 3000), data=st.data())
def test_a_slice_between_two_offsets_holds_just_those_samples(
    members: Members, most: int, data: st.DataObject
) -> None:
    tar = make_tar(members)
    offsets = index_shard(io.BytesIO(tar), "s.tar").offsets
    whole = read(tar)
    assert len(offsets) == len(whole) + 1
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    if start == stop:
        return
    piece = tar[offsets[start] : offsets[stop]]
    expected = [(s.key, s.parts) for s in whole[start:stop]]
    assert [(s.key, s.parts) for s in read(piece)] == expected
    assert [(s.key, s.parts) for s in read(piece, most)] == expected


@settings(max_examples=60)
@given(members=tars(), most=st.integers(1, 3000))
def test_streams_that_can_and_cannot_seek_give_the_same(members: Members, most: int) -> None:
    tar = make_tar(members)
    seekable = index_shard(io.BytesIO(tar), "s.tar")
    one_way = index_shard(cast(BinaryIO, OneWay(tar, most)), "s.tar")
    assert one_way.offsets.tolist() == seekable.offsets.tolist()
    assert one_way.left_out == seekable.left_out
    assert read(tar, most) == read(tar)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("shard", "num_samples"),
    [
        ("cifar10/test-000000.tar", 3750),
        ("dsb2018_nuclei/val-000000.tar", 46),
        ("bccd/val-000000.tar", 87),
        ("multichannel/sentinel2_8band/test-000000.tar", 196),
    ],
)
def test_real_shard_reads_as_webdataset_reads_it(
    real_data: Path, shard: str, num_samples: int
) -> None:
    path = real_data / shard
    with path.open("rb") as stream:
        groups = group_by_keys(tar_file_expander([{"url": shard, "stream": stream}]))
        theirs = [(g["__key__"], {k: v for k, v in g.items() if k[:2] != "__"}) for g in groups]
    with path.open("rb") as stream:
        ours = [(s.key, s.parts) for s in iter_samples(stream, shard)]
    assert ours == theirs
    with path.open("rb") as stream:
        index = index_shard(stream, shard)
    assert index.num_samples == len(ours) == num_samples
    start, stop = index.offsets[20], index.offsets[23]
    piece = path.read_bytes()[start:stop]
    assert [s.key for s in read(piece)] == [key for key, _ in ours[20:23]]
