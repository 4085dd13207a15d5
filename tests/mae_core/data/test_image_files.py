"""Folders and lists of images: which files count, their keys and their classes."""

import logging
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mae_core.data.image_files import ImageFile, find_images, unique_keys
from mae_core.data.samples import DataError, split_name


def make_files(root: Path, *names: str, size: int = 3) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)


def make_list(root: Path, text: str) -> Path:
    (root / "list.txt").write_text(text)
    return root / "list.txt"


def keys(files: list[ImageFile]) -> list[str]:
    return [file.key for file in files]


def test_class_folders_are_numbered_by_name(tmp_path: Path) -> None:
    make_files(tmp_path, "dog/1.jpg", "cat/2.jpg", "cat/1.jpg", "Zebra/9.png")
    files, classes = find_images(tmp_path)
    assert classes == ("Zebra", "cat", "dog")
    assert [(file.key, file.label) for file in files] == [
        ("Zebra/9", 0),
        ("cat/1", 1),
        ("cat/2", 1),
        ("dog/1", 2),
    ]


def test_folders_named_by_numbers_are_classes_by_name_too(tmp_path: Path) -> None:
    make_files(tmp_path, "10/a.jpg", "9/a.jpg")
    files, classes = find_images(tmp_path)
    assert classes == ("10", "9")
    assert [file.label for file in files] == [0, 1]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    make_files(tmp_path, "b.jpg", "a.PNG", "notes/readme.md")
    files, classes = find_images(tmp_path)
    assert classes is None
    assert [(file.key, file.label, file.extension) for file in files] == [
        ("a", None, "png"),
        ("b", None, "jpg"),
    ]


def test_any_image_extension_in_any_case_counts_and_no_other(tmp_path: Path) -> None:
    make_files(tmp_path, "1.jpg", "2.JPEG", "3.Png", "4.webp", "5.TIF", "6.tiff", "7.gif", "8.txt")
    make_files(tmp_path, "9", "x.seg.png", ".hidden.jpg", "._1.jpg", ".git/2.jpg")
    files, _ = find_images(tmp_path)
    assert [(file.key, file.extension) for file in files] == [
        ("1", "jpg"),
        ("2", "jpg"),
        ("3", "png"),
        ("4", "webp"),
        ("5", "tif"),
        ("6", "tiff"),
    ]


def test_images_deep_in_a_class_folder_count(tmp_path: Path) -> None:
    make_files(tmp_path, "cat/2021/05/a.jpg", "cat/b.jpg", "dog/.thumbs/c.jpg", "dog/d.jpg")
    files, classes = find_images(tmp_path)
    assert (keys(files), classes) == (["cat/2021/05/a", "cat/b", "dog/d"], ("cat", "dog"))


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    make_files(tmp_path / "real", "a.jpg")
    make_files(tmp_path / "set", "cat/b.jpg")
    (tmp_path / "set/dog").symlink_to(tmp_path / "real")
    (tmp_path / "set/cat/c.jpg").symlink_to(tmp_path / "real/a.jpg")
    (tmp_path / "set/cat/loop").symlink_to(tmp_path / "set")
    files, _ = find_images(tmp_path / "set")
    assert keys(files) == ["cat/b", "cat/c", "dog/a"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.b.c.jpg", "a_b_c"),
        ("v1.0/x.jpg", "v1_0/x"),
        ("with space.jpg", "with space"),
        ("Äffin.jpg", "Äffin"),
        ("__init.jpg", "_init"),
        ("__pycache__/x.jpg", "_pycache__/x"),
        ("tab\there\nline.jpg", "tab_here_line"),
        ("caf\udce9.jpg", "caf_"),  # a byte that is not UTF-8
    ],
)
def test_key_is_the_path_without_extension_and_dots(tmp_path: Path, name: str, key: str) -> None:
    make_files(tmp_path, name)
    files, _ = find_images(tmp_path)
    assert keys(files) == [key]
    key.encode()
    assert split_name(f"{key}.jpg") == (key, "jpg")


def test_paths_that_would_share_a_key_get_a_hash_each(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "a.png", "x.y.jpg", "x_y.jpg", "b.jpg")
    files, _ = find_images(tmp_path)
    # First 8 hex digits of sha256 of "a.jpg", "a.png", "x.y.jpg" and "x_y.jpg".
    assert {file.source: file.key for file in files} == {
        "a.jpg": "a-509b0d46",
        "a.png": "a-7f071235",
        "x.y.jpg": "x_y-7a18faa8",
        "x_y.jpg": "x_y-b56f3351",
        "b.jpg": "b",
    }


@given(st.lists(st.text("ab._ é", min_size=1, max_size=6), min_size=1, max_size=8, unique=True))
def test_keys_are_unique_and_readers_find_them_again(names: list[str]) -> None:
    relatives = [f"{name}.jpg" for name in names if not name.startswith(".")]
    found = unique_keys(relatives)
    assert len(set(found.values())) == len(relatives)
    for key in found.values():
        assert split_name(f"{key}.jpg") == (key, "jpg")


