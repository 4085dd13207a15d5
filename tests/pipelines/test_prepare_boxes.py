"""`mae prepare annotations=...`: boxes go into the shards, and their names beside them."""

import json
import tarfile
from pathlib import Path

import pytest

from mae_core.data.samples import DataError
from pipelines import prepare
from pipelines.config import ConfigError, PrepareConfig


def write_coco(photos: Path, *, images: int) -> Path:
    files = sorted(p.relative_to(photos).as_posix() for p in photos.rglob("*.*"))[:images]
    coco = {
        "images": [
            {"id": i, "file_name": name, "width": 8, "height": 6} for i, name in enumerate(files)
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
    with pytest.raises(DataError, match="knows none of the images"):
        pack(photos, tmp_path / "out", annotations=str(coco))


def test_an_image_with_boxes_from_two_places_is_refused(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    image = sorted(photos.rglob("*.*"))[0]
    image.with_suffix(".json").write_text("{}")
    with pytest.raises(DataError, match=r"has a \.json beside it, and boxes in annotations"):
        pack(photos, tmp_path / "out", annotations=str(coco))


def test_boxes_that_may_be_of_two_images_are_refused(photos: Path, tmp_path: Path) -> None:
    coco = write_coco(photos, images=30)
    names = json.loads(coco.read_text())["images"]
    first = photos / names[0]["file_name"]
    (photos / "dog" / first.name).write_bytes(first.read_bytes())
    coco.write_text(coco.read_text().replace(names[0]["file_name"], first.name))
    with pytest.raises(DataError, match=rf"{first.name} may be .* or .*{first.name}"):
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
