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
    boxes = parse_boxes(found.by_image["a/one.jpg"], "x", {3: 0, 9: 1})
    assert boxes.xyxy.tolist() == [[1, 2, 11, 7], [0, 0, 4, 4]]
    assert boxes.labels.tolist() == [1, 0]
    assert boxes.is_crowd.tolist() == [False, True]
    assert len(parse_boxes(found.by_image["two.jpg"], "x", {}).xyxy) == 0  # listed, without boxes
    sources = ["a/one.jpg", "folder/two.jpg", "three.jpg"]
    assert found.names_of(sources) == {"a/one.jpg": "a/one.jpg", "folder/two.jpg": "two.jpg"}


def test_voc_boxes_go_with_their_images(tmp_path: Path) -> None:
    write_voc(tmp_path, "one", ("WBC", "68", "315.5", "286", "480"))
    (tmp_path / "one.xml").write_text((tmp_path / "one.xml").read_text().replace("30<", "480<"))
    (tmp_path / "one.xml").write_text((tmp_path / "one.xml").read_text().replace("40<", "640<"))
    write_voc(tmp_path, "two", ("RBC", "1", "2", "3", "4"))
    found = read_annotations(tmp_path)
    assert found.categories == {1: "RBC", 2: "WBC"}
    assert found.names_of(["images/one.jpg"]) == {"images/one.jpg": "one"}
    boxes = parse_boxes(found.by_image["one"], "x", {1: 0, 2: 1})
    assert boxes.xyxy.tolist() == [[68, 315.5, 286, 480]]
    assert boxes.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "not a COCO file"),
        ({"categories": [{"id": 1}]}, "not a COCO file: 'name' is missing"),
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
    with pytest.raises(DataError, match="neither a COCO file nor a folder"):
        read_annotations(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no \.xml in it"):
        read_annotations(tmp_path)


def test_real_boxes_without_area_are_named(real_data: Path) -> None:
    """Test the two files of the BCCD set with known problems."""
    with pytest.raises(DataError, match=r"BloodImage_00338\.xml: object \d+ has no area"):
        read_annotations(real_data / "bad_inputs/bad_annotations")


def test_a_real_coco_file_gives_each_image_its_boxes(real_data: Path) -> None:
    found = read_annotations(real_data / "bccd/instances_val.json")
    assert found.categories == {1: "RBC", 2: "WBC", 3: "Platelets"}
    assert len(found.by_image) == 87
    for name, data in found.by_image.items():
        assert len(parse_boxes(data, name, {1: 0, 2: 1, 3: 2}).xyxy) > 0


VOC_TEXT = (
    '<?xml version="1.0" encoding="{encoding}"?><annotation><object><name>\u72d7</name><bndbox>'
    "<xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>21</ymax></bndbox></object></annotation>"
)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "gb2312", "GBK", "utf-16", "utf-16-le", "big5", "shift_jis"]
)
def test_voc_files_are_read_in_their_encoding(tmp_path: Path, encoding: str) -> None:
    text = VOC_TEXT.format(encoding=encoding)
    (tmp_path / "one.xml").write_bytes(text.encode(encoding))
    assert read_annotations(tmp_path).categories == {1: "\u72d7"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (VOC_TEXT.format(encoding="utf-8").encode("gbk"), r"one\.xml: is not utf-8 .*save it as"),
        (VOC_TEXT.format(encoding="klingon").encode(), r"one\.xml: cannot be read .*klingon"),
        (VOC_TEXT.format(encoding="hex").encode(), r"one\.xml: cannot be read"),
        (b"", r"one\.xml: cannot be read"),
        (b"\xff\xfe\x00", r"one\.xml: is not utf-16"),
        (b'<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>', r"one\.xml: has a DOCTYPE or entities"),
        (
            '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>'.encode("utf-16"),
            r"one\.xml: has a DOCTYPE or entities",
        ),
    ],
)
def test_a_voc_file_that_can_not_be_read_is_named(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "one.xml").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_annotations(tmp_path)