def test_companions_go_with_their_image(tmp_path: Path) -> None:
    make_files(tmp_path, "a.JPG", "a.json", "a.seg.png", "a.txt", "a.xml", "b.jpg", "ab.json")
    files, _ = find_images(tmp_path)
    assert [(file.key, [c[0] for c in file.companions]) for file in files] == [
        ("a", ["json", "seg.png", "txt"]),
        ("b", []),
    ]


def test_packed_size_is_in_whole_blocks(tmp_path: Path) -> None:
    make_files(tmp_path, "cat/a.jpg", size=513)
    make_files(tmp_path, "cat/a.txt", size=512)
    ((file,), _) = find_images(tmp_path)
    assert file.packed_bytes == (512 + 1024) + (512 + 512) + (512 + 512)  # jpg, txt, cls


def test_folder_without_images_says_what_was_looked_for(tmp_path: Path) -> None:
    make_files(tmp_path, "a.gif", "b.gif", "c.md", "README")
    with pytest.raises(DataError) as error:
        find_images(tmp_path)
    assert str(error.value) == (
        f"source={tmp_path}: no image (.dcm .jpeg .jpg .png .tif .tiff .webp) in it; "
        "it holds 2 .gif, 1 no extension, 1 .md"
    )


def test_empty_and_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"source={tmp_path}: no image .* it holds nothing"):
        find_images(tmp_path)
    with pytest.raises(DataError, match=f"source={tmp_path}/no: no such folder or list file"):
        find_images(tmp_path / "no")


def test_images_beside_class_folders_are_an_error(tmp_path: Path) -> None:
    make_files(tmp_path, "cat/a.jpg", "stray.jpg")
    with pytest.raises(DataError, match=r"1 images \(such as stray\.jpg\) lie beside folders"):
        find_images(tmp_path)


def test_folder_without_an_image_is_no_class_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_files(tmp_path, "cat/a.jpg", "LICENCES/mit.txt", "dog/a.jpg")
    with caplog.at_level(logging.WARNING):
        _, classes = find_images(tmp_path)
    assert classes == ("cat", "dog")
    assert "no image, so no class: LICENCES" in caplog.text


def test_what_is_not_an_image_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_files(tmp_path, "a.jpg", "b.bmp", "c.bmp")
    with caplog.at_level(logging.WARNING):
        find_images(tmp_path)
    assert "not images, left out: 2 .bmp" in caplog.text


def test_folder_that_can_not_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "a.jpg")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=f"cannot list {tmp_path}: Permission denied"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("text", "labels", "classes"),
    [
        ("a.jpg\nsub/b.jpg\n", [None, None], None),
        ("a.jpg\t3\nsub/b.jpg\t11\n", [3, 11], None),
        ("a.jpg,3\nsub/b.jpg,11", [3, 11], None),
        ("a.jpg\tdog\nsub/b.jpg\tcat\n", [1, 0], ("cat", "dog")),
        ("a.jpg, dog\n\nsub/b.jpg, cat \n", [1, 0], ("cat", "dog")),
        ("\ufeffa.jpg,dog\r\nsub/b.jpg,cat\r\n", [1, 0], ("cat", "dog")),
        ("a.jpg\tbig, red\nsub/b.jpg\tcat\n", [0, 1], ("big, red", "cat")),
        ("a.jpg,1\nsub/b.jpg,one\n", [0, 1], ("1", "one")),
    ],
)
def test_list_file_gives_paths_and_labels(
    tmp_path: Path, text: str, labels: list[int | None], classes: tuple[str, ...] | None
) -> None:
    make_files(tmp_path, "a.jpg", "sub/b.jpg", "not_listed.jpg")
    files, names = find_images(make_list(tmp_path, text))
    assert keys(files) == ["a", "sub/b"]
    assert [file.label for file in files] == labels
    assert names == classes


def test_list_may_point_outside_its_folder(tmp_path: Path) -> None:
    make_files(tmp_path, "x/a.jpg", "b.jpg")
    (tmp_path / "lists").mkdir()
    file = make_list(tmp_path / "lists", f"../x/a.jpg\n{tmp_path}/b.jpg\n")
    files, _ = find_images(file)
    assert [Path(file.path) for file in files] == sorted([tmp_path / "b.jpg", tmp_path / "x/a.jpg"])
    assert keys(files)[-1] == "x/a"
    assert not any(key.startswith("/") for key in keys(files))


