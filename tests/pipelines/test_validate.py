"""The gate before training: each check accepts valid data and refuses invalid data."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from infra.own_files import DamagedFileError
from mae_core.data.decode import encode_jpeg
from pipelines.config.validate import ValidateConfig
from pipelines.outcome import RefusedError, StageResult
from pipelines.validate import run

WriteTar = Callable[[Path, dict[str, bytes]], Path]
MakePng = Callable[[int], bytes]


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., StageResult]:
    def check(data: Any, **fields: Any) -> StageResult:
        raw = {"data": data, "storage": {"root": str(tmp_path / "runs")}, **fields}
        return run(ValidateConfig.model_validate(raw), fresh=False)

    return check


@pytest.fixture
def shards(tmp_path: Path, write_tar: WriteTar, make_png: MakePng) -> Callable[..., str]:
    """Write a tar of `count` labelled images, in which members may be replaced or left out."""

    def make(name: str = "data", count: int = 8, first: int = 0, **members: bytes | None) -> str:
        files: dict[str, bytes] = {}
        for i in range(count):
            files[f"{i:03d}.png"] = make_png(first + i)
            files[f"{i:03d}.cls"] = str(i % 4).encode()
        for key, data in members.items():
            name_in_tar = key.removeprefix("_").replace("__", ".")
            if data is None:
                del files[name_in_tar]
            else:
                files[name_in_tar] = data
        write_tar(tmp_path / name / "a.tar", dict(sorted(files.items())))
        return str(tmp_path / name)

    return make


def test_what_is_right_passes_and_is_counted(
    check: Callable[..., StageResult], shards: Callable[..., str]
) -> None:
    result = check(shards(), labels="class", num_classes=4)
    assert result.metrics == {
        "num_samples": 8,
        "left_out_ratio": 0,
        "bad_ratio": 0,
        "label_error_ratio": 0,
        "duplicate_ratio": 0,
    }
    found = json.loads(Path(result.output).read_text())
    assert found["profile"]["classes"] == {"0": 0.25, "1": 0.25, "2": 0.25, "3": 0.25}
    assert len(found["profile"]["mean"]) == 3


@pytest.mark.parametrize(
    ("members", "fields", "row", "example"),
    [
        ({}, {"min_samples": 9}, "num samples", ""),
        ({"_003__png": b"no picture"}, {}, "bad ratio", "003"),
        ({"_003__cls": b"9"}, {}, "label error ratio", "class 9 is not in 0 to 3"),
        ({"_003__cls": b"cat"}, {}, "label error ratio", "003"),
        ({"_003__cls": None}, {}, "label error ratio", "003"),
        ({"_003__png": None}, {}, "left out ratio", "1 x no_image"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(
    check: Callable[..., StageResult],
    shards: Callable[..., str],
    members: dict[str, bytes | None],
    fields: dict[str, Any],
    row: str,
    example: str,
) -> None:
    data = shards(**members)
    with pytest.raises(RefusedError) as caught:
        check(data, labels="class", num_classes=4, **fields)
    refused = [line for line in str(caught.value).splitlines() if "REFUSED" in line]
    assert len(refused) == 1
    assert row in refused[0]
    assert example in str(caught.value)
    # With more patience it passes, and is counted.
    patient = {"max_bad_ratio": 0.5, "max_label_errors": 0.5, "min_samples": 1}
    assert check(data, labels="class", num_classes=4, **patient).status == "done"


def test_an_image_of_training_in_validation_is_a_duplicate(
    check: Callable[..., StageResult], shards: Callable[..., str], make_png: MakePng
) -> None:
    train = shards("train")
    val = shards("val", first=100, _005__png=make_png(2))
    with pytest.raises(RefusedError, match=r"val/a.tar: 005 is the image of .*train/a.tar: 002"):
        check([train, val], labels="class")
    assert check([train, val], max_duplicates=0.1).metrics["duplicate_ratio"] == 1 / 16


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([{"bbox": [1, 1, 5, 5], "category_id": 2}], None),
        ([{"bbox": [1, 1, 5, 5], "category_id": 4}], "class 4 is not in 1 to 3"),
        ([{"bbox": [1, 1, -5, 5], "category_id": 1}], "000"),
        ([{"bbox": [200, 200, 50, 50], "category_id": 1}], "lies outside the picture"),
    ],
)
def test_boxes_are_read_as_detection_reads_them(
    check: Callable[..., StageResult],
    shards: Callable[..., str],
    boxes: list[Any],
    message: str | None,
) -> None:
    good = json.dumps({"annotations": []}).encode()
    members = {f"_{i:03d}__json": good for i in range(1, 8)}
    data = shards(_000__json=json.dumps({"annotations": boxes}).encode(), **members)
    if message is None:
        assert check(data, labels="boxes", num_classes=3).metrics["label_error_ratio"] == 0
    else:
        with pytest.raises(RefusedError, match=message):
            check(data, labels="boxes", num_classes=3)


def test_a_label_of_another_picture_size_is_refused(
    check: Callable[..., StageResult], shards: Callable[..., str]
) -> None:
    boxes = json.dumps({"annotations": [], "width": 480, "height": 400}).encode()
    data = shards(count=1, _000__json=boxes)
    with pytest.raises(RefusedError, match=r"000: .*the \.json says 480x400, the picture is"):
        check(data, labels="boxes")
    mask = io.BytesIO()
    Image.new("L", (480, 400)).save(mask, "PNG")
    data = shards("masked", count=1, _000__seg__png=mask.getvalue())
    with pytest.raises(RefusedError, match=r"000: the image is .*, its label map 400x480"):
        check(data, labels="mask")


def test_drift_is_measured_from_the_last_that_passed(
    tmp_path: Path,
    check: Callable[..., StageResult],
    write_tar: WriteTar,
    shards: Callable[..., str],
) -> None:
    reference = str(tmp_path / "last_good.json")
    fields = {"labels": "class", "reference": reference}
    first = check(shards("first"), **fields)
    assert not any(name.startswith("drift") for name in first.metrics)
    again = check(shards("again", first=500), **fields)
    assert 0 < again.metrics["drift_mean"] < 0.05
    before = Path(reference).read_text()
    # Another share of the classes: 7 of 8 in class 0, which were 2 of 8.
    with pytest.raises(RefusedError, match=r"drift classes +0\.625"):
        check(shards("skewed", **{f"_{i:03d}__cls": b"0" for i in range(7)}), **fields)
    assert Path(reference).read_text() == before, "what was refused is no reference"


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"mean": null, "std": [1], "classes": {}}', '{"mean": ["x"], "std": [1]}'],
)
def test_a_damaged_reference_is_named(
    text: str, tmp_path: Path, check: Callable[..., StageResult], shards: Callable[..., str]
) -> None:
    reference = tmp_path / "last_good.json"
    reference.write_text(text)
    with pytest.raises(DamagedFileError, match=r"last_good\.json is damaged .*; reference=\.\.\."):
        check(shards("first"), reference=str(reference))
    assert reference.read_text() == text


def test_dark_images_drift_from_noise(
    tmp_path: Path, check: Callable[..., StageResult], shards: Callable[..., str]
) -> None:
    reference = str(tmp_path / "last_good.json")
    check(shards("first"), reference=reference)
    dark = {f"_{i:03d}__png": encode_jpeg(np.full((20, 24, 3), i, np.uint8), 90) for i in range(8)}
    with pytest.raises(RefusedError, match=r"drift mean .*REFUSED\n.*->"):
        check(shards("dark", **dark), reference=reference)


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("data", "fields"),
    [
        ("cifar10/test-000000.tar", {"labels": "class", "num_classes": 10}),
        ("bccd", {"labels": "boxes"}),
        ("dsb2018_nuclei", {"labels": "mask"}),
    ],
)
def test_real_sets_pass(
    real_data: Path, check: Callable[..., StageResult], data: str, fields: dict[str, Any]
) -> None:
    result = check(str(real_data / data), max_images=100, max_duplicates=0.05, **fields)
    assert result.metrics["bad_ratio"] == 0
    assert result.metrics["label_error_ratio"] == 0
