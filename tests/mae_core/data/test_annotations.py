"""COCO and VOC files become the JSON of each image; what is wrong in them is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from mae_core.data.annotations import read_annotations
from mae_core.data.boxes import parse_boxes
from mae_core.data.samples import DataError

COCO: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a/one.jpg", "width": 40, "height": 30},
        {"id": 8, "file_name": "two.jpg", "width": 40, "height": 30},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 7, "bbox": [1, 2, 10, 5], "category_id": 9, "area": 50},
        {"id": 2, "image_id": 7, "bbox": [0, 0, 4, 4], "category_id": 3, "iscrowd": 1},
    ],
}


def write_coco(folder: Path, **changes: Any) -> Path:
    file = folder / "instances.json"
    file.write_text(json.dumps({**COCO, **changes}))
    return file


def write_voc(folder: Path, name: str, *boxes: tuple[str, str, str, str, str]) -> Path:
    objects = "".join(
        f"<object><name>{label}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
        f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for label, x0, y0, x1, y1 in boxes
    )
    file = folder / f"{name}.xml"
    size = "<size><width>40</width><height>30</height></size>"
    file.write_text(f"<annotation>{size}{objects}</annotation>")
    return file


def test_coco_boxes_go_with_their_images(tmp_path: Path) -> None:
    found = read_annotations(write_coco(tmp_path))
    assert found.categories == {3: "cat", 9: "dog"}
    assert found.name_of("a/one.jpg") == "a/one.jpg"
    boxes = parse_boxes(found.by_image["a/one.jpg"], "x", {3: 0, 9: 1})
    assert boxes.xyxy.tolist() == [[1, 2, 11, 7], [0, 0, 4, 4]]
    assert boxes.labels.tolist() == [1, 0]
    assert boxes.is_crowd.tolist() == [False, True]
    assert found.name_of("folder/two.jpg") == "two.jpg"
    assert len(parse_boxes(found.by_image["two.jpg"], "x", {}).xyxy) == 0  # listed, without boxes
    assert found.name_of("three.jpg") is None


def test_voc_boxes_go_with_their_images(tmp_path: Path) -> None:
    write_voc(tmp_path, "one", ("WBC", "68", "315.5", "286", "480"))
    (tmp_path / "one.xml").write_text((tmp_path / "one.xml").read_text().replace("30<", "480<"))
    (tmp_path / "one.xml").write_text((tmp_path / "one.xml").read_text().replace("40<", "640<"))
    write_voc(tmp_path, "two", ("RBC", "1", "2", "3", "4"))
    found = read_annotations(tmp_path)
    assert found.categories == {1: "RBC", 2: "WBC"}
    assert found.name_of("images/one.jpg") == "one"
    boxes = parse_boxes(found.by_image["one"], "x", {1: 0, 2: 1})
    assert boxes.xyxy.tolist() == [[68, 315.5, 286, 480]]
    assert boxes.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "is no COCO file"),
        ({"categories": [{"id": 1}]}, "is no COCO file: 'name' is missing"),
        (
            {"annotations": [{"image_id": 99, "bbox": [0, 0, 1, 1], "category_id": 3}]},
            "annotation 1 is of image_id=99",
        ),
        ({"annotations": [{"image_id": 7}]}, "annotation 1 has no bbox or no category_id"),
        ({"images": [*COCO["images"], {"id": 9, "file_name": "two.jpg"}]}, "two.jpg twice"),
    ],
)
def test_a_broken_coco_file_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_annotations(write_coco(tmp_path, **changes))
    assert "instances.json" in str(error.value)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (("a", "5", "5", "5", "9"), r"object 1 has no area: xmin=5 ymin=5 xmax=5 ymax=9"),
        (("a", "5", "x", "6", "9"), "object 1 has no bndbox of four numbers"),
        (("", "5", "5", "6", "9"), "object 1 has no name"),
    ],
)
def test_a_broken_voc_box_is_named(
    tmp_path: Path, box: tuple[str, str, str, str, str], message: str
) -> None:
    write_voc(tmp_path, "one", box)
    with pytest.raises(DataError, match=message) as error:
        read_annotations(tmp_path)
    assert "one.xml" in str(error.value)


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no COCO file and no folder"):
        read_annotations(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no \.xml in it"):
        read_annotations(tmp_path)


def test_real_boxes_without_area_are_named(real_data: Path) -> None:
    """Of the BCCD set: the two files that its users stumble over."""
    with pytest.raises(DataError, match=r"BloodImage_00338\.xml: object \d+ has no area"):
        read_annotations(real_data / "bad_inputs/bad_annotations")


def test_a_real_coco_file_gives_each_image_its_boxes(real_data: Path) -> None:
    found = read_annotations(real_data / "bccd/instances_val.json")
    assert found.categories == {1: "RBC", 2: "WBC", 3: "Platelets"}
    assert len(found.by_image) == 87
    for name, data in found.by_image.items():
        assert len(parse_boxes(data, name, {1: 0, 2: 1, 3: 2}).xyxy) > 0
