"""Existing tars get a manifest, checksums and statistics, and are not changed."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.data.manifest import Manifest, index_from_bytes, parse_manifest
from mae_core.data.samples import DataError
from pipelines import cli, prepare
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.shards import open_shards, read_rows


def index(folder: Path, what: str = "index", **fields: object) -> StageResult:
    config = PrepareConfig(existing=what, output=str(folder), workers=1, **fields)  # type: ignore[arg-type]
    return prepare.run(config, fresh=False)


def manifest_of(folder: Path) -> Manifest:
    return parse_manifest((folder / "manifest.json").read_bytes(), "manifest.json")


def test_tars_stay_and_get_manifest_and_checksums(foreign: Path) -> None:
    before = {tar.name: tar.read_bytes() for tar in foreign.glob("*.tar")}
    result = index(foreign)
    assert result.metrics["num_samples"] == 16
    manifest = manifest_of(foreign)
    assert [shard.path for shard in manifest.shards] == sorted(before)
    assert manifest.channel_stats is None
    for shard in manifest.shards:
        assert (foreign / shard.path).read_bytes() == before[shard.path]
        assert shard.sha256 == hashlib.sha256(before[shard.path]).hexdigest()
        found = index_from_bytes((foreign / shard.index).read_bytes(), shard.index)
        assert found.checksums is not None
        assert len(found.checksums) == shard.num_samples
    opened = open_shards(str(foreign), "/nowhere")
    assert sum(len(read_rows(s, 0, s.num_samples)) for s in opened.shards) == 16


def test_processes_do_not_change_the_manifest(foreign: Path) -> None:
    index(foreign, "stats")
    alone = (foreign / "manifest.json").read_bytes()
    config = PrepareConfig(existing="stats", output=str(foreign), workers=3)
    prepare.run(config, fresh=False)
    assert (foreign / "manifest.json").read_bytes() == alone


def test_statistics_are_over_all_pixels_of_all_images(
    tmp_path: Path, write_tar: Callable[..., Path]
) -> None:
    def png(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    write_tar(tmp_path / "t/a.tar", {"x.png": png(0), "y.png": b"broken"})
    write_tar(tmp_path / "t/b.tar", {"z.png": png(255)})
    result = index(tmp_path / "t", "stats")
    assert result.metrics["num_measured"] == 2
    stats = manifest_of(tmp_path / "t").channel_stats
    assert stats is not None
    assert stats.mean == pytest.approx((0.5, 0.5, 0.5))
    assert stats.std == pytest.approx((0.5, 0.5, 0.5))


def test_a_manifest_that_is_there_is_not_replaced_for_nothing(foreign: Path) -> None:
    index(foreign)
    with pytest.raises(ConfigError, match="already covers tars of these names and sizes"):
        index(foreign)
    config = PrepareConfig(existing="index", output=str(foreign), workers=1)
    assert prepare.run(config, fresh=True).metrics["num_samples"] == 16
    # Statistics are something new.
    assert index(foreign, "stats").metrics["num_measured"] == 16


def test_of_a_damaged_tar_what_is_whole_is_taken_and_said(foreign: Path) -> None:
    tar = foreign / "part-2.tar"
    tar.write_bytes(tar.read_bytes()[: len(tar.read_bytes()) // 2])
    result = index(foreign, "stats")
    manifest = manifest_of(foreign)
    assert 8 < manifest.num_samples < 16
    assert result.metrics["num_left_out"] == 1
    assert list(manifest.damaged) == ["part-2.tar"]
    with pytest.raises(DataError, match="1 of 3 tars are damaged"):
        open_shards(str(foreign), "/nowhere")
    assert open_shards(str(foreign), "/nowhere", max_bad_ratio=0.5).num_samples == (
        manifest.num_samples
    )


def test_an_empty_file_among_the_tars_does_not_stop_the_others(foreign: Path) -> None:
    (foreign / "part-9.tar").write_bytes(b"")
    assert index(foreign).metrics["num_samples"] == 16
    assert list(manifest_of(foreign).damaged) == ["part-9.tar"]
    # Who names only the good ones is not held to account for the others.
    good = tuple(str(foreign / f"part-{i}.tar") for i in range(3))
    assert open_shards(good, "/nowhere").num_samples == 16


def test_statistics_of_the_wrong_number_of_channels_are_an_error(foreign: Path) -> None:
    with pytest.raises(DataError, match="none of the images can be measured with in_chans=5"):
        index(foreign, "stats", in_chans=5)


def test_a_tar_instead_of_its_folder_is_a_config_error(foreign: Path) -> None:
    with pytest.raises(ConfigError, match="give the folder that contains the tars"):
        index(foreign / "part-0.tar")


def test_the_command_takes_the_folder_as_a_word(
    foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prepare", "stats", str(foreign), "workers=1"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["status"], told["metrics"]["num_measured"]) == ("done", 16)
    assert cli.main(["prepare", "index", str(foreign), "workers=1"]) == 2


def test_tars_that_were_replaced_are_indexed_anew(
    foreign: Path, tmp_path: Path, write_tar: Callable[..., Path], make_png: Callable[[int], bytes]
) -> None:
    index(foreign)
    with pytest.raises(ConfigError, match="names and sizes; --fresh"):
        index(foreign)
    name = sorted(tar.name for tar in foreign.glob("*.tar"))[0]
    write_tar(foreign / name, {f"{i}.png": make_png(i) for i in range(20)})
    index(foreign)
    assert manifest_of(foreign).shards[0].num_samples == 20
