"""A written manifest can be read, and text that is not a manifest gives a clear error."""

import hashlib
import io
import json

import numpy as np
import numpy.typing as npt
import pytest
from pydantic import ValidationError

from mae_core.data.manifest import (
    ChannelStats,
    Manifest,
    PixelSums,
    SampleIndex,
    ShardInfo,
    index_from_bytes,
    index_to_bytes,
    parse_manifest,
)
from mae_core.data.samples import DataError


def make_shard(name: str, num_samples: int, num_bytes: int) -> ShardInfo:
    return ShardInfo(
        path=name, index=f"{name}.index.npy", num_samples=num_samples, num_bytes=num_bytes
    )


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        shards=(make_shard("a-000000.tar", 3, 10_240), make_shard("a-000001.tar", 0, 20_480)),
        classes=("cat", "dog"),
        channel_stats=ChannelStats(mean=(0.1, 0.2, 1 / 3), std=(0.4, 0.5, 0.6), num_images=3),
    )


def test_what_is_written_is_read_again(manifest: Manifest) -> None:
    text = manifest.model_dump_json(indent=2).encode()
    assert parse_manifest(text, "m") == manifest


def test_totals_are_those_of_the_shards(manifest: Manifest) -> None:
    assert manifest.num_samples == 3
    assert manifest.num_bytes == 30_720
    assert manifest.counts.tolist() == [3, 0]
    assert manifest.counts.dtype == np.int64


def test_digest_names_the_content_wherever_it_lies(manifest: Manifest) -> None:
    text = b"a-000000.tar 3 10240 None\na-000001.tar 0 20480 None\n"
    assert manifest.digest == hashlib.sha256(text).hexdigest()[:32]
    moved = [
        shard.model_copy(update={"path": f"s3://bucket/x/{shard.path}"})
        for shard in manifest.shards
    ]
    assert manifest.model_copy(update={"shards": tuple(moved)}).digest == manifest.digest


@pytest.mark.parametrize(
    "shards",
    [
        (make_shard("a-000001.tar", 0, 20_480), make_shard("a-000000.tar", 3, 10_240)),
        (make_shard("a-000000.tar", 4, 10_240), make_shard("a-000001.tar", 0, 20_480)),
        (make_shard("a-000000.tar", 3, 10_240),),
        (make_shard("b-000000.tar", 3, 10_240), make_shard("a-000001.tar", 0, 20_480)),
    ],
)
def test_other_shards_have_another_digest(
    manifest: Manifest, shards: tuple[ShardInfo, ...]
) -> None:
    assert Manifest(shards=shards).digest != manifest.digest


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b"", "Invalid JSON"),
        (b"{", "Invalid JSON"),
        (b'{"shards": [], "versoin": 1}', "versoin"),
        (b'{"version": 2, "shards": []}', "version"),
        (b"{}", "shards"),
        (b'{"shards": [{"path": "a.tar"}]}', r"shards\.0\.index"),
        (
            b'{"shards": [{"path":"a","index":"b","num_samples":-1,"num_bytes":1}]}',
            r"shards\.0\.num_samples",
        ),
    ],
)
def test_what_is_no_manifest_is_an_error_in_words(text: bytes, place: str) -> None:
    with pytest.raises(DataError, match=rf"^s3://b/manifest\.json: not a manifest .*{place}"):
        parse_manifest(text, "s3://b/manifest.json")


def test_channel_statistics_are_exact() -> None:
    # Pixels 0, 255 in one channel, and 51, 51 in the other: 51 / 255 = 0.2.
    pixels = np.asarray([[[0, 51], [255, 51]]], np.uint8)
    sums = PixelSums.of(pixels)
    assert sums == PixelSums.of(pixels * np.uint16(257))
    stats = (sums + PixelSums.of(pixels)).channel_stats()
    assert stats == ChannelStats(mean=(0.5, 0.2), std=(0.5, 1e-6), num_images=2)


def test_channel_statistics_keep_their_digits_over_a_billion_pixels() -> None:
    # Half of the pixels 254, half 255: floats of 32 bits would give a deviation of 0 or NaN.
    n = 10**12
    values = 254 * 257, 255 * 257
    sums = PixelSums(
        sums=(sum(values) * n,),
        squares=(sum(v * v for v in values) * n,),
        num_pixels=2 * n,
        num_images=1,
    )
    stats = sums.channel_stats()
    assert stats is not None
    assert stats.std == pytest.approx((0.5 / 255,), rel=1e-12)


