"""Opening shard sets, and reading ranges of their samples."""

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra import storage
from mae_core.data.manifest import Manifest, index_from_bytes
from mae_core.data.samples import DataError, Sample, iter_samples
from mae_core.data.views import ViewSpec
from pipelines import prepare
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import ConfigError
from pipelines.reading import manifests as shard_manifests
from pipelines.reading import shards
from pipelines.reading.sequence import (
    read_window,
)
from pipelines.reading.shards import (
    BrokenSample,
    ChangedDataError,
    measure_channel_stats,
    open_shards,
    read_rows,
    read_samples,
)
from pipelines.training.knn import needed_label
from tests.pipelines.shard_sets import make_plan

SPEC = ViewSpec(seed=3, in_chans=3, size=(16, 16), crop_scale=(0.2, 1.0), flip=True)


@pytest.fixture(autouse=True)
def _forget_indexes() -> None:
    shards._index.cache_clear()


def open_foreign(folder: Path) -> Manifest:
    return open_shards(str(folder), str(folder.parent / "cache"))


def test_foreign_tars_are_indexed(foreign: Path) -> None:
    manifest = open_foreign(foreign)
    assert [Path(s.path).name for s in manifest.shards] == [
        "part-0.tar",
        "part-1.tar",
        "part-2.tar",
    ]
    assert [s.num_samples for s in manifest.shards] == [5, 3, 8]
    assert [s.num_bytes for s in manifest.shards] == [
        (foreign / f"part-{i}.tar").stat().st_size for i in range(3)
    ]


