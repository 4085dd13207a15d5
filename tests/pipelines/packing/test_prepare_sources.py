"""`mae prepare` reports what it finds and never mixes different sources in one set."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mae_core.data.samples import DataError
from pipelines import cli, prepare
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import ConfigError
from tests.pipelines.packed_sets import (
    BLACK,
    WHITE,
    contents,
    pack,
    read_all,
    read_manifest,
    write_image,
    written,
)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Pack four pictures with a label each, in two shards of two."""
    (tmp_path / "flat").mkdir()
    for i in range(4):
        (tmp_path / f"flat/{i}.png").write_bytes(BLACK)
        (tmp_path / f"flat/{i}.json").write_text('{"label": 3}')
    return tmp_path / "flat"


def edit_label(flat: Path) -> None:
    (flat / "0.json").write_text('{"label": 7}')


def edit_picture(flat: Path) -> None:
    (flat / "0.png").write_bytes(WHITE)


@pytest.mark.parametrize("edit", [edit_label, edit_picture])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_of_the_same_size_that_was_edited_is_other_images(
    flat: Path, tmp_path: Path, edit: Callable[[Path], None], workers: int
) -> None:
    pack(flat, tmp_path / "out", samples_per_shard=2)
    before, times = written(tmp_path / "out"), {p: p.stat() for p in flat.iterdir()}
    assert pack(flat, tmp_path / "out", samples_per_shard=2).status == "reused"
    edit(flat)
    for path, facts in times.items():  # a clock says nothing
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    with pytest.raises(
        ConfigError, match=r"1 of 2 images .* changed since, such as 0\.png; .*fresh"
    ):
        pack(flat, tmp_path / "out", samples_per_shard=2, workers=workers)
    assert written(tmp_path / "out") == before
    assert pack(flat, tmp_path / "out", samples_per_shard=2, fresh=True).status == "done"
    packed = read_all(tmp_path / "out")["0"]
    assert packed == {n: (flat / f"0.{n}").read_bytes() for n in ("png", "json")}


