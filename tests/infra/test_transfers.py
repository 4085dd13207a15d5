import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import storage, transfers
from infra.file_names import UnsafeNameError
from infra.storage import StorageError
from infra.transfers import WrongSizeError


def test_a_folder_comes_back_as_it_was_sent(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_bytes(bytes(range(256)))
    (source / "empty").write_bytes(b"")
    (source / "DONE").write_bytes(b"{}")
    transfers.upload_folder(source, root, last="DONE")
    sizes = {"sub/weights": 256, "empty": 0, "DONE": 2}
    transfers.download_files(root, sizes, tmp_path / "back")
    back = {
        str(file.relative_to(tmp_path / "back")): file.read_bytes()
        for file in (tmp_path / "back").rglob("*")
        if file.is_file()
    }
    assert back == {"sub/weights": bytes(range(256)), "empty": b"", "DONE": b"{}"}


def test_the_marker_is_uploaded_last(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path)
    written: list[str] = []
    write_chunks = storage.write_chunks

    def record(uri: str, chunks: Iterator[bytes]) -> None:
        written.append(uri.rsplit("/", 1)[1])
        write_chunks(uri, chunks)

    monkeypatch.setattr(storage, "write_chunks", record)
    transfers.upload_folder(source, root, last="DONE")
    assert written == ["a", "z", "DONE"]


def make_checkpoint(tmp_path: Path) -> Path:
    source = tmp_path / "checkpoint"
    source.mkdir()
    for name in ("a", "DONE", "z"):
        (source / name).write_text(name)
    return source


def test_an_upload_that_breaks_off_leaves_no_marker_of_an_earlier_one(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_checkpoint(tmp_path)
    transfers.upload_folder(source, root, last="DONE")

    def break_off(uri: str, chunks: Iterator[bytes]) -> None:
        raise StorageError(uri)

    monkeypatch.setattr(storage, "write_chunks", break_off)
    with pytest.raises(StorageError):
        transfers.upload_folder(source, root, last="DONE")
    assert not storage.exists(storage.join(root, "DONE"))


def test_a_folder_without_its_marker_is_not_uploaded(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="MANIFEST"):
        transfers.upload_folder(source, str(tmp_path / "target"), last="MANIFEST")
    assert not (tmp_path / "target").exists()


def test_downloading_a_missing_file_is_a_file_not_found_error(root: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        transfers.download_files(root, {"DONE": 2}, tmp_path / "back")


def test_only_the_named_files_are_fetched(root: str, tmp_path: Path) -> None:
    transfers.upload_folder(make_checkpoint(tmp_path), root, last="DONE")
    transfers.download_files(root, {"a": 1}, tmp_path / "back")
    assert [file.name for file in (tmp_path / "back").iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "sub/../../evil", "..\\evil"])
def test_a_name_that_leaves_the_folder_is_refused_before_anything_is_fetched(
    name: str, tmp_path: Path
) -> None:
    root = str(tmp_path / "root")
    transfers.upload_folder(make_checkpoint(tmp_path), root, last="DONE")
    with pytest.raises(UnsafeNameError, match="evil"):
        transfers.download_files(root, {"a": 1, name: 1}, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_file_of_another_size_is_refused_before_it_is_fetched(root: str, tmp_path: Path) -> None:
    transfers.upload_folder(make_checkpoint(tmp_path), root, last="DONE")
    with pytest.raises(WrongSizeError, match=r"DONE: has 4 bytes, not 2"):
        transfers.download_files(root, {"DONE": 2}, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_link_that_is_there_already_is_not_written_through(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    transfers.upload_folder(make_checkpoint(tmp_path), root, last="DONE")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "a").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafeNameError, match="symbolic link"):
        transfers.download_files(root, {"a": 1}, tmp_path / "back")
    assert not (tmp_path / "outside").exists()


def test_a_full_temporary_folder_is_told_from_a_full_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path / "root")
    transfers.upload_folder(make_checkpoint(tmp_path), root, last="DONE")

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", no_space)
    with pytest.raises(StorageError, match=r"back/a: the disk is full .*TMPDIR") as caught:
        transfers.download_files(root, {"a": 1}, tmp_path / "back")
    assert caught.value.is_lasting