def test_hidden_files_are_no_annotations(tmp_path: Path) -> None:
    write_voc(tmp_path, "one", ("cat", "1", "2", "3", "4"))
    (tmp_path / "one.xml").rename(tmp_path / "one.XML")
    for name in ("._one.xml", ".git/two.xml", "__MACOSX/one.xml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    assert list(read_annotations(tmp_path).by_image) == ["one"]


def test_the_entry_with_most_folders_in_common_is_the_images(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    write_voc(tmp_path / "x", "1", ("cat", "1", "2", "3", "4"))
    write_voc(tmp_path / "y", "1", ("cat", "5", "6", "7", "8"))
    found = read_annotations(tmp_path)
    assert found.names_of(["set/x/1.jpg", "y/1.jpg"]) == {"set/x/1.jpg": "x/1", "y/1.jpg": "y/1"}
    with pytest.raises(DataError, match=r"1 may have the boxes of x/1 or y/1; add the folders"):
        found.names_of(["1.jpg"])


@pytest.mark.parametrize("name", ["images/a.jpg", "C:\\set\\a.jpg", "/data/me/a.jpg", "../a.jpg"])
def test_folders_in_a_coco_file_may_be_those_of_another_machine(tmp_path: Path, name: str) -> None:
    images = [{"id": 1, "file_name": name}]
    found = read_annotations(write_coco(tmp_path, images=images, annotations=[]))
    assert found.names_of(["a.jpg", "b.jpg"]) == {"a.jpg": name}


def test_a_size_that_nobody_knew_is_left_out(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.jpg", "width": 0, "height": 0}]
    boxes = [
        {"image_id": 7, "bbox": [1, 2, 3, 4], "category_id": 3, "segmentation": {"counts": []}}
    ]
    found = read_annotations(write_coco(tmp_path, images=images, annotations=boxes))
    assert json.loads(found.by_image["a.jpg"]) == {
        "annotations": [{"bbox": [1, 2, 3, 4], "category_id": 3, "iscrowd": 0}]
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [*COCO["images"], {"id": 7, "file_name": "b.jpg"}]}, "images has the id 7"),
        ({"categories": [*COCO["categories"], {"id": 3, "name": "x"}]}, "has the id 3 twice"),
        (
            {"annotations": [{"image_id": 7, "bbox": [0, 0, 1, 1], "category_id": 4}]},
            "annotation 1 has category_id=4, which categories does not list",
        ),
        (
            {"annotations": [{"image_id": 7, "bbox": [0, 0, 1, 1], "category_id": "3"}]},
            "annotation 1 has category_id='3'",
        ),
    ],
)
def test_what_a_coco_file_says_twice_or_not_at_all_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_annotations(write_coco(tmp_path, **changes))


def test_the_other_kind_of_file_is_advised(tmp_path: Path) -> None:
    coco = write_coco(tmp_path)
    with pytest.raises(DataError, match=f"for a COCO file give the file: annotations={coco}"):
        read_annotations(tmp_path)
    with pytest.raises(DataError, match="give the folder of the VOC files"):
        read_annotations(write_voc(tmp_path, "one", ("cat", "1", "2", "3", "4")))
    coco.write_bytes(json.dumps({"x": "\u72d7"}, ensure_ascii=False).encode("gbk"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        read_annotations(coco)


def test_given_categories_keep_their_numbers(tmp_path: Path) -> None:
    write_voc(tmp_path, "one", ("dog", "1", "2", "3", "4"))
    found = read_annotations(tmp_path).renumbered({1: "cat", 2: "dog"})
    assert found.categories == {1: "cat", 2: "dog"}
    assert json.loads(found.by_image["one"])["annotations"][0]["category_id"] == 2
    with pytest.raises(DataError, match="one has a box of dog, which is not among the given"):
        read_annotations(tmp_path).renumbered({1: "cat"})
