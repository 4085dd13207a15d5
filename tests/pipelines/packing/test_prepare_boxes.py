"""`mae prepare annotations=...`: boxes go into the shards, and their names beside them."""

import json
import tarfile
from pathlib import Path

import pytest

from mae_core.data.decode import decode_image
from mae_core.data.samples import DataError
from pipelines import prepare
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import ConfigError
from tests.pipelines.packed_sets import read_all


def write_coco(photos: Path, *, images: int) -> Path:
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.*"))[:images]
    sizes = [decode_image((photos / name).read_bytes(), 3).shape for name in files]
    coco = {
        "images": [
            {"id": i, "file_name": name, "width": size[1], "height": size[0]}
            for i, (name, size) in enumerate(zip(files, sizes, strict=True))
        ],
        "categories": [{"id": 5, "name": "nose"}],
        "annotations": [{"image_id": 0, "bbox": [1, 1, 2, 2], "category_id": 5}],
    }
    file = photos.parent / "instances.json"
    file.write_text(json.dumps(coco))
    return file


def pack(photos: Path, output: Path, **more: object) -> str:
    config = PrepareConfig.model_validate(
        {"source": str(photos), "output": str(output), "workers": 1, **more}
    )
    return prepare.run(config, fresh=False).status


def boxes_in(output: Path) -> dict[str, int]:
    found = {}
    for path in sorted(output.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    found[member.name] = len(json.loads(stream.read())["annotations"])
    return found


def test_boxes_of_a_coco_file_are_packed_with_their_images(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    assert pack(photos, tmp_path / "out", annotations=str(coco)) == "done"
    found = boxes_in(tmp_path / "out")
    assert len(found) == 30
    assert sorted(found.values()) == [0] * 29 + [1]
    names = json.loads((tmp_path / "out/categories.json").read_text())
    assert names == [{"id": 5, "name": "nose"}]
    assert pack(photos, tmp_path / "out", annotations=str(coco)) == "reused"


def test_other_boxes_are_another_set(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    pack(photos, tmp_path / "out", annotations=str(coco))
    coco.write_text(coco.read_text().replace("[1, 1, 2, 2]", "[1, 1, 2, 3]"))
    with pytest.raises(ConfigError, match="packed from other images or"):
        pack(photos, tmp_path / "out", annotations=str(coco))


def test_images_that_the_file_does_not_list_are_said(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack(photos, tmp_path / "out", annotations=str(write_coco(photos, images=28)))
    assert "nothing on 2 images" in caplog.text
    assert len(boxes_in(tmp_path / "out")) == 28


def test_boxes_of_other_images_are_refused(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    coco.write_text(coco.read_text().replace('file_name": "', 'file_name": "x'))
    with pytest.raises(DataError, match="has none of the images"):
        pack(photos, tmp_path / "out", annotations=str(coco))


def test_an_image_with_boxes_from_two_places_is_refused(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    image = sorted(photos.rglob("*.*"))[0]
    image.with_suffix(".json").write_text("{}")
    with pytest.raises(DataError, match=r"has a \.json next to it and also boxes in annotations"):
        pack(photos, tmp_path / "out", annotations=str(coco))


def test_boxes_that_may_be_of_two_images_are_refused(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    names = json.loads(coco.read_text())["images"]
    first = photos / names[0]["file_name"]
    (photos / "dog" / first.name).write_bytes(first.read_bytes())
    coco.write_text(coco.read_text().replace(names[0]["file_name"], first.name))
    with pytest.raises(DataError, match=rf"{first.name} may belong to .* or .*{first.name}"):
        pack(photos, tmp_path / "out", annotations=str(coco))


def test_other_names_of_the_categories_are_another_set(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    pack(photos, tmp_path / "out", annotations=str(coco))
    coco.write_text(coco.read_text().replace("nose", "ear"))
    with pytest.raises(ConfigError, match="categories"):
        pack(photos, tmp_path / "out", annotations=str(coco))


def test_boxes_do_not_fit_transcoded_images(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    with pytest.raises(ConfigError, match="has boxes or a mask"):
        pack(photos, tmp_path / "out", annotations=str(coco), transcode_short_side=4)


def test_boxes_of_larger_pictures_are_refused(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    coco.write_text(coco.read_text().replace('"width": 8', '"width": 80'))
    with pytest.raises(DataError) as error:
        pack(photos, tmp_path / "out", annotations=str(coco))
    assert "30 x its boxes are for another picture size; the first is " in str(error.value)
    assert "(the .json says 80x6, the picture is 8x6; scale the boxes" in str(error.value)
    # Without a size in the file, the boxes tell.
    text = (
        coco.read_text().replace('"width": 80', '"width": 0').replace("[1, 1, 2, 2]", "[9,1,2,2]")
    )
    coco.write_text(text)
    assert pack(photos, tmp_path / "other", annotations=str(coco)) == "done"
    skipped = json.loads((tmp_path / "other/skipped.jsonl").read_text())
    assert skipped["reason"].startswith("box 1 ([9, 1, 2, 2]): lies outside the picture")


@pytest.mark.parametrize(
    ("bbox", "told"),
    [
        ("[0, 0, 0, 5]", "must be above 0"),
        ("[0, 0, NaN, 5]", "not four finite numbers"),
        ("[0, 0, 5]", "not four finite numbers"),
    ],
)
def test_a_box_that_is_none_leaves_its_image_out(
    photos: Path, tmp_path: Path, bbox: str, told: str
) -> None:
    coco = write_coco(photos, images=30)
    coco.write_text(coco.read_text().replace("[1, 1, 2, 2]", bbox))
    pack(photos, tmp_path / "out", annotations=str(coco))
    assert told in (tmp_path / "out/skipped.jsonl").read_text()
    assert len(boxes_in(tmp_path / "out")) == 29


def test_boxes_beside_an_image_are_compared_with_it(photos: Path, tmp_path: Path) -> None:
    (photos / "cat/000.json").write_text('{"width": 80, "height": 60, "annotations": []}')
    (photos / "cat/003.json").write_text('{"width": 80, "height": 60, "taken": "today"}')
    pack(photos, tmp_path / "out")
    skipped = json.loads((tmp_path / "out/skipped.jsonl").read_text())
    assert skipped["source"] == "cat/000.png"


def test_categories_get_the_numbers_of_another_set(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    pack(photos, tmp_path / "train", annotations=str(coco))
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox>"
    voc = tmp_path / "voc/000.xml"
    voc.parent.mkdir()
    voc.write_text(f"<annotation><object><name>nose</name>{box}</object></annotation>")
    train = str(tmp_path / "train")
    pack(photos, tmp_path / "val", annotations=str(voc.parent), classes=train)
    names = json.loads((tmp_path / "val/categories.json").read_text())
    assert names == [{"id": 5, "name": "nose"}]
    numbers = {
        box["category_id"]
        for parts in read_all(tmp_path / "val").values()
        if "json" in parts
        for box in json.loads(parts["json"])["annotations"]
    }
    assert numbers == {5}
    voc.write_text(voc.read_text().replace("nose", "ear"))
    with pytest.raises(DataError, match="a box of ear, which is not among the given categories"):
        pack(photos, tmp_path / "other", annotations=str(voc.parent), classes=train)
