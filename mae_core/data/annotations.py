"""Read boxes from COCO and PASCAL VOC files and write them as each image's JSON in a shard.

COCO: one JSON file with `images`, `annotations` and `categories`, https://cocodataset.org. VOC: a
folder with one XML file per image, http://host.robots.ox.ac.uk/pascal/VOC. A VOC box from xmin to
xmax becomes x = xmin and w = xmax - xmin, without a correction, because data sets disagree on
whether they count from 0 or 1. Objects that VOC marks as difficult are treated as any other.

VOC files may declare any encoding. They may not declare entities: with them a small file could
expand without end or read files of this machine.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

from mae_core.data.folder_layout import is_hidden_file, is_hidden_folder
from mae_core.data.samples import DataError

# Byte order marks, and what the first characters of an XML file look like in UTF-16.
_MARKS = {
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"<\0": "utf-16-le",
    b"\0<": "utf-16-be",
}
# Files that declare the older of these character sets contain characters of the newer one.
_LARGER_ENCODINGS = {"gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}


class Annotations(NamedTuple):
    """The boxes of many images, each under its image's path."""

    by_image: dict[str, bytes]  # image path (COCO) or path without extension (VOC) to `.json` bytes
    categories: dict[int, str]  # category_id to name
    has_extensions: bool = True  # whether the paths in `by_image` have an extension

    def names_of(self, sources: Iterable[str]) -> dict[str, str]:
        """Map each image that has an entry to the name of its entry.

        An entry belongs to an image if the path of one ends with the path of the other:
        images/a.jpg and a.jpg. The entry with the most folders in common is taken.

        Raises:
            DataError: Two entries fit an image equally well, or one entry fits two images.
        """
        by_name: dict[str, list[str]] = defaultdict(list)
        for entry in self.by_image:
            by_name[_parts(entry)[-1]].append(entry)
        found: dict[str, str] = {}
        taken: dict[str, str] = {}
        for source in sources:
            path = source if self.has_extensions else str(PurePosixPath(source).with_suffix(""))
            nearest = _nearest(path, by_name.get(_parts(path)[-1], ()))
            if nearest is None:
                continue
            if nearest in taken:
                raise DataError(
                    f"annotations: {nearest} may belong to {taken[nearest]} or {source}; add the "
                    "folders to its name, or pack the folders one by one"
                )
            found[source], taken[nearest] = nearest, source
        return found

    def renumbered(self, numbers: Mapping[int, str]) -> "Annotations":
        """Return the same boxes, with each category's name mapped to its number in `numbers`.

        Raises:
            DataError: A box has a category that is not in `numbers`.
        """
        given = {name: number for number, name in numbers.items()}
        by_image = {}
        for entry, data in self.by_image.items():
            raw = json.loads(data)
            for box in raw["annotations"]:
                name = self.categories[box["category_id"]]
                if name not in given:
                    raise DataError(
                        f"annotations: {entry} has a box of {name}, which is not among the given "
                        f"categories: {', '.join(given)}"
                    )
                box["category_id"] = given[name]
            by_image[entry] = json.dumps(raw, sort_keys=True).encode()
        return self._replace(by_image=by_image, categories=dict(numbers))


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path.replace("\\", "/")).parts or ("",)


def _nearest(source: str, entries: Sequence[str]) -> str | None:
    """Find the entry that shares the longest path ending with `source`."""
    wanted = [part for part in _parts(source) if part not in ("/", "..")]
    fitting: dict[str, int] = {}
    for entry in entries:
        parts = [part for part in _parts(entry) if part not in ("/", "..")]
        common = 0
        for one, other in zip(reversed(wanted), reversed(parts), strict=False):
            if one != other:
                break
            common += 1
        if common == min(len(wanted), len(parts)):
            fitting[entry] = common
    best = [entry for entry, common in fitting.items() if common == max(fitting.values())]
    if len(best) > 1:
        raise DataError(
            f"annotations: {source} may have the boxes of {best[0]} or {best[1]}; add the folders "
            "to their names"
        )
    return best[0] if best else None


def read_annotations(source: Path) -> Annotations:
    """Read a COCO file or a folder of VOC files.

    Raises:
        DataError: The source is neither, or a box is invalid; names the file and the box.
    """
    if source.is_dir():
        return _read_voc(source)
    if source.is_file():
        return _read_coco(source)
    raise DataError(f"annotations={source}: neither a COCO file nor a folder of VOC files")


