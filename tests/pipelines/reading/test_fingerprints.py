"""Fingerprints change when the data does."""

import os
import shutil
from pathlib import Path

import pytest

from pipelines.outcome import ConfigError
from pipelines.reading.fingerprints import fingerprint
from tests.pipelines.shard_sets import shard_set


def test_what_a_manifest_says_of_all_counts(tmp_path: Path) -> None:
    sets = [
        shard_set(tmp_path / "a"),
        shard_set(tmp_path / "b", classes=["x"]),
        shard_set(tmp_path / "c", channel_stats={"mean": [0.5], "std": [0.1], "num_images": 1}),
    ]
    assert len({fingerprint(str(folder)) for folder in sets}) == 3


def test_a_folder_of_images_with_a_manifest_of_somebody_elses_is_one_of_images(
    tmp_path: Path,
) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "my app"}')
    (tmp_path / "a.jpg").write_bytes(b"1")
    before = fingerprint(str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(b"12")
    assert fingerprint(str(tmp_path)) != before


def test_the_images_of_a_list_count(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "list.txt").write_text("a.jpg\t3\n")
    before = fingerprint(str(tmp_path / "list.txt"))
    (tmp_path / "a.jpg").write_bytes(b"12")
    assert fingerprint(str(tmp_path / "list.txt")) != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [("t-{0..2}.tar", "t-1.tar"), ("https://x/y", "only local paths"), ("no.tar", "no.tar")],
)
def test_what_is_wrong_with_a_place_is_told(tmp_path: Path, spec: str, message: str) -> None:
    (tmp_path / "t-0.tar").write_bytes(b"1")
    place = spec if "://" in spec else str(tmp_path / spec)
    with pytest.raises(ConfigError, match=message):
        fingerprint(place)


@pytest.mark.parametrize("kind", ["tar", "folder", "file", "checkpoint", "list"])
def test_a_fingerprint_follows_the_data(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x"
    place.mkdir()
    file = {
        "tar": place / "a.tar",
        "folder": place / "deep/a.jpg",
        "file": place / "list.txt",
        "checkpoint": place / "manifest.json",
        "list": place / "a.tar",
    }[kind]
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b'{"step": 1, "model": {}, "files": {}}')
    spec = {"file": str(file), "list": [str(place), str(file)]}.get(kind, str(place))
    before = fingerprint(spec)
    assert fingerprint(spec) == before
    file.write_bytes(b'{"step": 12, "model": {}, "files": {}}')
    assert fingerprint(spec) != before


def test_a_place_with_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: does not exist"):
        fingerprint(str(tmp_path / "nowhere"))


def later(file: Path, than: Path) -> None:
    """Make `file` a second younger than another."""
    changed = than.stat().st_mtime + 1
    os.utime(file, (changed, changed))


def test_a_checksum_does_not_count_for_a_tar_that_changed_after_its_manifest(
    tmp_path: Path,
) -> None:
    folder = shard_set(tmp_path / "a")
    (tar,) = folder.glob("*.tar")
    before = fingerprint(str(folder))
    data = bytearray(tar.read_bytes())
    data[:1] = b"!"  # The size stays.
    tar.write_bytes(data)
    later(tar, folder / "manifest.json")
    assert fingerprint(str(folder)) != before


def test_a_copy_has_the_fingerprint_of_the_original(tmp_path: Path) -> None:
    folder = shard_set(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    assert fingerprint(str(tmp_path / "b")) == fingerprint(str(folder))


def test_names_of_classes_count_only_where_they_are_asked_for(tmp_path: Path) -> None:
    sets = [shard_set(tmp_path / "a"), shard_set(tmp_path / "b", classes=["x"])]
    (sets[1] / "classes.json").write_text('["x"]')
    assert len({fingerprint(str(folder), with_names=False) for folder in sets}) == 1
    assert len({fingerprint(str(folder)) for folder in sets}) == 2
