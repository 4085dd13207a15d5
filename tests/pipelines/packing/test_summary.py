"""What `mae prepare` says about the images and masks that it found."""

import json

import pytest

from mae_core.data.image_files import ImageFile
from pipelines.packing.shard import MaskSummary
from pipelines.packing.summary import found_lines, mask_line, mask_warnings


def image(key: str, label: int | None = None, **more: object) -> ImageFile:
    path = f"/in/{key}.jpg"
    plain = ImageFile(key=key, path=path, source=path, label=label, num_bytes=1, companions=())
    return plain._replace(**more)


def test_images_are_counted_by_class() -> None:
    files = [image("a", 0), image("b", 0), image("c", 2)]
    assert list(found_lines(files, ["cat", "dog", "owl"], {})) == [
        "3 images of 3 classes: cat (2), dog (0), owl (1)",
        "no image of 1 classes: dog",
        "no boxes, masks or other files beside them",
    ]
    assert next(found_lines(files, None, {})) == "3 images of 2 numbered classes: 0 (2), 2 (1)"
    assert next(found_lines([image("a")], None, {})) == "1 images, no classes"


def test_what_lies_beside_and_what_cannot_be_read_is_counted() -> None:
    boxes = json.dumps({"annotations": [{"category_id": 3}, {"category_id": 3}]}).encode()
    files = [
        image("a", companions=(("txt", "/in/a.txt", 1), ("seg.png", "/in/a.seg.png", 1))),
        image("b", companions=(("txt", "/in/b.txt", 1),), boxes=boxes),
        image("c", problem="a link to a missing file (/x)"),
        image("d", problem="a link to a missing file (/y)"),
    ]
    assert list(found_lines(files, None, {3: "nose", 4: "ear"})) == [
        "4 images, no classes",
        "beside them: 1 .seg.png, 2 .txt, boxes of 1 images from annotations",
        "2 boxes of 2 categories: 3 nose (2), 4 ear (0)",
        "2 can't be read: 2 x a link to a missing file",
    ]


def test_many_classes_are_shortened() -> None:
    names = [f"c{i}" for i in range(23)]
    line = next(found_lines([image("a", 0)], names, {}))
    assert line.endswith("c19 (0) and 3 more")


@pytest.mark.parametrize(
    ("values", "num_masks", "line"),
    [
        ({}, 0, None),
        ({}, 2, "2 masks with 0 values: none"),
        ({1: 2, 0: 1}, 2, "2 masks with 2 values: 0 (in 1), 1 (in 2)"),
    ],
)
def test_masks_are_described_by_their_values(
    values: dict[int, int], num_masks: int, line: str | None
) -> None:
    assert mask_line(MaskSummary(num_masks=num_masks, values=values)) == line


def test_as_many_values_as_are_counted_may_be_more() -> None:
    masks = MaskSummary(num_masks=1, values=dict.fromkeys(range(256), 1))
    assert str(mask_line(masks)).startswith("1 masks with 256 or more values: ")


@pytest.mark.parametrize(
    ("values", "warned"),
    [({0: 1, 255: 1}, True), ({255: 1}, True), ({0: 1}, True), ({0: 1, 1: 1}, False), ({}, False)],
)
def test_masks_with_nothing_to_learn_are_warned_about(values: dict[int, int], warned: bool) -> None:
    found = list(mask_warnings(MaskSummary(num_masks=1, values=values)))
    assert [text.startswith("the masks only contain") for text in found] == [True] * warned


def test_masks_in_colour_are_warned_about() -> None:
    (text,) = mask_warnings(MaskSummary(num_masks=3, num_unreadable=2))
    assert text.startswith("2 masks can't be read as class numbers")
