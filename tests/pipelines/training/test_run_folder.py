"""What a run's folder remembers, and which errors end a run for good."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import storage
from infra.own_files import DamagedFileError
from infra.storage import StorageError
from mae_core.checkpoint_manifest import CorruptCheckpointError
from mae_core.data.samples import DataError
from mae_core.training_error import NonFiniteLossError
from pipelines.outcome import ConfigError, StageResult
from pipelines.training.run_folder import RunFolder, RunRecord, SupersededError


class TaskError(Exception):
    """As Ray's: what the task raised is in `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a task failed")
        self.cause = cause


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "run"))


def test_an_empty_folder_remembers_nothing(folder: RunFolder) -> None:
    assert folder.read_record() is None
    assert folder.read_result() is None
    assert folder.read_evaluation("k") is None
    folder.raise_failure()
    folder.forget_failure()


def test_what_is_written_is_read(folder: RunFolder) -> None:
    record = RunRecord(start="1", data_digest="abc", run_id=None, config={"seed": 1})
    result = StageResult("pretrain", "done", "run", "/out", {"knn/top1": 0.5})
    folder.write_record(record)
    folder.write_result(result)
    folder.write_evaluation("k", {"knn/top1": 0.25})
    assert folder.read_record() == record
    assert folder.read_result() == result
    assert folder.read_evaluation("k") == {"knn/top1": 0.25}


WRITES: dict[str, Callable[[RunFolder], None]] = {
    "evaluation": lambda folder: folder.write_evaluation("k", {}),
    "result": lambda folder: folder.write_result(StageResult("pretrain", "done", "", "", {})),
    "picture": lambda folder: folder.write_picture(b""),
    "failure": lambda folder: folder.record_failure(DataError("here")),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_start_writes_until_a_later_one_takes_the_folder_over(
    folder: RunFolder, write: Callable[[RunFolder], None]
) -> None:
    def record(start: str) -> RunRecord:
        return RunRecord(start=start, data_digest="abc", run_id=None, config={})

    first, second = RunFolder(folder.uri, "1"), RunFolder(folder.uri, "2")
    folder.write_record(record("1"))
    write(first)
    folder.write_record(record("2"))
    before = sorted(Path(folder.uri).iterdir())
    with pytest.raises(SupersededError, match="a later start of this run has taken it over"):
        write(first)
    assert sorted(Path(folder.uri).iterdir()) == before
    write(second)
    folder.clear()  # as --fresh does
    assert second.is_superseded()


def test_storage_that_does_not_answer_supersedes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(uri: str) -> bytes:
        raise storage.StorageError(f"cannot read {uri}")

    monkeypatch.setattr(storage, "read_bytes", fail)
    assert not RunFolder("s3://bucket/run", "1").is_superseded()


def test_a_cleared_folder_keeps_only_the_index_of_its_shards(folder: RunFolder) -> None:
    folder.clear()
    folder.write_evaluation("k", {"a": 1.0})
    for name in ("checkpoints/step-00000005/manifest.json", "shards/train/manifest.json"):
        file = Path(folder.uri, name)
        file.parent.mkdir(parents=True)
        file.touch()
    folder.clear()
    assert [str(p.relative_to(folder.uri)) for p in Path(folder.uri).rglob("*.json")] == [
        "shards/train/manifest.json"
    ]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("broken"), DataError),
        (NonFiniteLossError("broken"), NonFiniteLossError),
        (CorruptCheckpointError("broken"), CorruptCheckpointError),
        (ConfigError("broken"), ConfigError),
        (StorageError("broken", is_lasting=True), StorageError),
        (TaskError(NonFiniteLossError("broken")), NonFiniteLossError),
    ],
)
def test_a_lasting_error_is_raised_at_the_next_start(
    folder: RunFolder, error: Exception, kind: type[Exception]
) -> None:
    folder.record_failure(error)
    with pytest.raises(kind, match=r"^broken$"):
        folder.raise_failure()


def test_the_same_command_tries_again_after_a_lasting_error(folder: RunFolder) -> None:
    folder.record_failure(DataError("broken"))
    folder.forget_failure()
    folder.raise_failure()


@pytest.mark.parametrize(
    "error", [OSError("net"), StorageError("net"), RuntimeError("worker died"), SystemExit(1)]
)
def test_a_passing_error_is_not_kept(folder: RunFolder, error: BaseException) -> None:
    folder.record_failure(error)
    folder.raise_failure()


