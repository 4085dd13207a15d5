"""Packing gives the same bytes each time, loses nothing silently, and resumes."""

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from infra import storage, transfers
from infra.services import object_store
from mae_core.data.decode import decode_image
from mae_core.data.image_files import ImageFile
from mae_core.data.manifest import index_from_bytes
from mae_core.data.samples import DataError, iter_samples
from pipelines import prepare
from pipelines.config.loading import load_config
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import ConfigError, StageResult
from tests.pipelines.packed_sets import (
    BLACK,
    WHITE,
    contents,
    pack,
    read_all,
    read_manifest,
    run_script,
)

ROOT = Path(__file__).parents[2]


def test_class_folders_become_shards_with_a_manifest(photos: Path, tmp_path: Path) -> None:
    result = pack(photos, tmp_path / "out")
    assert result == StageResult(
        stage="prepare",
        status="done",
        run_id=None,
        output=str(tmp_path / "out"),
        metrics={
            "num_samples": 30.0,
            "num_shards": 5.0,
            "num_bytes": float(sum(p.stat().st_size for p in (tmp_path / "out").glob("*.tar"))),
            "num_skipped": 0.0,
        },
    )
    manifest = read_manifest(tmp_path / "out")
    assert [shard.path for shard in manifest.shards] == [f"train-00000{i}.tar" for i in range(5)]
    assert [shard.num_samples for shard in manifest.shards] == [7, 7, 7, 7, 2]
    assert manifest.classes == ("cat", "dog", "owl")
    assert (tmp_path / "out/skipped.jsonl").read_bytes() == b""


