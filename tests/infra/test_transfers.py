from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import storage, transfers
from infra.storage import StorageError


def test_a_folder_comes_back_as_it_was_sent(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_bytes(bytes(range(256)))
    (source / "empty").write_bytes(b"")
    (source / "DONE").write_bytes(b"{}")
    transfers.upload_folder(source, root, last="DONE")
    transfers.download_folder(root, tmp_path / "back")
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


def test_downloading_a_missing_folder_is_a_file_not_found_error(root: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=tmp_path.name):
        transfers.download_folder(root, tmp_path / "back")