def test_comma_in_a_name_separates_nothing(tmp_path: Path) -> None:
    make_files(tmp_path, "a,b.jpg")
    files, _ = find_images(make_list(tmp_path, "a,b.jpg\n"))
    assert [(file.key, file.label) for file in files] == [("a,b", None)]
    files, classes = find_images(make_list(tmp_path, "a,b.jpg,cat\n"))
    assert ([file.label for file in files], classes) == ([0], ("cat",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg\nmissing.jpg\n", r"list\.txt:2: no such file: .*/missing\.jpg"),
        ("a.jpg\n\n\ngone.jpg\n", r"list\.txt:4: no such file"),
        ("a.jpg\nnotes.md\n", r"list\.txt:2: 'notes\.md' does not end in an image's extension"),
        ("a.jpg\nb.jpg\n./a.jpg\n", r"list\.txt:3: '\./a\.jpg' is already in line 1"),
        ("a.jpg,cat\nb.jpg\n", r"list\.txt:2: some lines have a label and others have none"),
        ("a.jpg\nb.jpg,cat\n", r"list\.txt:2: some lines have a label and others have none"),
        ("\n  \n", "the list is empty"),
        ("x1.jpg\nx2.jpg\nx3.jpg\nx4.jpg\nx5.jpg\nx6.jpg\nx7.jpg\n", r"and 2 more mistakes"),
    ],
)
def test_mistake_in_a_list_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    make_files(tmp_path, "a.jpg", "b.jpg")
    with pytest.raises(DataError, match=message):
        find_images(make_list(tmp_path, text))


def test_list_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(DataError, match=r"list\.txt: not a list file in UTF-8"):
        find_images(tmp_path / "list.txt")


def test_links_to_nowhere_are_images_with_a_problem(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "gone.jpg").symlink_to("/nowhere/gone.jpg")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "b.json").symlink_to("/nowhere/b.json")
    files, _ = find_images(tmp_path)
    text = "a link to a missing file (/nowhere/{}; fetch it, or mount its disk)"
    assert {file.key: file.problem for file in files} == {
        "a": None,
        "b": "its .json is " + text.format("b.json"),
        "gone": text.format("gone.jpg"),
        "self": "cannot be read: Too many levels of symbolic links",
    }
    listed, _ = find_images(make_list(tmp_path, "a.jpg\ngone.jpg\n"))
    assert [file.problem is None for file in listed] == [True, False]


def test_a_pipe_is_never_waited_for(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    os.mkfifo(tmp_path / "a.json")
    files, _ = find_images(tmp_path)
    assert [file.problem for file in files] == [
        "its .json is not a regular file",
        "not a regular file",
    ]


def test_companions_are_found_in_any_case(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "a.JSON", "a.Seg.PNG", "a.Txt", "a.cls", "A.json")
    ((file,), _) = find_images(tmp_path)
    assert [c[0] for c in file.companions] == ["cls", "json", "seg.png", "txt"]
    make_files(tmp_path, "a.json")
    with pytest.raises(DataError, match=r"both a\.JSON and a\.json are next to it"):
        find_images(tmp_path)


def test_companions_that_belong_to_no_image_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_files(tmp_path, "a.jpg", "a.json", "_annotations.coco.json", "b.txt")
    (tmp_path / "cats").symlink_to("/nowhere/cats")
    with caplog.at_level(logging.WARNING):
        find_images(tmp_path)
    assert "1 .json that belongs to no image" in caplog.text
    assert "1 .txt that belongs to no image" in caplog.text
    assert "1 link to nowhere" in caplog.text
    assert f"(such as {tmp_path}/cats)" in caplog.text


def test_a_class_from_two_places_is_refused(tmp_path: Path) -> None:
    make_files(tmp_path, "cat/a.jpg", "cat/a.cls")
    with pytest.raises(DataError, match=r"a\.jpg has a \.cls next to it and also the class cat"):
        find_images(tmp_path)


def test_what_systems_leave_behind_is_no_image(tmp_path: Path) -> None:
    make_files(tmp_path, "cat/a.jpg", "dog/b.jpg", "cat/@eaDir/a.jpg/thumb.jpg", "Thumbs.db")
    make_files(tmp_path, "__MACOSX/cat/._a.jpg", "__MACOSX/x.jpg", ".ipynb_checkpoints/a.jpg")
    files, classes = find_images(tmp_path)
    assert (keys(files), classes) == (["cat/a", "dog/b"], ("cat", "dog"))


def test_names_that_are_not_utf8_can_be_written(tmp_path: Path) -> None:
    make_files(tmp_path, "caf\udce9/a.jpg", "dog/b\udcff.jpg")
    files, classes = find_images(tmp_path)
    assert classes == ("caf\\xe9", "dog")
    assert [file.source for file in files] == ["caf\\xe9/a.jpg", "dog/b\\xff.jpg"]
    for file in files:
        file.key.encode()


def test_given_classes_keep_their_numbers(tmp_path: Path) -> None:
    make_files(tmp_path, "dog/1.jpg", "owl/2.jpg")
    files, classes = find_images(tmp_path, ("cat", "dog", "owl"))
    assert classes == ("cat", "dog", "owl")
    assert [file.label for file in files] == [1, 2]
    with pytest.raises(DataError, match="not among the given ones: owl; given are cat, dog"):
        find_images(tmp_path, ("cat", "dog"))
    make_files(tmp_path / "flat", "1.jpg")
    with pytest.raises(DataError, match="have no classes"):
        find_images(tmp_path / "flat", ("cat", "dog"))


def test_a_name_like_another_ones_key_with_its_hash_is_refused(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jpg", "a.png", "a-509b0d46.jpg")
    with pytest.raises(DataError, match="2 images get the key 'a-509b0d46'"):
        find_images(tmp_path)
