"""`mae prepare` after it was stopped, was finished, or its input has changed."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mae_core.data.samples import DataError
from pipelines.outcome import ConfigError
from pipelines.packing import process_pool
from tests.pipelines.packed_sets import WHITE, contents, pack, run_script, written

ROOT = Path(__file__).parents[3]


def test_finished_output_is_reused_and_not_written_to(photos: Path, tmp_path: Path) -> None:
    first = pack(photos, tmp_path / "out")
    before = written(tmp_path / "out")
    # Neither the number of workers nor the limit decides any byte.
    second = pack(photos, tmp_path / "out", workers=2, max_bad_ratio=0.3)
    assert second == first._replace(status="reused")
    assert written(tmp_path / "out") == before


@pytest.mark.parametrize(
    "lost",
    [
        ["manifest.json"],
        ["train-000002.tar"],
        ["train-000002.index.npy"],
        [".prepare/train-000002.json", "manifest.json"],
        ["manifest.json", "train-000000.tar", "train-000004.index.npy"],
    ],
)
def test_only_what_is_lost_is_packed_again(photos: Path, tmp_path: Path, lost: list[str]) -> None:
    out = tmp_path / "out"
    pack(photos, out)
    expected, before = contents(out), written(out)
    for name in lost:
        (out / name).unlink()
    assert pack(photos, out).status == "done"
    assert contents(out) == expected
    lost_shards = set(re.findall(r"train-\d{6}", " ".join(lost)))
    shards = [name for name in before if name.endswith((".tar", ".npy"))]
    kept = [name for name in shards if name.partition(".")[0] not in lost_shards]
    assert len(kept) == 10 - 2 * len(lost_shards)
    assert {name: written(out)[name] for name in kept} == {name: before[name] for name in kept}


@pytest.mark.parametrize("damage", [b"", b"{", b'{"plan": "x"}'])
def test_damaged_record_or_cut_shard_is_packed_again(
    photos: Path, tmp_path: Path, damage: bytes
) -> None:
    out = tmp_path / "out"
    pack(photos, out)
    expected = contents(out)
    (out / "manifest.json").unlink()
    (out / ".prepare/train-000001.json").write_bytes(damage)
    os.truncate(out / "train-000003.tar", 4096)
    pack(photos, out)
    assert contents(out) == expected


def test_cut_shard_of_a_finished_output_is_packed_again(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(photos, out)
    expected = contents(out)
    os.truncate(out / "train-000003.tar", 4096)
    assert pack(photos, out).status == "done"
    assert contents(out) == expected


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, r"\(seed: 0 -> 1\)"),
        ({"samples_per_shard": 8}, r"\(samples_per_shard: 7 -> 8\)"),
        ({"in_chans": 1}, r"\(in_chans: 3 -> 1\)"),
        ({"split": "val"}, r"\(split: train -> val\)"),
    ],
)
def test_other_config_for_the_same_output_is_an_error(
    photos: Path, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    pack(photos, tmp_path / "out")
    before = written(tmp_path / "out")
    with pytest.raises(ConfigError, match=rf"^output={tmp_path}/out was packed .*{told}.*--fresh"):
        pack(photos, tmp_path / "out", **change)
    assert written(tmp_path / "out") == before


def test_other_images_for_the_same_output_are_an_error(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    (photos / "cat/new.png").write_bytes(WHITE)
    with pytest.raises(ConfigError, match=r"\(images: 30 -> 31\)"):
        pack(photos, tmp_path / "out")
    (photos / "cat/new.png").rename(photos / "cat/000.png")
    with pytest.raises(ConfigError, match=r"\(the files differ\)"):
        pack(photos, tmp_path / "out")


def test_fresh_replaces_what_was_packed(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", samples_per_shard=3)
    (tmp_path / "out/.train-000001.tar.12ab.partial").write_bytes(b"left by a kill")
    assert pack(photos, tmp_path / "out", samples_per_shard=10, fresh=True).status == "done"
    pack(photos, tmp_path / "new", samples_per_shard=10)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("alien", ["thesis.docx", "photos/a.jpg"])
def test_fresh_never_deletes_what_it_did_not_make(photos: Path, tmp_path: Path, alien: str) -> None:
    pack(photos, tmp_path / "out")
    (tmp_path / "out" / alien).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / alien).write_bytes(b"dear")
    before = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has files that `mae prepare` did not write, such as"):
        pack(photos, tmp_path / "out", fresh=True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", ["theirs-000000.tar", "manifest.json"])
def test_shards_of_another_origin_are_not_mixed_with(
    photos: Path, tmp_path: Path, name: str, fresh: bool
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(b"theirs")
    with pytest.raises(ConfigError, match=name):
        pack(photos, tmp_path / "out", fresh=fresh)
    assert contents(tmp_path / "out") == {name: b"theirs"}


def test_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    sizes = {"num_train": 320, "num_val": 5, "img_size": 64, "samples_per_shard": 40, "workers": 2}
    words = ["--synthetic", "shapes", *(f"{name}={value}" for name, value in sizes.items())]
    out = tmp_path / "out"
    with run_script(*words, str(out)) as process:
        waited_until_s = time.monotonic() + 300
        while not list(out.glob("train/.prepare/train-*.json")):
            assert process.poll() is None
            assert time.monotonic() < waited_until_s
            time.sleep(0.01)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "packing processes outlived their parent"
    assert not (out / "train/manifest.json").exists()
    done = {path.stem for path in out.glob("train/.prepare/train-*.json")}
    assert 1 <= len(done) < 8
    before = {name: written(out)[f"train/{name}.tar"] for name in done}

    with run_script(*words, str(out)) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["status"] == "done"
    assert {name: written(out)[f"train/{name}.tar"] for name in done} == before
    pack(None, tmp_path / "whole", **sizes)
    left = {k: v for k, v in contents(out).items() if not k.endswith(".partial")}
    assert left == contents(tmp_path / "whole")


def test_killed_worker_is_told_in_words() -> None:
    with (
        pytest.raises(DataError, match=r"a packing process was killed.*lower workers"),
        process_pool.process_pool(1) as pool,
    ):
        pool.submit(os._exit, 1).result()
