"""Boxes as COCO and PASCAL VOC keep them, as the JSON that goes beside an image in a shard.

COCO: one JSON file with `images`, `annotations` and `categories`, https://cocodataset.org. VOC: a
folder with an XML file an image, http://host.robots.ox.ac.uk/pascal/VOC. A VOC box from xmin to
xmax becomes x = xmin and w = xmax - xmin: its numbers as they are, for sets disagree on whether
they count from 0 or 1.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from mae_core.data.samples import DataError


class Annotations(NamedTuple):
    by_image: dict[str, bytes]  # file name (COCO) or its stem (VOC) to `.json`, see parse_boxes
    categories: dict[int, str]  # category_id to name

    def name_of(self, source: str) -> str | None:
        """The entry of an image, by its path, its name or its stem; None without one."""
        path = PurePosixPath(source)
        return next((x for x in (source, path.name, path.stem) if x in self.by_image), None)


def read_annotations(source: Path) -> Annotations:
    """Of a COCO file or a folder of VOC files.

    Raises:
        DataError: it is neither, or a box is not one; names the file and the box.
    """
    if source.is_dir():
        return _read_voc(source)
    if source.is_file():
        return _read_coco(source)
    raise DataError(f"annotations={source}: no COCO file and no folder of VOC files is there")


def _read_coco(file: Path) -> Annotations:
    try:
        raw = json.loads(file.read_bytes())
        images = {image["id"]: image for image in raw["images"]}
        categories = {int(item["id"]): str(item["name"]) for item in raw["categories"]}
        boxes: dict[Any, list[dict[str, Any]]] = {identifier: [] for identifier in images}
        for number, item in enumerate(raw["annotations"], start=1):
            if item["image_id"] not in boxes:
                raise DataError(
                    f"{file}: annotation {number} is of image_id={item['image_id']}, which "
                    "images does not list"
                )
            if "bbox" not in item or "category_id" not in item:
                raise DataError(f"{file}: annotation {number} has no bbox or no category_id")
            kept = {"bbox": item["bbox"], "category_id": item["category_id"]}
            boxes[item["image_id"]].append(kept | {"iscrowd": item.get("iscrowd", 0)})
        by_image: dict[str, bytes] = {}
        for identifier, image in images.items():
            name = str(image["file_name"])
            if name in by_image:
                raise DataError(f"{file}: images lists {name} twice")
            by_image[name] = _encoded(image.get("width"), image.get("height"), boxes[identifier])
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"annotations={file}: is no COCO file ({error})") from error
    except KeyError as error:
        raise DataError(f"annotations={file}: is no COCO file: {error} is missing") from error
    return Annotations(by_image, categories)


def _read_voc(folder: Path) -> Annotations:
    files = sorted(folder.rglob("*.xml"))
    if not files:
        raise DataError(f"annotations={folder}: no .xml in it")
    found = {file: list(_voc_boxes(file)) for file in files}
    names = sorted({name for boxes in found.values() for name, _ in boxes})
    numbers = {name: number for number, name in enumerate(names, start=1)}
    by_image = {}
    for file, boxes in found.items():
        items = [{"bbox": box, "category_id": numbers[name]} for name, box in boxes]
        if file.stem in by_image:
            raise DataError(f"{file}: {file.stem}.xml comes twice in {folder}")
        by_image[file.stem] = _encoded(*_voc_size(file), items)
    return Annotations(by_image, {number: name for name, number in numbers.items()})


def _voc_root(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error


def _voc_boxes(file: Path) -> Iterator[tuple[str, list[float]]]:
    for number, item in enumerate(_voc_root(file).iter("object"), start=1):
        try:
            corners = [float(item.findtext(f"bndbox/{x}", "")) for x in _VOC_CORNERS]
        except ValueError as error:
            raise DataError(f"{file}: object {number} has no bndbox of four numbers") from error
        xmin, ymin, xmax, ymax = corners
        if xmax <= xmin or ymax <= ymin:
            raise DataError(
                f"{file}: object {number} has no area: xmin={xmin:g} ymin={ymin:g} "
                f"xmax={xmax:g} ymax={ymax:g}"
            )
        name = item.findtext("name", "").strip()
        if not name:
            raise DataError(f"{file}: object {number} has no name")
        yield name, [xmin, ymin, xmax - xmin, ymax - ymin]


_VOC_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _voc_size(file: Path) -> tuple[int | None, int | None]:
    """Width and height, where they are given."""
    texts = [_voc_root(file).findtext(f"size/{side}", "") for side in ("width", "height")]
    width, height = (int(text) if text.isdigit() else 0 for text in texts)
    return (width, height) if width and height else (None, None)


def _encoded(width: int | None, height: int | None, boxes: list[dict[str, Any]]) -> bytes:
    size = {} if width is None or height is None else {"width": width, "height": height}
    return json.dumps({**size, "annotations": boxes}, sort_keys=True).encode()
