from pathlib import Path

import pytest

from infra.file_names import UnsafeNameError, path_below, problem_of_name


@pytest.mark.parametrize(
    "name", ["a", "a.b", "sub/file.bin", "..a", "a..", "köln.txt", "-x", "a b"]
)
def test_a_plain_name_is_joined_to_the_folder(name: str, tmp_path: Path) -> None:
    assert problem_of_name(name) is None
    assert path_below(tmp_path, name, "manifest") == tmp_path / name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        ("/etc/passwd", "is an absolute path"),
        ("C:evil", "is an absolute path"),
        ("..", "has a part that is empty, '.' or '..'"),
        ("../evil", "has a part that is empty, '.' or '..'"),
        ("a/../../evil", "has a part that is empty, '.' or '..'"),
        ("a//b", "has a part that is empty, '.' or '..'"),
        ("./a", "has a part that is empty, '.' or '..'"),
        ("a/", "has a part that is empty, '.' or '..'"),
        ("..\\evil", "has a backslash"),
        ("a\0b", "has a control character"),
        ("a\nb", "has a control character"),
        ("x" * 256, "has a part longer than 255 bytes"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name: str, problem: str, tmp_path: Path) -> None:
    assert problem_of_name(name) == problem
    with pytest.raises(UnsafeNameError, match="s3://bucket/set: the file name"):
        path_below(tmp_path, name, "s3://bucket/set")


def test_a_link_in_the_folder_is_not_followed_out_of_it(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (folder / "sub").symlink_to(outside)
    (folder / "file").symlink_to(outside / "file")
    for name in ("sub/file", "file"):
        with pytest.raises(UnsafeNameError, match="symbolic link"):
            path_below(folder, name, "manifest")