def test_a_stopped_run_does_not_mix_old_and_new(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out", samples_per_shard=2)
    (tmp_path / "out/manifest.json").unlink()
    (shard,) = (
        path.stem for path in (tmp_path / "out").glob("*.tar") if b"0.png" not in path.read_bytes()
    )
    (tmp_path / f"out/.prepare/{shard}.json").unlink()  # as if it had been stopped before it
    edit_label(flat)
    with pytest.raises(ConfigError, match=r"changed since, such as 0\.png"):
        pack(flat, tmp_path / "out", samples_per_shard=2)
    assert not (tmp_path / "out/manifest.json").exists()


def test_copies_and_new_times_are_the_same_images(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out", samples_per_shard=2)
    flat.rename(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        path.touch()
    result = pack(tmp_path / "elsewhere", tmp_path / "out", samples_per_shard=2)
    assert result.status == "reused"


def test_records_of_an_earlier_version_are_packed_again(flat: Path, tmp_path: Path) -> None:
    pack(flat, tmp_path / "out", samples_per_shard=2)
    expected = contents(tmp_path / "out")
    edit_label(flat)
    for path in (tmp_path / "out/.prepare").glob("train-*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({k: record[k] for k in ("plan", "shard", "skipped", "pixels")}))
    assert pack(flat, tmp_path / "out", samples_per_shard=2).status == "done"
    assert read_all(tmp_path / "out")["0"]["json"] == b'{"label": 7}'
    assert contents(tmp_path / "out").keys() == expected.keys()


def test_a_list_file_with_other_labels_is_other_images(flat: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.csv"
    listing.write_text("flat/0.png,3\nflat/1.png,4\n")
    pack(listing, tmp_path / "out")
    listing.write_text("flat/0.png,4\nflat/1.png,3\n")
    with pytest.raises(ConfigError, match="the files differ"):
        pack(listing, tmp_path / "out")


def test_links_to_nowhere_are_left_out_and_counted(flat: Path, tmp_path: Path) -> None:
    (flat / "gone.png").symlink_to("/nowhere/gone.png")
    (flat / "1.json").unlink()
    (flat / "1.json").symlink_to("/nowhere/1.json")
    with pytest.raises(DataError) as error:
        pack(flat, tmp_path / "out")
    text = str(error.value)
    assert text.startswith("2 of 5 images can't be used")
    assert "1 x a link to a missing file" in text
    assert "/nowhere/" in text
    result = pack(flat, tmp_path / "out", max_bad_ratio=0.5)
    assert (result.metrics["num_samples"], result.metrics["num_skipped"]) == (3, 2)
    lines = (tmp_path / "out/skipped.jsonl").read_text().splitlines()
    reasons = {line["source"]: line["reason"] for line in map(json.loads, lines)}
    assert "(/nowhere/gone.png;" in reasons["gone.png"]
    assert reasons["1.png"].startswith("its .json is a link to a missing file (/nowhere/1")
    assert pack(flat, tmp_path / "out", max_bad_ratio=0.5).status == "reused"


def test_a_broken_image_whose_name_is_not_utf8_is_listed(flat: Path, tmp_path: Path) -> None:
    (flat / "caf\udce9.png").write_bytes(b"no picture")
    pack(flat, tmp_path / "out", max_bad_ratio=0.5)
    assert json.loads((tmp_path / "out/skipped.jsonl").read_text())["source"] == "caf\\xe9.png"


def test_what_was_found_is_said(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (photos / "cat/000.json").write_text("{}")
    (photos / "cat/000.txt").write_text("a cat")
    (photos / "owl/gone.jpg").symlink_to("/nowhere")
    with caplog.at_level(logging.INFO):
        pack(photos, tmp_path / "out")
    assert "31 images of 3 classes: cat (10), dog (10), owl (11)" in caplog.text
    assert "beside them: 1 .json, 1 .txt" in caplog.text
    assert "1 can't be read: 1 x a link to a missing file" in caplog.text


def test_images_with_nothing_beside_them_are_told_in_words(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        pack(photos, tmp_path / "out")
    assert "no boxes, masks or other files beside them" in caplog.text


@pytest.mark.parametrize(
    ("values", "told", "warned"),
    [
        ([0, 255], "2 masks with 2 values: 0 (in 2), 255 (in 2)", "write 1 instead of 255"),
        ([0, 0], "2 masks with 1 values: 0 (in 2)", "the masks only contain 0"),
        ([0, 1], "2 masks with 2 values: 0 (in 2), 1 (in 2)", None),
        ([1, 255], "2 masks with 2 values: 1 (in 2), 255 (in 2)", None),
    ],
)
def test_what_masks_hold_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    values: list[int],
    told: str,
    warned: str | None,
) -> None:
    for i in range(2):
        write_image(tmp_path / f"in/{i}.png", np.zeros((4, 2, 3), np.uint8))
        write_image(tmp_path / f"in/{i}.seg.png", np.asarray([values] * 4, np.uint8))
    with caplog.at_level(logging.INFO):
        pack(tmp_path / "in", tmp_path / "out", samples_per_shard=1)
    assert told in caplog.text
    assert ("only background is left to learn" in caplog.text) == (warned is not None)
    assert (warned or "") in caplog.text


def test_masks_of_another_size_or_in_colour_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        write_image(tmp_path / f"in/{i}.png", np.zeros((4, 2, 3), np.uint8))
    write_image(tmp_path / "in/0.seg.png", np.zeros((5, 2), np.uint8))
    write_image(tmp_path / "in/1.seg.png", np.zeros((4, 2, 3), np.uint8))
    pack(tmp_path / "in", tmp_path / "out", max_bad_ratio=0.5)
    assert "1 masks can't be read as class numbers" in caplog.text
    skipped = json.loads((tmp_path / "out/skipped.jsonl").read_text())
    assert skipped == {"source": "0.png", "reason": "the image is 4x2, its label map 5x2"}


def test_a_validation_set_gets_the_numbers_of_the_training_set(
    photos: Path, tmp_path: Path
) -> None:
    pack(photos, tmp_path / "train")
    for path in (photos / "cat").iterdir():
        path.unlink()
    pack(photos, tmp_path / "val", classes=str(tmp_path / "train"))
    assert read_manifest(tmp_path / "val").classes == ("cat", "dog", "owl")
    labels = {key[:3]: parts["cls"] for key, parts in read_all(tmp_path / "val").items()}
    assert labels == {"dog": b"1", "owl": b"2"}
    (photos / "emu").mkdir()
    (photos / "emu/1.png").write_bytes(BLACK)
    with pytest.raises(DataError, match="not among the given ones: emu; given are cat, dog, owl"):
        pack(photos, tmp_path / "other", classes=str(tmp_path / "train"))


def test_a_set_without_names_gives_no_numbers(flat: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no manifest\.json"):
        pack(flat, tmp_path / "out", classes=str(tmp_path / "nothing"))
    pack(flat, tmp_path / "out")
    with pytest.raises(ConfigError, match="has no names of classes or categories"):
        pack(flat, tmp_path / "val", classes=str(tmp_path / "out"))


def test_a_source_that_is_no_folder_of_this_machine_is_told(tmp_path: Path) -> None:
    config = PrepareConfig(source="s3://bucket/photos", output=str(tmp_path))
    with pytest.raises(
        ConfigError, match="s3://bucket/photos: images are read from local folders only"
    ):
        prepare.run(config, fresh=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_place_that_can_not_be_written_is_told_in_one_line(
    flat: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    words = [str(flat), "/proc/none", f"workers={workers}", "samples_per_shard=2"]
    assert cli.main(["prepare", *words]) == 5
    lines = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("infrastructure error: cannot write /proc/none/")
