"""A stage's result in its folder: committed last, checked by size, cleared but for its lease."""

from pathlib import Path

import pytest

from pipelines.chain.execute import KeyParts
from pipelines.chain.folder import StageFolder, earlier_folders
from pipelines.outcome import StageResult

PARTS = KeyParts(kind="x", version=1, code={"m": "1"}, config={"a": 1}, inputs={}, needs={})


@pytest.fixture
def folder(tmp_path: Path) -> StageFolder:
    made = StageFolder(str(tmp_path / "store"), "pretrain", "abc")
    Path(made.uri, "checkpoints").mkdir(parents=True)
    Path(made.uri, "checkpoints/model").write_bytes(b"12345")
    Path(made.uri, "lease").write_text("held")
    return made


def result(output: str) -> StageResult:
    return StageResult("pretrain", "done", "run", output, {"loss": 0.5})


def test_a_folder_is_named_by_kind_and_key(tmp_path: Path) -> None:
    folder = StageFolder(str(tmp_path), "pretrain", "abc")
    assert folder.uri == f"{tmp_path}/stages/pretrain/abc"
    assert folder.read_done() is None
    assert folder.read_parts() is None


def test_what_was_committed_is_read_again(folder: StageFolder) -> None:
    folder.write_parts(PARTS)
    done = folder.commit(result(f"{folder.uri}/checkpoints"), seconds=2.0)
    assert done.files == {"checkpoints/model": 5}
    assert folder.read_done() == done
    assert folder.read_parts() == PARTS
    assert folder.problem(done) is None


def test_a_folder_that_moves_takes_its_output_along(folder: StageFolder, tmp_path: Path) -> None:
    done = folder.commit(result(f"{folder.uri}/checkpoints"), seconds=2.0)
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    moved = StageFolder(str(tmp_path / "elsewhere"), "pretrain", "abc")
    assert moved.output(done) == f"{moved.uri}/checkpoints"
    assert moved.problem(done) is None


def test_a_file_that_is_gone_or_of_another_size_is_named(folder: StageFolder) -> None:
    done = folder.commit(result(folder.uri), seconds=2.0)
    file = Path(folder.uri, "checkpoints/model")
    file.write_bytes(b"1234")
    assert folder.problem(done) == "checkpoints/model has 4 bytes, not 5"
    file.unlink()
    assert folder.problem(done) == "checkpoints/model is gone"


def test_an_output_outside_of_the_folder_is_watched_too(
    folder: StageFolder, tmp_path: Path
) -> None:
    outside = tmp_path / "shards"
    outside.mkdir()
    (outside / "a.tar").write_bytes(b"123")
    done = folder.commit(result(str(outside)), seconds=2.0)
    assert done.output == str(outside)
    assert done.files[f"{outside}/a.tar"] == 3
    (outside / "a.tar").unlink()
    assert folder.problem(done) == f"{outside}/a.tar is gone"


def test_a_damaged_record_counts_as_none(folder: StageFolder) -> None:
    folder.commit(result(folder.uri), seconds=2.0)
    Path(folder.uri, "done.json").write_text('{"output": "x"')
    Path(folder.uri, "key.json").write_text("[]")
    assert folder.read_done() is None
    assert folder.read_parts() is None


def test_clearing_leaves_the_lease_alone(folder: StageFolder) -> None:
    folder.write_parts(PARTS)
    folder.commit(result(folder.uri), seconds=2.0)
    folder.clear()
    assert [path.name for path in Path(folder.uri).iterdir()] == ["lease"]


def test_earlier_results_of_a_kind_are_found(folder: StageFolder) -> None:
    Path(folder.uri).with_name("def").mkdir()
    found = list(earlier_folders(folder.root, "pretrain"))
    assert [one.key for one in found] == ["abc", "def"]
    assert list(earlier_folders(folder.root, "classify")) == []
