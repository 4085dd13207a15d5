from pathlib import Path

import pytest

from infra import storage
from infra.shard_spec import expand_shards
from infra.storage import NoShardsError


def make_shards(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(storage.join(root, name), b"shard")


def test_a_folder_gives_its_own_shards_in_order(root: str) -> None:
    make_shards(root, "b.tar", "a.tar", "manifest.json", "c.tar.tmp", ".d.tar", "sub/e.tar")
    assert expand_shards(root) == [f"{root}/a.tar", f"{root}/b.tar"]
    assert expand_shards(root + "/") == [f"{root}/a.tar", f"{root}/b.tar"]


def test_a_brace_pattern_names_each_shard(root: str) -> None:
    make_shards(root, *(f"train-{i:06}.tar" for i in range(12)))
    shards = expand_shards(f"{root}/train-{{000009..000011}}.tar")
    assert shards == [f"{root}/train-{i}.tar" for i in ("000009", "000010", "000011")]


def test_a_star_matches_in_the_last_part(root: str) -> None:
    make_shards(root, "train-0.tar", "train-1.tar", "val-0.tar")
    assert expand_shards(f"{root}/train-*.tar") == [
        f"{root}/train-0.tar",
        f"{root}/train-1.tar",
    ]


def test_a_list_keeps_the_order_of_its_entries(root: str) -> None:
    make_shards(root, "z/0.tar", "a/0.tar", "a/1.tar")
    shards = expand_shards([f"{root}/z", f"{root}/a/1.tar"])
    assert shards == [f"{root}/z/0.tar", f"{root}/a/1.tar"]


def test_a_shard_named_twice_is_refused(root: str) -> None:
    make_shards(root, "0.tar", "1.tar")
    with pytest.raises(ValueError, match=r"1 shards are named twice, the first is .*/1\.tar"):
        expand_shards([root, f"{root}/1.tar"])


def test_a_missing_shard_is_named(root: str) -> None:
    make_shards(root, "0.tar", "1.tar")
    with pytest.raises(NoShardsError, match=r"2 of 4 shards .* the first is .*/2\.tar: .* 0\.tar"):
        expand_shards(f"{root}/{{0..3}}.tar")
    with pytest.raises(NoShardsError, match=r"1 of 1 shards .*/9\.tar"):
        expand_shards(f"{root}/9.tar")


def test_a_folder_without_shards_says_what_it_holds(root: str) -> None:
    make_shards(root, "train/0.tar", "notes.txt")
    with pytest.raises(NoShardsError, match=r"holds train/, notes\.txt"):
        expand_shards(root)


def test_a_missing_folder_is_named_with_the_nearest_one(root: str) -> None:
    make_shards(root, "train/0.tar")
    with pytest.raises(NoShardsError, match=f"there is no {root}/val/big; {root} holds train/"):
        expand_shards(f"{root}/val/big")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(NoShardsError, match="empty"):
        expand_shards([])


@pytest.mark.parametrize("name", ["train.txt", "train.tar.gz"])
def test_a_file_that_is_no_shard_is_refused(root: str, name: str) -> None:
    make_shards(root, name)
    with pytest.raises(NoShardsError, match=rf": {root}/{name} is a file, and not a tar"):
        expand_shards(f"{root}/{name}")


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(str(tmp_path), "train/0.tar")
    monkeypatch.chdir(tmp_path)
    assert expand_shards("./train/../train") == [f"{tmp_path}/train/0.tar"]


def test_a_linked_shard_keeps_its_name(tmp_path: Path) -> None:
    make_shards(str(tmp_path), "blobs/c0ffee")
    (tmp_path / "train-0.tar").symlink_to(tmp_path / "blobs" / "c0ffee")
    shard = f"{tmp_path}/train-0.tar"
    assert expand_shards(str(tmp_path)) == [shard]
    assert expand_shards(shard) == [shard]
