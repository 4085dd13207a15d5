"""What a killed command has left in the folder for passing files goes with the next start."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra import scratch

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from infra import scratch
with scratch.held_folder(sys.argv[1]) as folder:
    (folder / "model.safetensors").write_bytes(bytes(100))
    print(folder, flush=True)
    time.sleep(600)
"""


def left_by_a_killed_process(parent: Path) -> Path:
    """Return a folder whose process was killed while it used it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert scratch.remove_left_behind(str(parent)) == []  # it lives
        process.send_signal(signal.SIGKILL)
    return folder


def test_only_the_folder_of_a_killed_process_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = left_by_a_killed_process(tmp_path)
    assert (left / "model.safetensors").exists()
    (tmp_path / "mae-pictures").mkdir()  # of somebody who likes the name
    (tmp_path / "mae-12345678").mkdir()  # of an older version, or not locked yet
    (tmp_path / "mae-0-04d486c6").mkdir()
    (tmp_path / "mae-0-04d486c6" / scratch.LOCK_FILE).touch()
    (tmp_path / "mae-abcdefgh").symlink_to(left)
    (tmp_path / "mae-abcdefgi").touch()
    caplog.set_level("INFO")
    with scratch.held_folder(str(tmp_path)) as used:
        assert scratch.remove_left_behind(str(tmp_path)) == [left]
        assert {path.name for path in tmp_path.iterdir()} == {
            "mae-pictures",
            "mae-12345678",
            "mae-0-04d486c6",
            "mae-abcdefgh",
            "mae-abcdefgi",
            used.name,
        }
    assert caplog.messages == [f"removed a folder that killed commands have left in {tmp_path}"]


def test_a_folder_that_is_to_be_kept_stays(tmp_path: Path) -> None:
    with scratch.held_folder(str(tmp_path)) as folder:
        scratch.keep(folder)
    assert scratch.remove_left_behind(str(tmp_path)) == []
    assert folder.is_dir()


def test_a_folder_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch.held_folder(str(tmp_path)) as folder:
        pass
    monkeypatch.setattr(scratch.os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert scratch.remove_left_behind(str(tmp_path)) == []
    assert folder.is_dir()


def test_a_link_is_never_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch.held_folder(str(tmp_path)) as target:
        pass
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "mae-abcdefgh").symlink_to(target)
    asked: list[Path] = []
    monkeypatch.setattr(scratch.shutil, "rmtree", lambda path, **_: asked.append(path))
    assert scratch.remove_left_behind(str(tmp_path / "parent")) == []
    assert asked == []


def test_a_scratch_folder_is_empty_and_removed_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    left = left_by_a_killed_process(tmp_path)
    with scratch.scratch_folder() as folder:
        assert not left.exists()
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parent_is_no_error_before_a_folder_is_made() -> None:
    assert scratch.remove_left_behind("/no/such") == []


def test_no_other_temporary_folder_is_made() -> None:
    files = [path for name in ("pipelines", "infra") for path in (ROOT / name).rglob("*.py")]
    assert len(files) > 80
    assert [str(file) for file in files if "TemporaryDirectory" in file.read_text()] == []
