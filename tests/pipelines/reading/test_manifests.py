"""Which manifest a set of shards has: its own, those of several sets, or one from indexing."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from infra.storage import NoShardsError
from mae_core.data.manifest import ChannelStats, Manifest, merge_manifests
from pipelines.reading import manifests as shard_manifests
from pipelines.reading.shards import open_shards
from tests.pipelines.packed_sets import BLACK, WHITE, pack, write_image


@pytest.fixture
def two_sets(tmp_path: Path) -> list[str]:
    """Return manifests of 30 and of 10 images with the same classes."""
    for name, count in (("one", 30), ("two", 10)):
        for i in range(count):
            pixels = np.full((4, 4, 3), i, np.uint8)
            write_image(tmp_path / name / ("cat" if i % 2 else "dog") / f"{i}.png", pixels)
        pack(tmp_path / name, tmp_path / "out" / name)
    return [str(tmp_path / "out/one"), str(tmp_path / "out/two")]


def test_two_prepared_sets_use_their_two_manifests(
    two_sets: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_manifests, "index_shard", lambda *_: pytest.fail("a tar was indexed"))
    with caplog.at_level(logging.INFO):
        together = open_shards(tuple(two_sets), "/nowhere")
    assert caplog.text == ""
    apart = [open_shards(folder, "/nowhere") for folder in two_sets]
    assert together.shards == (*apart[0].shards, *apart[1].shards)
    assert all(shard.sha256 is not None for shard in together.shards)
    assert together.num_samples == 40
    assert together.classes == ("cat", "dog")
    assert together.channel_stats is not None
    # Grey values 0..29 and 0..9, each in pictures of one size: their mean, of 40.
    expected = (sum(range(30)) + sum(range(10))) / 40 / 255
    np.testing.assert_allclose(together.channel_stats.mean, [expected] * 3, rtol=1e-12)
    spread = np.std([*range(30), *range(10)]) / 255
    np.testing.assert_allclose(together.channel_stats.std, [spread] * 3, rtol=1e-12)
    assert together.channel_stats.num_images == 40


def test_a_prepared_set_keeps_its_manifest_beside_one_that_is_indexed(
    two_sets: list[str], tmp_path: Path
) -> None:
    Path(two_sets[1], "manifest.json").unlink()
    together = open_shards(tuple(two_sets), str(tmp_path / "cache"))
    assert [shard.sha256 is not None for shard in together.shards] == [True] * 5 + [False] * 2
    assert together.classes == ("cat", "dog")
    assert together.channel_stats is None
    assert open_shards(tuple(two_sets), str(tmp_path / "cache")) == together


def test_sets_that_number_their_classes_otherwise_have_no_names_together(
    two_sets: list[str],
) -> None:
    manifest = json.loads(Path(two_sets[1], "manifest.json").read_text())
    manifest["classes"] = ["dog", "cat"]
    Path(two_sets[1], "manifest.json").write_text(json.dumps(manifest))
    assert open_shards(tuple(two_sets), "/nowhere").classes is None


def test_statistics_of_other_channels_are_not_pooled() -> None:
    grey = ChannelStats(mean=(0.5,), std=(0.1,), num_images=3)
    colour = ChannelStats(mean=(0.5,) * 3, std=(0.1,) * 3, num_images=3)
    parts = [Manifest(shards=(), channel_stats=stats) for stats in (grey, colour)]
    assert merge_manifests(parts).channel_stats is None
    assert merge_manifests([parts[0], Manifest(shards=())]).channel_stats is None


@pytest.mark.parametrize("name", ["a.JPG", "cat/a.png"])
def test_a_folder_of_images_names_prepare(tmp_path: Path, name: str) -> None:
    path = tmp_path / "photos" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(BLACK)
    with pytest.raises(NoShardsError) as error:
        open_shards(str(tmp_path / "photos"), "/nowhere")
    assert f"mae prepare {tmp_path}/photos OUT, and give OUT" in str(error.value)


def test_an_image_or_a_list_names_prepare_and_an_empty_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(WHITE)
    (tmp_path / "list.txt").write_text("a.png")
    for name in ("a.png", "list.txt"):
        with pytest.raises(NoShardsError, match=f"mae prepare {tmp_path}/{name} OUT"):
            open_shards(str(tmp_path / name), "/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoShardsError) as error:
        open_shards(str(tmp_path / "empty"), "/nowhere")
    assert "mae prepare" not in str(error.value)
