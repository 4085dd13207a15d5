"""Common folder layouts: which folders are classes, splits, masks or wrappers."""

import logging
from pathlib import Path, PurePath

import pytest

from mae_core.data.folder_layout import check_layout, layout_warnings
from mae_core.data.image_files import find_images
from mae_core.data.samples import DataError


def paths(*names: str) -> list[PurePath]:
    return [PurePath(name) for name in names]


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train/cat/1.png", "valid/cat/1.png", "test/cat/1.png"], "train, test, valid look like"),
        (["Train/1.png", "Test/2.png"], "mae prepare ds/Train OUT/Train; mae prepare ds/Test"),
        (["TRAINING/1.png", "Validation/2.png"], "TRAINING, Validation look like splits"),
        (["train2017/1.jpg", "val2017/2.jpg"], "train2017, val2017 look like splits"),
        (["train_images/1.jpg", "test-images/2.jpg"], "look like splits"),
        (["train/1.jpg", "test1/2.jpg"], "look like splits"),
        (["train/1.jpg", "dev/2.jpg"], "look like splits"),
        (["train/1.jpg"], "train look like splits"),
        (["train/1.jpg", "test/1.jpg", "unlabeled/1.jpg"], "train, test look like splits"),
        (["trainA/1.jpg", "trainB/1.jpg", "testA/1.jpg"], "look like splits"),
        # Roboflow: YOLO files lie in train/labels, which has no images.
        (["train/images/1.jpg", "valid/images/2.jpg"], "mae prepare ds/train/images OUT/train"),
        (["cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg"], "cat holds test, train, which"),
    ],
)
def test_splits_are_no_classes(names: list[str], told: str) -> None:
    with pytest.raises(DataError) as error:
        check_layout(Path("ds"), paths(*names))
    assert told in str(error.value)
    assert str(error.value).startswith("source=ds: ")


def test_a_split_is_told_to_take_the_numbers_of_the_training_set() -> None:
    with pytest.raises(DataError) as error:
        check_layout(
            Path("ds"),
            paths("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png"),
        )
    assert str(error.value) == (
        "source=ds: train, val look like splits of a data set, not classes; pack each by itself: "
        "mae prepare ds/train OUT/train; mae prepare ds/val OUT/val classes=OUT/train. If they are "
        "classes, give a list file"
    )


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["images/1.png", "masks/1.png"], "images, masks are not classes; put each mask beside"),
        (["Images/1.png", "Labels/1.png"], "mae prepare ds/Images OUT"),
        (["JPEGImages/1.jpg", "SegmentationClass/1.png", "SegmentationObject/1.png"], "JPEGImages"),
        (["VOC2007/JPEGImages/1.jpg", "VOC2007/SegmentationClass/1.png"], "ds/VOC2007/JPEGImages"),
        (["img/1.png", "gt/1.png"], "gt, img are not classes"),
        (["imagesTr/1.png", "labelsTr/1.png"], "are not classes"),
        (["n01/images/1.png", "n01/masks/1.png", "n02/images/1.png"], "n01/images, n01/masks are"),
        (
            ["images/1.png"],
            "images is not a class; pack the folder inside: mae prepare ds/images OUT",
        ),
        (["JPEGImages/1.png"], "JPEGImages is not a class"),
        (["PetImages/Cat/1.jpg", "PetImages/Dog/1.jpg"], "mae prepare ds/PetImages OUT"),
    ],
)
def test_wrappers_and_masks_are_no_classes(names: list[str], told: str) -> None:
    with pytest.raises(DataError) as error:
        check_layout(Path("ds"), paths(*names))
    assert told in str(error.value)


@pytest.mark.parametrize(
    "name", ["a_mask.png", "a_Mask.png", "a-seg.png", "a_segmentation.png", "a_mask_1.png"]
)
def test_masks_among_the_images_are_no_pictures(name: str) -> None:
    with pytest.raises(DataError, match=rf"1 images look like masks of others, such as x/{name}"):
        check_layout(Path("ds"), paths("x/a.jpg", f"x/{name}", "y/b.jpg"))


@pytest.mark.parametrize(
    "names",
    [
        ["train/1.jpg", "bus/1.jpg", "car/1.jpg"],  # vehicles
        ["mask/1.jpg", "no_mask/1.jpg"],  # faces
        ["photo/1.jpg", "sketch/1.jpg", "cartoon/1.jpg"],
        ["n01/images/1.jpg", "n02/images/1.jpg"],  # tiny-imagenet/train
        ["cat/2021/05/a.jpg", "cat/b.jpg", "dog/d.jpg"],
        ["cat/blue_mask.jpg", "cat/red_mask.jpg", "dog/a.jpg"],
        ["valley/1.jpg", "trainers/1.jpg", "testudo/1.jpg"],
        ["a.jpg", "b.jpg"],
    ],
)
def test_what_may_be_classes_is_taken_for_classes(names: list[str]) -> None:
    check_layout(Path("ds"), paths(*names))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (
            ["x/a.jpg", "x/a.png", "y/b.jpg"],
            "1 names belong to several images, such as x/a.jpg and",
        ),
        (["a.JPG", "a.jpg"], "a.JPG and a.jpg"),
        (["Cat/a.jpg", "cat/b.jpg"], "classes that differ only in case or spaces: Cat, cat"),
        (["cat/a.jpg"], "all images have the class cat"),
        (
            ["a/x/1.jpg", "a/x/2.jpg", "b/3.jpg"],
            "so images in deeper folders belong to it: a/x (2)",
        ),
    ],
)
def test_what_may_be_meant_otherwise_is_told(names: list[str], told: str) -> None:
    assert any(told in line for line in layout_warnings(paths(*names)))


def test_folders_are_looked_at_and_a_list_file_is_taken_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="look like splits"):
        find_images(tmp_path)
    (tmp_path / "list.csv").write_text("train/1.jpg,train\ntest/1.jpg,test\n")
    assert find_images(tmp_path / "list.csv")[1] == ("test", "train")
    (tmp_path / "test/1.png").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        find_images(tmp_path / "test")
    assert "1 names belong to several images, such as 1.jpg and 1.png" in caplog.text
