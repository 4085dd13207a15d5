"""What classify, detect and segment read in all labels before anything is trained."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mae_core.checkpoint_manifest import CheckpointManifest
from mae_core.config import LossConfig, MaskingConfig, ModelConfig
from mae_core.data.samples import DataError
from pipelines import classify, detect, segment
from pipelines.config.downstream import (
    ClassifyConfig,
    DetectConfig,
    DownstreamConfig,
    SegmentConfig,
)
from pipelines.config.loading import load_config
from pipelines.downstream.run import LabelledData, Study
from pipelines.outcome import ConfigError
from pipelines.reading.shards import open_shards
from tests.pipelines.conftest import png

WriteTar = Callable[[Path, dict[str, bytes]], Path]
ENCODER = CheckpointManifest.model_construct(
    model=ModelConfig(), masking=MaskingConfig(), loss=LossConfig()
)
STUDIES: dict[type[DownstreamConfig], Any] = {
    ClassifyConfig: classify._study,
    DetectConfig: detect._study,
    SegmentConfig: segment._study,
}


class Sets:
    """Tars with labels, and what a stage finds in them."""

    def __init__(self, folder: Path, write_tar: WriteTar) -> None:
        self.folder = folder
        self.write_tar = write_tar

    def add(self, name: str, extension: str, labels: list[bytes], **beside: object) -> str:
        """A folder with a tar of pictures 20 high and 24 wide, and JSON files beside it."""
        members = {}
        for number, label in enumerate(labels):
            members[f"{number}.png"] = png(number)
            members[f"{number}.{extension}"] = label
        self.write_tar(self.folder / name / "a.tar", members)
        for file, content in beside.items():
            (self.folder / name / f"{file}.json").write_text(json.dumps(content))
        return str(self.folder / name)

    def study(
        self, config_type: type[DownstreamConfig], train: list[str], val: str, *words: str
    ) -> Study:
        words = (f"data.train={json.dumps(train)}", f"data.val={val}", "init_from=x", *words)
        config = load_config(config_type, [], words, {})
        opened = [
            open_shards(spec, str(self.folder / f"index{i}"))
            for i, spec in enumerate((tuple(train), val))
        ]
        study: Study = STUDIES[config_type](config, LabelledData(*opened), ENCODER)
        return study


@pytest.fixture
def sets(tmp_path: Path, write_tar: WriteTar) -> Sets:
    return Sets(tmp_path, write_tar)


def boxes(*categories: int, **fields: int) -> bytes:
    items = [{"bbox": [2, 3, 9, 5], "category_id": category} for category in categories]
    return json.dumps({"annotations": items, **fields}).encode()


def mask(*values: int, size: tuple[int, int] = (20, 24), mode: str = "L") -> bytes:
    """Stripes of values."""
    pixels = np.resize(np.asarray(values, np.uint8), size)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


# classify


def test_classes_of_several_sets_are_compared_by_name(sets: Sets) -> None:
    one = sets.add("one", "cls", [b"0", b"1"], classes=["cat", "dog"])
    two = sets.add("two", "cls", [b"0", b"1"], classes=["dog", "fox"])
    val = sets.add("val", "cls", [b"0", b"1"], classes=["cat", "fox"])
    study = sets.study(ClassifyConfig, [one, two], val)
    assert study.names == ("cat", "dog", "fox")
    assert list(study.strata) == [(0,), (1,), (1,), (2,)]
    assert study.numbers[val] == {0: 0, 1: 2}


def test_given_names_do_not_change_what_the_numbers_mean(sets: Sets) -> None:
    train = sets.add("train", "cls", [b"0", b"1", b"2"], classes=["cat", "dog", "fox"])
    val = sets.add("val", "cls", [b"0", b"1"], classes=["cat", "fox"])
    study = sets.study(ClassifyConfig, [train], val, "classify.names=[cat,dog,fox]")
    assert study.numbers[val] == {0: 0, 1: 2}


def test_given_names_number_a_training_set_without_any(sets: Sets) -> None:
    train = sets.add("train", "cls", [b"0", b"1", b"2"])
    val = sets.add("val", "cls", [b"0", b"1"], classes=["cat", "fox"])
    study = sets.study(ClassifyConfig, [train], val, "classify.names=[cat,dog,fox]")
    assert study.numbers == {val: {0: 0, 1: 2}}
    with pytest.raises(DataError, match=r"data\.val names its classes cat, fox; data\.train only"):
        sets.study(ClassifyConfig, [train], val)


def test_a_validation_class_that_training_does_not_know_is_named(sets: Sets) -> None:
    train = sets.add("train", "cls", [b"0", b"1"], classes=["cat", "dog"])
    val = sets.add("val", "cls", [b"0", b"1"], classes=["cat", "fox"])
    with pytest.raises(DataError, match=r"val/a.tar: 1: class 1, but there are 2: cat, dog"):
        sets.study(ClassifyConfig, [train], val)


def test_a_class_that_no_training_sample_has_is_told(
    sets: Sets, caplog: pytest.LogCaptureFixture
) -> None:
    train = sets.add("train", "cls", [b"0", b"1"])
    with caplog.at_level(logging.WARNING):
        sets.study(ClassifyConfig, [train], train, "classify.names=[cat,dog,fox]")
    assert "classify.names: no sample of data.train has the class fox" in caplog.text


# detect


def test_categories_of_several_sets_are_compared_by_name(sets: Sets) -> None:
    one = sets.add("one", "json", [boxes(1, 2)], categories=named("cat", "dog"))
    two = sets.add("two", "json", [boxes(1, 2)], categories=named("dog", "fox"))
    val = sets.add("val", "json", [boxes(1)], categories=named("fox"))
    study = sets.study(DetectConfig, [one, two], val)
    assert (study.names, study.identifiers) == (("cat", "dog", "fox"), (1, 2, 3))
    assert study.numbers == {one: {1: 0, 2: 1}, two: {1: 1, 2: 2}, val: {1: 2}}


def named(*names: str) -> list[dict[str, object]]:
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


def test_given_categories_do_not_change_what_the_numbers_mean(sets: Sets) -> None:
    train = sets.add("train", "json", [boxes(1, 2)], categories=named("cat", "fox"))
    val = sets.add("val", "json", [boxes(1)], categories=named("fox"))
    study = sets.study(DetectConfig, [train], val, "detect.categories={1: cat, 2: fox}")
    assert study.numbers[val] == {1: 1}


def test_categories_without_names_are_compared_by_number(sets: Sets) -> None:
    train = sets.add("train", "json", [boxes(3, 7)])
    study = sets.study(DetectConfig, [train], train)
    assert (study.names, study.identifiers) == (("3", "7"), (3, 7))
    assert study.numbers == {train: {3: 0, 7: 1}}


def test_a_category_that_no_training_box_has_is_told(
    sets: Sets, caplog: pytest.LogCaptureFixture
) -> None:
    train = sets.add("train", "json", [boxes(1)])
    with caplog.at_level(logging.WARNING):
        sets.study(DetectConfig, [train], train, "detect.categories={1: cat, 2: fox}")
    assert "detect.categories: no sample of data.train has the class fox" in caplog.text


@pytest.mark.parametrize("which", ["train", "val"])
def test_boxes_of_another_picture_size_are_told_before_training(sets: Sets, which: str) -> None:
    good = sets.add("good", "json", [boxes(1, width=24, height=20)])
    bad = sets.add("bad", "json", [boxes(1, width=240, height=200)])
    with pytest.raises(DataError, match=r"bad/a.tar: 0: .*240x200, the picture is 24x20"):
        sets.study(
            DetectConfig, [bad if which == "train" else good], bad if which == "val" else good
        )


# segment

TWO = "segment.names=[background,lesion]"


def test_masks_of_0_and_255_are_refused_naming_the_way_out(sets: Sets) -> None:
    train = sets.add("train", "seg.png", [mask(0, 0, 0, 255)] * 3)
    with pytest.raises(DataError) as error:
        sets.study(SegmentConfig, [train], train, TWO)
    assert str(error.value) == (
        "segment.names: class 1 (lesion) is in no mask of data.train, and 255 (ignored) covers "
        "25 % of it, in 3 of 3 masks: are these masks of 0 and 255? Then give "
        "segment.values=[0,255]; there is nothing to tell apart"
    )
    study = sets.study(SegmentConfig, [train], train, TWO, "segment.values=[0,255]")
    assert study.names == ("background", "lesion")


def test_a_class_of_several_that_no_mask_has_is_told(
    sets: Sets, caplog: pytest.LogCaptureFixture
) -> None:
    train = sets.add("train", "seg.png", [mask(0, 1)])
    with caplog.at_level(logging.WARNING):
        sets.study(SegmentConfig, [train], train, "segment.names=[a,b,c]")
    assert "segment.names: class 2 (c) is in no mask of data.train" in caplog.text
    assert "255" not in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (mask(0, 1, 127), r"has 127 in .* the classes are 0\.\.1 .*segment\.values lists"),
        (mask(0, 1, mode="RGB"), "is RGB, not grey or palette"),
        (mask(0, 1, size=(24, 20)), "the image is 20x24, its label map 24x20"),
        (b"no picture", "is not a PNG"),
        (b"", "has no label map"),
    ],
    ids=["value", "colour", "size", "not-a-png", "empty"],
)
@pytest.mark.parametrize("which", ["train", "val"])
def test_a_mask_that_can_not_be_used_is_told_before_training(
    sets: Sets, data: bytes, message: str, which: str
) -> None:
    good = sets.add("good", "seg.png", [mask(0, 1)] * 2)
    bad = sets.add("bad", "seg.png", [mask(0, 1), data])
    train, val = (bad, good) if which == "train" else (good, bad)
    with pytest.raises(DataError, match=rf"bad/a\.tar: 1: .*{message}"):
        sets.study(SegmentConfig, [train], val, TWO)


def test_a_palette_mask_is_read_by_its_indices(sets: Sets) -> None:
    image = Image.fromarray(np.resize(np.uint8([0, 1]), (20, 24)))
    image.putpalette([0, 0, 0, 255, 0, 0])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    train = sets.add("train", "seg.png", [buffer.getvalue()])
    assert sets.study(SegmentConfig, [train], train, TWO).names == ("background", "lesion")


def test_masks_without_any_instance_are_refused(sets: Sets) -> None:
    train = sets.add("train", "seg.png", [mask(0)])
    with pytest.raises(DataError, match=r"class 1 \(inside\), class 2 \(boundary\) is in no mask"):
        sets.study(SegmentConfig, [train], train, "segment.masks=instances")


def test_the_ceiling_of_the_heads_grid_is_known_before_training(
    sets: Sets, caplog: pytest.LogCaptureFixture
) -> None:
    numbers = np.zeros((20, 24), np.uint8)
    numbers[2:8, 2:8] = 1
    numbers[10:18, 10:18] = 2
    buffer = io.BytesIO()
    Image.fromarray(numbers).save(buffer, "PNG")
    data = sets.add("data", "seg.png", [buffer.getvalue()] * 2)
    words = ("segment.masks=instances", "segment.boundary=1")
    with caplog.at_level(logging.INFO):
        coarse = sets.study(SegmentConfig, [data], data, *words).ceiling
    assert "one place for 4x4 pixels) reaches miou 0." in caplog.text
    exact = sets.study(SegmentConfig, [data], data, *words, "segment.stride=1").ceiling
    assert set(exact.values()) == {1.0}
    assert {"ceiling/miou", "ceiling/iou/boundary", "ceiling/foreground_iou"} <= set(exact)
    assert coarse["ceiling/miou"] < 0.8
    assert coarse["ceiling/foreground_iou"] < 1.0
    with pytest.raises(ConfigError, match=r"segment\.stride=3 .*patches of 16 pixels"):
        sets.study(SegmentConfig, [data], data, *words, "segment.stride=3")