def _read_coco(file: Path) -> Annotations:
    try:
        raw = json.loads(file.read_bytes())
        images = _by_id(raw["images"], f"{file}: images")
        listed = _by_id(raw["categories"], f"{file}: categories")
        categories = {number: str(item["name"]) for number, item in listed.items()}
        boxes: dict[Any, list[dict[str, Any]]] = {identifier: [] for identifier in images}
        for number, item in enumerate(raw["annotations"], start=1):
            boxes[_image_of(item, boxes, f"{file}: annotation {number}")].append(
                _coco_box(item, categories, f"{file}: annotation {number}")
            )
        by_image: dict[str, bytes] = {}
        for identifier, image in images.items():
            name = str(image["file_name"])
            if name in by_image:
                raise DataError(f"{file}: images lists {name} twice")
            by_image[name] = _encoded(image.get("width"), image.get("height"), boxes[identifier])
    except OSError as error:
        raise DataError(f"annotations={file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"annotations={file}: is not UTF-8 ({error}); save it as UTF-8") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        hint = "; give the folder of the VOC files" if file.suffix.lower() == ".xml" else ""
        raise DataError(f"annotations={file}: not a COCO file ({error}){hint}") from error
    except KeyError as error:
        raise DataError(f"annotations={file}: not a COCO file: {error} is missing") from error
    return Annotations(by_image, categories)


def _by_id(items: list[dict[str, Any]], where: str) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for item in items:
        if item["id"] in found:
            raise DataError(f"{where} has the id {item['id']} twice")
        found[item["id"]] = item
    return found


def _image_of(item: dict[str, Any], images: Mapping[Any, object], where: str) -> Any:
    if item["image_id"] not in images:
        raise DataError(f"{where} is of image_id={item['image_id']}, which images does not list")
    return item["image_id"]


def _coco_box(item: dict[str, Any], categories: Mapping[int, str], where: str) -> dict[str, Any]:
    if "bbox" not in item or "category_id" not in item:
        raise DataError(f"{where} has no bbox or no category_id")
    category = item["category_id"]
    if not isinstance(category, int) or category not in categories:
        raise DataError(f"{where} has category_id={category!r}, which categories does not list")
    return {"bbox": item["bbox"], "category_id": category, "iscrowd": item.get("iscrowd", 0)}


def _read_voc(folder: Path) -> Annotations:
    files = list(_voc_files(folder))
    if not files:
        raise DataError(f"annotations={folder}: no .xml in it{_coco_hint(folder)}")
    roots = {file: _voc_root(file) for file in files}
    found = {file: list(_voc_boxes(file, root)) for file, root in roots.items()}
    names = sorted({name for boxes in found.values() for name, _ in boxes})
    numbers = {name: number for number, name in enumerate(names, start=1)}
    by_image = {}
    for file, boxes in found.items():
        items = [{"bbox": box, "category_id": numbers[name]} for name, box in boxes]
        entry = file.relative_to(folder).with_suffix("").as_posix()
        if entry in by_image:
            raise DataError(f"{file}: {file.stem}.xml comes twice in {folder}")
        by_image[entry] = _encoded(*_voc_size(roots[file]), items)
    named = {number: name for name, number in numbers.items()}
    return Annotations(by_image, named, has_extensions=False)


def _voc_files(folder: Path) -> Iterator[Path]:
    """Yield the .xml files, as for images: not hidden, in any case of the extension."""

    def stop(error: OSError) -> None:
        text = f"annotations={folder}: cannot list {error.filename}: {error.strerror}"
        raise DataError(text) from error

    for place, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not is_hidden_folder(name))
        for name in sorted(names):
            if name.lower().endswith(".xml") and not is_hidden_file(name):
                yield Path(place) / name


def _coco_hint(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.json"))
    return f"; for a COCO file give the file: annotations={folder / files[0]}" if files else ""


def _voc_root(file: Path) -> ElementTree.Element:
    try:
        text = _decoded(file.read_bytes())
        # Annotation programs write no DTD; malicious files need one.
        if re.search(r"<!(DOCTYPE|ENTITY)", text):
            raise DataError(f"{file}: has a DOCTYPE or entities, which are not read; remove them")
        return ElementTree.fromstring(text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: is not {error.encoding} ({error.reason}); save it as UTF-8"
        ) from (error)
    except (OSError, ElementTree.ParseError, LookupError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error


def _decoded(data: bytes) -> str:
    """Decode an XML file by its byte order mark, its declared encoding, or as UTF-8."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return data.decode(encoding)
    declared = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.:-]+)", data)
    encoding = "utf-8" if declared is None else declared[1].decode("ascii").lower()
    return data.decode(_LARGER_ENCODINGS.get(encoding, encoding)).lstrip()


def _voc_boxes(file: Path, root: ElementTree.Element) -> Iterator[tuple[str, list[float]]]:
    for number, item in enumerate(root.iter("object"), start=1):
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


def _voc_size(root: ElementTree.Element) -> tuple[int, int]:
    """Return width and height, 0 where they are not given."""
    texts = [root.findtext(f"size/{side}", "").strip() for side in ("width", "height")]
    width, height = (int(text) if re.fullmatch("[0-9]{1,9}", text) else 0 for text in texts)
    return width, height


def _encoded(width: object, height: object, boxes: list[dict[str, Any]]) -> bytes:
    # Many files have 0 where the size was unknown.
    size = {"width": width, "height": height} if width and height else {}
    return json.dumps({**size, "annotations": boxes}, sort_keys=True).encode()