def test_image_bytes_and_labels_are_kept(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    samples = read_all(tmp_path / "out")
    assert len(samples) == 30
    assert samples["cat/000"] == {"cls": b"0", "png": (photos / "cat/000.png").read_bytes()}
    assert samples["dog/001"] == {"cls": b"1", "jpg": (photos / "dog/001.JPG").read_bytes()}
    assert samples["owl/002"] == {"cls": b"2", "jpg": (photos / "owl/002.jpeg").read_bytes()}


def test_manifest_says_what_the_files_are(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    for shard in read_manifest(tmp_path / "out").shards:
        data = (tmp_path / "out" / shard.path).read_bytes()
        assert len(data) == shard.num_bytes
        assert hashlib.sha256(data).hexdigest() == shard.sha256
        offsets = index_from_bytes(
            (tmp_path / "out" / shard.index).read_bytes(), shard.index
        ).offsets
        assert len(offsets) == shard.num_samples + 1
        for start, stop in pairwise(offsets):
            assert len(list(iter_samples(io.BytesIO(data[start:stop]), shard.path))) == 1


def test_members_carry_no_owner_time_or_order_of_the_disk(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out", samples_per_shard=100)
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mode, m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {
        (0o644, 0, 0, "", "", 0)
    }
    names = [member.name for member in members]
    assert [name.rpartition(".")[2] for name in names[::2]] == ["cls"] * 30
    classes = [name.partition("/")[0] for name in names[::2]]
    changes = sum(one != other for one, other in pairwise(classes))
    assert changes > 12  # 20 expected of a mixed order, 2 of a sorted one


def test_bytes_never_change(tmp_path: Path) -> None:
    # The values when this was written: a later version must pack the same bytes.
    for name, data in [("a/1.png", BLACK), ("a/2.png", WHITE), ("b/3.png", BLACK)]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    pack(tmp_path / "in", tmp_path / "out", seed=5)
    digest = hashlib.sha256((tmp_path / "out/train-000000.tar").read_bytes()).hexdigest()
    assert digest[:16] == "fd60b23ec1ad06df"
    assert list(read_all(tmp_path / "out")) == ["a/2", "a/1", "b/3"]


def test_same_input_gives_the_same_bytes_for_any_number_of_workers(
    photos: Path, tmp_path: Path
) -> None:
    (photos / "cat/broken.jpg").write_bytes(b"not an image")
    pack(photos, tmp_path / "one", workers=1)
    copy = tmp_path / "elsewhere"
    for path in sorted(photos.rglob("*.*"), reverse=True):  # another order on the disk
        (copy / path.relative_to(photos)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(photos)).write_bytes(path.read_bytes())
    pack(copy, tmp_path / "three", workers=3)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "three")
    assert len([name for name in one if name.endswith(".tar")]) == 5
    assert b"cat/broken.jpg" in one["skipped.jsonl"]


def test_another_seed_packs_in_another_order(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "zero", seed=0)
    pack(photos, tmp_path / "one", seed=1)
    zero, one = read_all(tmp_path / "zero"), read_all(tmp_path / "one")
    assert zero == one
    assert list(zero) != list(one)


def test_webdataset_reads_the_shards(photos: Path, tmp_path: Path) -> None:
    (photos / "cat" / ("long" * 40 + ".png")).write_bytes(WHITE)
    (photos / "owl/ä.ö.png").write_bytes(BLACK)
    (photos / "owl/ä.ö.json").write_bytes(b"{}")
    pack(photos, tmp_path / "out")
    samples = read_all(tmp_path / "out")
    assert list(samples["owl/ä_ö"].items()) == [("cls", b"2"), ("json", b"{}"), ("png", BLACK)]
    theirs = {}
    for tar in sorted((tmp_path / "out").glob("*.tar")):
        with tar.open("rb") as stream:
            for group in group_by_keys(tar_file_expander([{"url": "", "stream": stream}])):
                key = group["__key__"]
                theirs[key] = {k: v for k, v in group.items() if not k.startswith("__")}
    assert theirs == samples


def test_flat_folder_has_neither_labels_nor_classes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(BLACK)
    pack(tmp_path / "in", tmp_path / "out", split="val")
    assert read_all(tmp_path / "out") == {"a": {"png": BLACK}}
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes is None
    assert manifest.shards[0].path == "val-000000.tar"
    assert manifest.shards[0].index == "val-000000.index.npy"


def test_list_file_is_packed_with_its_numbers(photos: Path, tmp_path: Path) -> None:
    listing = photos / "some.txt"
    listing.write_text("cat/000.png\t17\ndog/001.JPG\t4\n")
    pack(listing, tmp_path / "out")
    samples = read_all(tmp_path / "out")
    assert {key: parts["cls"] for key, parts in samples.items()} == {
        "cat/000": b"17",
        "dog/001": b"4",
    }
    assert read_manifest(tmp_path / "out").classes is None


def test_shards_are_cut_by_bytes_too(photos: Path, tmp_path: Path) -> None:
    # A sample takes cls 512 + 512 and image 512 + 512 (files under 512 bytes) or + 1024.
    (photos / "cat/large.png").write_bytes(WHITE + bytes(20_000))  # larger than a shard may be
    pack(photos, tmp_path / "out", samples_per_shard=100, max_shard_bytes=10_240)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.num_samples == 31
    alone = [
        shard for shard in manifest.shards if shard.num_bytes > 20_000 and shard.num_samples == 1
    ]
    assert len(alone) == 1
    for shard in manifest.shards:
        if shard not in alone:
            offsets = index_from_bytes((tmp_path / "out" / shard.index).read_bytes(), "").offsets
            assert offsets[-1] <= 10_240
        full = [shard.num_samples for shard in manifest.shards if shard not in alone]
        assert max(full) == 4


@pytest.mark.parametrize(("in_chans", "channels"), [(1, 1), (3, 3)])
def test_channel_statistics_are_exact(tmp_path: Path, in_chans: int, channels: int) -> None:
    for name, data in [("a", BLACK), ("b", WHITE), ("c", WHITE), ("d", BLACK)]:
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.png").write_bytes(data)
    pack(tmp_path / "in", tmp_path / "out", in_chans=in_chans, samples_per_shard=3)
    stats = read_manifest(tmp_path / "out").channel_stats
    assert stats is not None
    assert stats.mean == (0.5,) * channels
    assert stats.std == (0.5,) * channels
    assert stats.num_images == 4


def test_channel_statistics_are_those_of_numpy(photos: Path, tmp_path: Path) -> None:
    pack(photos, tmp_path / "out")
    pixels = np.concatenate(
        [
            decode_image(path.read_bytes(), 3).reshape(-1, 3)
            for path in photos.rglob("*")
            if path.is_file()
        ]
    )
    stats = read_manifest(tmp_path / "out").channel_stats
    assert stats is not None
    np.testing.assert_allclose(stats.mean, (pixels / 255).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, (pixels / 255).std(axis=0), rtol=1e-12)


def test_broken_images_are_left_out_counted_and_listed(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "cat/empty.jpg").write_bytes(b"")
    (photos / "dog/page.png").write_bytes(b"<html>404</html>")
    (photos / "owl/cut.jpeg").write_bytes((photos / "owl/002.jpeg").read_bytes()[:-40])
    with caplog.at_level(logging.INFO):
        result = pack(photos, tmp_path / "out")
    assert result.metrics["num_samples"] == 30
    assert result.metrics["num_skipped"] == 3
    lines = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    skipped = {line["source"]: line["reason"] for line in map(json.loads, lines)}
    assert set(skipped) == {"cat/empty.jpg", "dog/page.png", "owl/cut.jpeg"}
    assert skipped["cat/empty.jpg"] == "holds no bytes"
    assert skipped["owl/cut.jpeg"] == "Premature end of JPEG file"
    assert not {"cat/empty", "dog/page", "owl/cut"} & set(read_all(tmp_path / "out"))
    assert "left out 3 of 33 images: 1 x " in caplog.text
    assert "1 x not an image of a known format" in caplog.text


def test_too_many_broken_images_are_an_error(photos: Path, tmp_path: Path) -> None:
    for i in range(4):
        (photos / f"cat/broken{i}.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError) as error:
        pack(photos, tmp_path / "out")
    text = str(error.value)
    assert text.startswith("4 of 34 images can't be used, more than max_bad_ratio=0.1: 4 x not an")
    assert "cat/broken" in text
    assert text.endswith(f"see {tmp_path}/out/skipped.jsonl")
    assert not (tmp_path / "out/manifest.json").exists()
    # What was packed is not lost: a higher limit, and the same command goes on.
    assert pack(photos, tmp_path / "out", max_bad_ratio=0.2).metrics["num_skipped"] == 4


def test_shard_of_broken_images_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.png").write_bytes(BLACK)
    (tmp_path / "in/d.png").write_bytes(b"nothing")
    pack(tmp_path / "in", tmp_path / "out", samples_per_shard=1, max_bad_ratio=0.5)
    manifest = read_manifest(tmp_path / "out")
    assert sorted(manifest.counts.tolist()) == [0, 1, 1, 1]
    assert len(read_all(tmp_path / "out")) == 3


def test_file_that_can_not_be_read_is_listed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "000.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    pack(photos, tmp_path / "out")
    assert json.loads((tmp_path / "out/skipped.jsonl").read_text()) == {
        "source": "cat/000.png",
        "reason": "cannot be read: Permission denied",
    }


def test_file_that_changes_while_it_is_packed_is_an_error(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_images = prepare.find_images

    def stale(source: Path, _: object) -> tuple[list[ImageFile], tuple[str, ...] | None]:
        files, classes = find_images(source)
        return [file._replace(num_bytes=file.num_bytes + 1) for file in files], classes

    monkeypatch.setattr(prepare, "find_images", stale)
    with pytest.raises(DataError, match=r"/photos/.* changed while it was packed"):
        pack(photos, tmp_path / "out")


def test_drawn_images_come_as_train_and_val(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = pack(None, out, num_train=20, num_val=6, img_size=32, samples_per_shard=8)
    assert result.metrics["num_samples"] == 26
    train, val = read_manifest(out / "train"), read_manifest(out / "val")
    assert [shard.path for shard in train.shards] == [f"train-00000{i}.tar" for i in range(3)]
    assert [shard.path for shard in val.shards] == ["val-000000.tar"]
    assert train.classes == val.classes
    assert train.classes is not None
    assert train.classes[0] == "disc"
    samples = read_all(out / "train")
    assert sorted(samples) == [f"train-{i:06d}" for i in range(20)]
    assert set(samples["train-000000"]) == {"cls", "jpg", "json", "seg.png"}
    assert decode_image(samples["train-000000"]["jpg"], 3).shape == (32, 32, 3)
    val_images = {parts["jpg"] for parts in read_all(out / "val").values()}
    assert not val_images & {parts["jpg"] for parts in samples.values()}


def test_more_training_scenes_leave_the_others_as_they_were(tmp_path: Path) -> None:
    for count in (5, 9):
        pack(None, tmp_path / str(count), num_train=count, num_val=4, img_size=16)
    five, nine = read_all(tmp_path / "5/train"), read_all(tmp_path / "9/train")
    assert five == {key: nine[key] for key in five}
    assert contents(tmp_path / "5/val") == contents(tmp_path / "9/val")


def test_other_size_of_drawn_images_is_told(tmp_path: Path) -> None:
    pack(None, tmp_path / "out", num_train=3, num_val=2, img_size=16)
    with pytest.raises(ConfigError, match=r"\(img_size: 16 -> 32, "):
        pack(None, tmp_path / "out", num_train=3, num_val=2, img_size=32)


def test_other_drawing_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(None, tmp_path / "out", num_train=3, num_val=2, img_size=16)
    monkeypatch.setattr(prepare, "encode_scene", lambda scene: {"jpg": b"drawn otherwise"})
    with pytest.raises(ConfigError, match=r"\(drawing: [0-9a-f]{8} -> [0-9a-f]{8}\)"):
        pack(None, tmp_path / "out", num_train=3, num_val=2, img_size=16)


def test_progress_is_logged(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "PROGRESS_EVERY_S", 0.0)
    with caplog.at_level(logging.INFO):
        pack(photos, tmp_path / "out")
    lines = [message for message in caplog.messages if "images_per_s" in message]
    assert len(lines) == 5
    assert f"output={tmp_path}/out shards=3/5 images=21 images_per_s=" in lines[2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output=o"], "give one of source=FOLDER, synthetic=shapes, existing"),
        (["output=o", "source=a", "synthetic=shapes"], "give one of source=FOLDER, synthetic"),
        (["source=a"], "output: is needed"),
        (["source=a", "output=o", "in_chans=0"], "in_chans"),
        (["source=a", "output=o", "workers=0"], "workers"),
        (["source=a", "output=o", "split=a/b"], "split"),
        (["source=a", "output=o", "sample_per_shard=3"], "did you mean samples_per_shard"),
    ],
)
def test_mistake_in_the_config_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PrepareConfig, [], overrides, environment={})


def test_demo_config_loads() -> None:
    config = load_config(PrepareConfig, [ROOT / "configs/prepare/demo.yaml"], environment={})
    assert (config.synthetic, config.output) == ("shapes", "data/shapes")
    assert (config.num_train, config.num_val, config.img_size) == (3000, 600, 48)


def test_script_and_its_exit_codes(photos: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with run_script(str(photos), out) as process:
        stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    line = json.loads(stdout.splitlines()[-1])
    assert (line["stage"], line["status"], line["output"]) == ("prepare", "done", out)
    with run_script(str(photos), out, "seed=1") as process:
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "--fresh" in stderr
    with run_script(str(tmp_path / "none"), out) as process:
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 4
    assert "no such folder" in stderr
    assert "Traceback" not in stderr


def test_stage_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, pipelines.prepare;"
        "print([m for m in ('torch', 'ray', 'mlflow', 'boto3') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert output.stdout.strip() == "[]", output.stderr


def test_stage_file_can_be_run() -> None:
    path = ROOT / "pipelines/prepare.py"
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/usr/bin/env python\n")


@pytest.mark.services
def test_bucket_gets_what_a_folder_gets(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store(tmp_path / "store") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        output = "s3://data/photos"
        options: dict[str, Any] = {"source": str(photos), "output": output, "samples_per_shard": 7}
        config = PrepareConfig.model_validate(options)
        assert prepare.run(config, fresh=False).output == output
        assert prepare.run(config, fresh=False).status == "reused"
        with pytest.raises(ConfigError, match=r"s3://data/photos was packed .*seed: 0 -> 1"):
            prepare.run(config.model_copy(update={"seed": 1}), fresh=False)
        assert prepare.run(config, fresh=True).status == "done"
        sizes = {name: facts.num_bytes for name, facts in storage.list_tree(output).items()}
        transfers.download_files(output, sizes, tmp_path / "fetched")
    pack(photos, tmp_path / "out")
    assert contents(tmp_path / "fetched") == contents(tmp_path / "out")


@pytest.mark.realdata
def test_bad_inputs_are_packed_or_listed(real_data: Path, tmp_path: Path) -> None:
    result = pack(real_data / "bad_inputs", tmp_path / "out", max_bad_ratio=0.5)
    assert result.metrics["num_samples"] == 42
    assert result.metrics["num_skipped"] == 20
    samples = read_all(tmp_path / "out")
    assert len(samples) == 42
    lines = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    reasons = Counter(json.loads(line)["reason"].partition(" (")[0] for line in lines)
    assert reasons["not an image of a known format"] == 2
    assert reasons["is a Git LFS pointer, not the file itself"] == 2
    assert reasons["OSError: image file is truncated"] == 1  # a PNG
    assert reasons["Premature end of JPEG file"] == 6
    with pytest.raises(DataError, match=r"of 62 images can't be used, more than max_bad_ratio=0.1"):
        pack(real_data / "bad_inputs", tmp_path / "strict", max_bad_ratio=0.1)


@pytest.mark.realdata
def test_cifar_folders_pack_to_the_same_samples(real_data: Path, tmp_path: Path) -> None:
    names = json.loads((real_data / "cifar10/classes.json").read_text())
    expected = []
    with (real_data / "cifar10/test-000000.tar").open("rb") as stream:
        for i, sample in zip(range(600), iter_samples(stream, "cifar"), strict=False):
            label = int(sample.parts["cls"])
            path = tmp_path / "in" / names[label] / f"{i:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sample.image)
            expected.append((label, sample.image))
    pack(tmp_path / "in", tmp_path / "out", samples_per_shard=160, workers=2)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == tuple(sorted(names)) == tuple(names)
    assert manifest.counts.tolist() == [160, 160, 160, 120]
    samples = read_all(tmp_path / "out").values()
    assert sorted((int(s["cls"]), s["jpg"]) for s in samples) == sorted(expected)
    stats = manifest.channel_stats
    assert stats is not None
    np.testing.assert_allclose(stats.mean, [0.491, 0.482, 0.447], atol=0.02)  # CIFAR-10's
    np.testing.assert_allclose(stats.std, [0.247, 0.243, 0.262], atol=0.02)