def test_foreign_tars_are_read_once(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = storage.open_random

    def open_random(uri: str) -> Any:
        opened.append(uri)
        return original(uri)

    monkeypatch.setattr(storage, "open_random", open_random)
    first = open_foreign(foreign)
    assert len([uri for uri in opened if uri.endswith(".tar")]) == 3
    opened.clear()
    assert open_foreign(foreign) == first
    assert [uri for uri in opened if uri.endswith(".tar")] == []


def test_a_changed_foreign_tar_is_indexed_again(
    foreign: Path, write_tar: Callable[..., Path], make_png: Callable[[int], bytes]
) -> None:
    before = open_foreign(foreign)
    write_tar(foreign / "part-1.tar", {f"{i}.png": make_png(i) for i in range(9)})
    after = open_foreign(foreign)
    assert [s.num_samples for s in after.shards] == [5, 9, 8]
    assert after.digest != before.digest
    assert len(read_rows(after.shards[1], 0, 9)) == 9


def test_a_foreign_tar_that_changed_without_a_change_of_its_size_is_indexed_again(
    foreign: Path, write_tar: Callable[..., Path]
) -> None:
    members = {"0.png": b"a" * 100, "1.png": b"b" * 2000}
    tar = write_tar(foreign / "part-1.tar", members)
    before = open_foreign(foreign).shards[1]
    assert [row.image[:1] for row in read_rows(before, 0, 2)] == [b"a", b"b"]
    write_tar(tar, dict(reversed(members.items())))
    os.utime(tar, (1e9, 1e9))
    after = open_foreign(foreign).shards[1]
    assert after.num_bytes == before.num_bytes
    assert [row.image[:1] for row in read_rows(after, 0, 2)] == [b"b", b"a"]


def test_a_prepared_manifest_is_taken_as_it_is(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = open_foreign(foreign)
    local = made.model_copy(
        update={
            "shards": tuple(
                s.model_copy(update={"path": Path(s.path).name, "index": f"i{n}.npy"})
                for n, s in enumerate(made.shards)
            ),
            "classes": ("a", "b", "c", "d"),
        }
    )
    (foreign / "manifest.json").write_text(local.model_dump_json())
    monkeypatch.setattr(shard_manifests, "index_shard", lambda *_: pytest.fail("a tar was indexed"))
    opened = open_foreign(foreign)
    assert opened.classes == ("a", "b", "c", "d")
    assert [s.index for s in opened.shards] == [f"{foreign}/i{n}.npy" for n in range(3)]
    some = open_shards(f"{foreign}/part-{{1..2}}.tar", str(foreign.parent / "cache2"))
    assert [Path(s.path).name for s in some.shards] == ["part-1.tar", "part-2.tar"]
    assert some.num_samples == 11


def test_a_manifest_that_lacks_a_shard_is_not_believed(
    foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = open_foreign(foreign)
    short = made.model_copy(update={"shards": made.shards[:2]})
    (foreign / "manifest.json").write_text(short.model_dump_json())
    with caplog.at_level(logging.WARNING):
        assert open_foreign(foreign).num_samples == 16
    assert "does not list all of the shards" in caplog.text


def test_tars_without_an_image_are_a_data_error(
    tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    write_tar(tmp_path / "t/a.tar", {})
    write_tar(tmp_path / "t/b.tar", {"x.txt": b"words"})
    with pytest.raises(DataError, match=r"2 tars, but no sample with an image"):
        open_shards(str(tmp_path / "t"), str(tmp_path / "cache"))


def test_groups_without_an_image_are_counted(
    tmp_path: Path,
    write_tar: Callable[..., Path],
    make_png: Callable[[int], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_tar(tmp_path / "t/a.tar", {"x.txt": b"words", "y.png": make_png(0)})
    with caplog.at_level(logging.WARNING):
        assert open_shards(str(tmp_path / "t"), str(tmp_path / "cache")).num_samples == 1
    assert "left out of the shards: 1 x no_image" in caplog.text


def test_a_shard_named_twice_is_a_config_error(foreign: Path) -> None:
    with pytest.raises(ConfigError, match="3 shards are named twice"):
        open_shards((str(foreign), str(foreign)), str(foreign.parent / "cache"))


def test_rows_are_what_a_whole_read_gives(foreign: Path) -> None:
    shard = open_foreign(foreign).shards[2]
    with Path(shard.path).open("rb") as stream:
        whole = list(iter_samples(stream, shard.path))
    assert [sample.key for sample in whole] == [f"{i:03d}" for i in range(8, 16)]
    for start, stop in [(0, 8), (0, 1), (3, 5), (7, 8), (4, 4)]:
        rows = read_rows(shard, start, stop)
        assert [(s.key, s.parts) for s in rows] == [(s.key, s.parts) for s in whole[start:stop]]


def kinds(rows: list[Sample | BrokenSample]) -> list[str]:
    return [row.error.partition(":")[0] if isinstance(row, BrokenSample) else "" for row in rows]


def test_of_a_shard_that_was_cut_after_it_was_indexed_the_rest_are_holes(foreign: Path) -> None:
    shard = open_foreign(foreign).shards[2]
    data = Path(shard.path).read_bytes()
    index = index_from_bytes(Path(shard.index).read_bytes(), "i")
    Path(shard.path).write_bytes(data[: int(index.offsets[5]) + 100])
    assert kinds(read_samples(shard, 0, 8)) == [""] * 5 + ["damaged"] * 3
    assert len(read_rows(shard, 0, 8)) == 5


def test_a_shard_with_other_samples_holds_none_of_those_that_were_indexed(
    foreign: Path, write_tar: Callable[..., Path], make_png: Callable[[int], bytes]
) -> None:
    shard = open_foreign(foreign).shards[2]
    write_tar(Path(shard.path), {f"{i}.png": make_png(i) * 3 for i in range(8)})
    assert kinds(read_samples(shard, 2, 8)) == ["damaged"] * 6


def test_samples_that_can_not_be_told_apart_are_named_by_their_place(foreign: Path) -> None:
    shard = open_foreign(foreign).shards[2]
    Path(shard.path).write_bytes(b"\1" * shard.num_bytes)
    names = [row.key for a, b in ((0, 3), (3, 8)) for row in read_samples(shard, a, b)]
    assert names == [f"#{i}" for i in range(8)]


def test_tars_that_hold_all_images_before_all_labels_are_read_whole(
    tmp_path: Path, write_tar: Callable[..., Path], make_png: Callable[[int], bytes]
) -> None:
    members = {f"{i}.png": make_png(i) for i in range(4)}
    write_tar(tmp_path / "t/a.tar", members | {f"{i}.cls": b"1" for i in range(4)})
    manifest = open_shards(str(tmp_path / "t"), str(tmp_path / "cache"))
    assert manifest.left_out == {"duplicate_key": 4}
    (shard,) = manifest.shards
    assert kinds(read_samples(shard, 0, 4)) == [""] * 4
    assert kinds(read_samples(shard, 3, 4)) == [""]


@pytest.fixture
def packed(foreign: Path) -> Path:
    """Write our manifest and checksums beside the shards in `foreign`."""
    config = PrepareConfig(existing="index", output=str(foreign), workers=1)
    assert prepare.run(config, fresh=False).metrics["num_samples"] == 16
    return foreign


def test_a_flipped_byte_is_a_named_hole_and_its_neighbours_come(packed: Path) -> None:
    shard = open_shards(str(packed), "/nowhere").shards[2]
    whole = read_samples(shard, 0, 8)
    index = index_from_bytes(Path(shard.index).read_bytes(), "i")
    data = bytearray(Path(shard.path).read_bytes())
    data[int(index.offsets[3]) + 600] ^= 0x10
    Path(shard.path).write_bytes(data)
    rows = read_samples(shard, 0, 8)
    assert kinds(rows) == ["", "", "", "checksum", "", "", "", ""]
    assert [*rows[:3], *rows[4:]] == [*whole[:3], *whole[4:]]
    plan = make_plan(open_shards(str(packed), "/nowhere"), micro=16, window=16, num_samples=16)
    (table,) = read_window(plan, 0)
    bad = [r for r in table.select(["key", "shard", "error"]).to_pylist() if r["error"]]
    assert [(r["key"], Path(r["shard"]).name) for r in bad] == [("011", "part-2.tar")]


def test_a_byte_that_was_flipped_on_the_way_is_read_again(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = open_shards(str(packed), "/nowhere").shards[2]
    whole = read_samples(shard, 0, 8)
    original, calls = storage.read_range, []

    def flip_once(uri: str, start: int, stop: int) -> bytes:
        calls.append(uri)
        data = bytearray(original(uri, start, stop))
        data[700] ^= len(calls) == 1
        return bytes(data)

    monkeypatch.setattr(storage, "read_range", flip_once)
    assert read_samples(shard, 0, 8) == whole
    assert len(calls) == 2


def test_of_damaged_foreign_tars_what_is_whole_is_taken(
    foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = foreign / "part-2.tar"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"1 of 3 tars are damaged, .*max_bad_ratio=0\.1; .*part-2"):
        open_shards(str(foreign), str(foreign.parent / "cache"), max_bad_ratio=0.1)
    with caplog.at_level(logging.WARNING):
        manifest = open_shards(str(foreign), str(foreign.parent / "cache"), max_bad_ratio=0.5)
    assert 8 < manifest.num_samples < 16
    assert manifest.left_out == {"cut": 1}
    assert "only the samples before the damage are used" in caplog.text


def test_a_damaged_tar_that_was_fetched_again_is_indexed_again(foreign: Path) -> None:
    path, cache = foreign / "part-2.tar", str(foreign.parent / "cache")
    data = path.read_bytes()
    path.write_bytes(data[:100] + bytes([data[100] ^ 0x55]) + data[101:])  # of the same size
    assert open_shards(str(foreign), cache, max_bad_ratio=0.5).num_samples == 8
    path.write_bytes(data)
    assert open_shards(str(foreign), cache).num_samples == 16


def test_an_index_of_another_shard_is_refused(foreign: Path) -> None:
    first, second, _ = open_foreign(foreign).shards
    with pytest.raises(ChangedDataError, match=r"does not belong to .*part-0\.tar"):
        read_rows(first.model_copy(update={"index": second.index}), 0, 1)


def test_labels_are_numbers_where_they_are_needed(
    tmp_path: Path, write_tar: Callable[..., Path], make_png: Callable[[int], bytes]
) -> None:
    tar = {"x.png": make_png(0), "x.cls": b" 3\n", "y.png": make_png(1), "y.cls": b"cat"}
    write_tar(tmp_path / "t/a.tar", tar | {"z.png": make_png(2)})
    manifest = open_shards(str(tmp_path / "t"), str(tmp_path / "cache"))
    # Pretraining needs none.
    plan = make_plan(manifest, micro=3, window=3, num_samples=3)
    (table,) = read_window(plan, 0)
    assert sorted(table["key"].to_pylist()) == ["x", "y", "z"]
    (shard,) = manifest.shards
    x, y, z = read_rows(shard, 0, 3)
    assert needed_label(shard, x) == 3
    with pytest.raises(DataError, match=r"y\.cls holds 'cat', not the number of a class"):
        needed_label(shard, y)
    with pytest.raises(DataError, match=r"z has no \.cls, which the kNN evaluation needs"):
        needed_label(shard, z)


def test_stats_are_means_over_all_pixels(tmp_path: Path, write_tar: Callable[..., Path]) -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, :, 0], pixels[:, :, 1] = 255, 51
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_tar(tmp_path / "t/a.tar", {"x.png": buffer.getvalue(), "y.png": b"broken"})
    stats = measure_channel_stats(open_shards(str(tmp_path / "t"), str(tmp_path / "cache")), 3)
    assert stats.mean == pytest.approx((0.5, 0.2, 0.0))
    assert stats.std == pytest.approx((0.5, 1e-6, 1e-6), abs=1e-6)
    assert stats.num_images == 1