def test_a_kept_error_of_the_store_stays_one_that_lasts(folder: RunFolder) -> None:
    folder.record_failure(StorageError("the disk is full", is_lasting=True))
    with pytest.raises(StorageError) as caught:
        folder.raise_failure()
    assert caught.value.is_lasting


def test_a_store_that_takes_no_file_is_met_before_the_workers_start(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.check_writable()
    assert storage.list_files(folder.uri) == []

    def refuse(_: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    folder.record_failure(DataError("can't be kept"))  # must not hide what it is called for
    with pytest.raises(StorageError, match="the disk is read-only"):
        folder.check_writable()


def test_a_bad_sample_is_listed_once_whenever_it_is_met(folder: RunFolder) -> None:
    def bad(epoch: int, key: str) -> dict[str, object]:
        return {"epoch": epoch, "shard": "s.tar", "key": key, "kind": "empty", "reason": "none"}

    assert folder.read_bad_samples() == []
    folder.add_bad_samples([bad(0, "a"), bad(0, "b")])
    folder.add_bad_samples([bad(1, "b"), bad(1, "c")])
    listed = [(line["epoch"], line["key"]) for line in folder.read_bad_samples()]
    assert listed == [(0, "a"), (0, "b"), (1, "c")]


def test_a_config_error_of_a_worker_stays_one(folder: RunFolder) -> None:
    folder.record_failure(ConfigError("no such thing"))
    with pytest.raises(ConfigError, match="no such thing"):
        folder.raise_failure()


def test_an_evaluation_of_something_else_is_none_of_this_command(folder: RunFolder) -> None:
    folder.write_evaluation("k", {"knn/top1": 0.25})
    assert folder.read_evaluation("other") is None
    assert folder.read_evaluation("") == {}


def test_an_evaluation_of_an_earlier_version_is_made_again(folder: RunFolder) -> None:
    folder.write_file("evaluation.json", b'{"knn/top1": 0.25}')
    assert folder.read_evaluation("k") is None


def test_a_result_whose_output_is_gone_is_made_again(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    output = Path(folder.write_file("model", b"1"))
    result = StageResult("pretrain", "done", None, str(output), {})
    folder.write_result(result)
    assert folder.read_whole_result() == result
    output.unlink()
    assert folder.read_whole_result() is None
    assert "is missing: it is made again" in caplog.text


DAMAGES = [b"", b"{", b"[]", b'"x"', b'{"stage": 1}', b"\xff\xfe"]


@pytest.mark.parametrize("data", DAMAGES)
def test_a_damaged_result_costs_a_warning_and_is_made_again(
    data: bytes, folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_file("result.json", b"{}")
    Path(folder.uri, "result.json").write_bytes(data)
    assert folder.read_result() is None
    assert f"{folder.uri}/result.json is damaged" in caplog.text


@pytest.mark.parametrize("data", DAMAGES)
def test_a_damaged_record_is_named_and_not_written_over(data: bytes, folder: RunFolder) -> None:
    folder.write_file("run.json", b"{}")
    Path(folder.uri, "run.json").write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"run\.json is damaged .*start over with --fresh"):
        folder.read_record()
    assert Path(folder.uri, "run.json").read_bytes() == data


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"top1": "high"}'])
def test_a_damaged_arm_is_measured_again(data: bytes, folder: RunFolder) -> None:
    folder.write_arm("knn", '{"top1": 0.5}')
    assert folder.has_arm("knn")
    Path(folder.uri, "arms/knn/metrics.json").write_bytes(data)
    assert not folder.has_arm("knn")


def test_a_damaged_line_of_bad_samples_is_kept_and_the_others_are_read(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_file("bad_samples.jsonl", b'{"shard": "s", "key": "a"}\n{"sha\nnull\n')
    folder.add_bad_samples([{"shard": "s", "key": "b"}])
    assert [line["key"] for line in folder.read_bad_samples()] == ["a", "b"]
    assert "2 lines are damaged" in caplog.text
    assert b'\n{"sha\nnull\n' in Path(folder.uri, "bad_samples.jsonl").read_bytes()


def test_a_damaged_failure_stops_no_start(folder: RunFolder) -> None:
    folder.write_file("failed.json", b"{")
    folder.raise_failure()
