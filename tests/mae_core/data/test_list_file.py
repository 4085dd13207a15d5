"""List files as people and their programs write them."""

from pathlib import Path

import pytest

from mae_core.data.image_files import find_images
from mae_core.data.list_file import read_list
from mae_core.data.samples import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "sub/b.jpg", 'say "x".jpg', "c, d.jpg", "e f.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("a.jpg,cat\nsub/b.jpg,dog\n".encode("utf-16"), [("a.jpg", "cat"), ("sub/b.jpg", "dog")]),
        (b"\xff\xfea\0.\0j\0p\0g\0", [("a.jpg", None)]),
        (b"a.jpg,cat\rsub/b.jpg,dog\r", [("a.jpg", "cat"), ("sub/b.jpg", "dog")]),
        (b"path,label\na.jpg,cat\n", [("a.jpg", "cat")]),
        (b"filename\tclass\na.jpg\tcat\n", [("a.jpg", "cat")]),
        (b"\xef\xbb\xbfImage_Path,Label\r\na.jpg,cat\r\n", [("a.jpg", "cat")]),
        (b'"a.jpg","big, red"\n', [("a.jpg", "big, red")]),
        (b'"c, d.jpg",cat\n', [("c, d.jpg", "cat")]),
        (b'"c, d.jpg"\n', [("c, d.jpg", None)]),
        (b'"say ""x"".jpg",cat\n', [('say "x".jpg', "cat")]),
        (b'a.jpg,"cat"\n', [("a.jpg", "cat")]),
        (b"e f.jpg\tcat\n", [("e f.jpg", "cat")]),
        ("a.jpg,caf\u2028e\n".encode(), [("a.jpg", "caf\u2028e")]),  # no line ends there
        (b"sub\\b.jpg,dog\n", [("sub\\b.jpg", "dog")]),
    ],
)
def test_a_list_is_read_as_it_was_meant(
    folder: Path, data: bytes, found: list[tuple[str, str | None]]
) -> None:
    (folder / "list.csv").write_bytes(data)
    listed = read_list(folder / "list.csv")
    assert [(image.name, image.label) for image in listed] == found
    assert all(image.path.is_file() for image in listed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a.jpg,cat,3\n", r"list\.csv:1: 'a\.jpg,cat' does not end in an image's extension"),
        (b"a.jpg\n" + b"x" * 300 + b".jpg\n", r"list\.csv:2: no such file: .*x\.jpg"),
        (b"a.jpg\nb\0c.jpg\n", "bytes of zero"),
        (b"a.jpg\nsub.jpg\n", r"list\.csv:2: is a folder: .*/sub\.jpg"),
        (b"a.jpg\n\xb2\xe2.jpg\n", r"not a list file in UTF-8.*; save it as UTF-8$"),
    ],
)
def test_what_is_wrong_in_a_list_is_named(folder: Path, data: bytes, message: str) -> None:
    (folder / "sub.jpg").mkdir()
    (folder / "list.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_list(folder / "list.csv")


def test_no_key_of_a_list_leads_out_of_a_folder(folder: Path) -> None:
    (folder / "lists").mkdir()
    names = ["../../x/../a.jpg", f"{folder}/sub/b.jpg", "../e f.jpg"]
    (folder / "a.jpg").rename(folder.parent / "a.jpg")
    (folder / "lists/list.txt").write_text("\n".join(names))
    for file in find_images(folder / "lists/list.txt")[0]:
        assert not file.key.startswith("/")
        assert not {"..", "."} & set(file.key.split("/"))
        assert file.key.isprintable()