def test_no_pixels_have_no_statistics() -> None:
    assert PixelSums.none(1).channel_stats() is None


def test_manifest_can_not_be_changed(manifest: Manifest) -> None:
    with pytest.raises(ValidationError):
        manifest.shards = ()  # type: ignore[misc]


def to_bytes(rows: npt.NDArray[np.int64]) -> bytes:
    return index_to_bytes(SampleIndex(rows, None))


@pytest.mark.parametrize("offsets", [[0], [0, 512, 2048], [1024, 2**40]])
def test_offsets_are_read_as_they_were_written(offsets: list[int]) -> None:
    array = np.asarray(offsets, dtype=np.int64)
    index = index_from_bytes(index_to_bytes(SampleIndex(array, None)), "i")
    assert index.offsets.tolist() == offsets
    assert index.checksums is None
    checksums = np.arange(len(offsets) - 1) + 2**31
    index = index_from_bytes(index_to_bytes(SampleIndex(array, checksums)), "i")
    assert index.offsets.tolist() == offsets
    assert index.checksums is not None
    assert index.checksums.tolist() == checksums.tolist()


def test_offsets_of_one_list_are_always_the_same_bytes() -> None:
    data = to_bytes(np.asarray([0, 512], dtype=np.int64))
    assert len(data) == 128 + 16
    assert data[-16:] == b"\x00" * 9 + b"\x02" + b"\x00" * 6


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk" * 50,
        to_bytes(np.asarray([0, 512, 1024], dtype=np.int64))[:-3],
        to_bytes(np.asarray([0.0, 512.0])),  # type: ignore[arg-type]
        to_bytes(np.asarray([[0, 512]], dtype=np.int64)),
        to_bytes(np.zeros((2, 2, 2), dtype=np.int64)),
        to_bytes(np.asarray([0, 512, 512], dtype=np.int64)),
        to_bytes(np.asarray([512, 0], dtype=np.int64)),
    ],
)
def test_what_is_no_index_is_an_error_in_words(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^x\.npy: .*; index the shards again"):
        index_from_bytes(data, "x.npy")


def test_index_does_not_run_code() -> None:
    data = to_bytes(np.asarray([0, 512], dtype=np.int64))
    pickled = data.replace(b"'<i8'", b"'|O' ")
    with pytest.raises(DataError, match="not a sample index"):
        index_from_bytes(pickled, "x.npy")


def test_a_flipped_bit_of_an_index_with_checksums_is_seen() -> None:
    offsets = np.asarray([0, 512, 2048], dtype=np.int64)
    data = bytearray(index_to_bytes(SampleIndex(offsets, np.asarray([7, 8]))))
    for place in range(128, len(data)):
        data[place] ^= 1
        with pytest.raises(DataError, match=r"^x\.npy: "):
            index_from_bytes(bytes(data), "x.npy")
        data[place] ^= 1


@pytest.mark.parametrize("key", ["path", "index"])
@pytest.mark.parametrize("name", ["../../etc/passwd", "a/../b", "", "a\0b"])
def test_a_name_that_leads_out_of_the_folder_is_refused(key: str, name: str) -> None:
    names = {"path": "0.tar", "index": "0.tar.index.npy", key: name}
    text = json.dumps({"shards": [{**names, "num_samples": 1, "num_bytes": 512}]}).encode()
    with pytest.raises(
        DataError, match=f"set/manifest.json: .*shards.0.{key}: .*not a file name inside"
    ):
        parse_manifest(text, "set/manifest.json")


def test_an_index_that_begins_before_the_shard_is_refused() -> None:
    data = index_to_bytes(SampleIndex(np.array([-512, 0, 512]), None))
    with pytest.raises(DataError, match="not a rising list of offsets"):
        index_from_bytes(data, "x.npy")


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1, 3), (2, 2, 2)])
def test_an_index_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(shape, dtype=np.int64))
    with pytest.raises(DataError, match="not a rising list of offsets"):
        index_from_bytes(buffer.getvalue(), "x.npy")
