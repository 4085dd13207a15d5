"""Modules are imported beside something else that takes its time."""

import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import processes
from pipelines.training import run
from pipelines.training.early_imports import importing

# Prints which of the packages that Ray's start imports, or may, are there afterwards.
CODE = """
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
print(*(x for x in ("torch", "ray", "mlflow", "pyarrow", "pandas", "grpc") if x in sys.modules))
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Offer a module `slow_to_import`, whose import ends when the event is set."""
    may_end = threading.Event()
    monkeypatch.setattr(sys, "may_end", may_end, raising=False)
    (tmp_path / "slow_to_import.py").write_text("import sys\nassert sys.may_end.wait(20)\n")
    (tmp_path / "broken_to_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield may_end
    may_end.set()
    for thread in threading.enumerate():
        if thread.name == "imports":
            thread.join()
    sys.modules.pop("slow_to_import", None)


def test_modules_are_there_at_the_end_of_the_block(slow: threading.Event) -> None:
    with importing(["slow_to_import"]):
        slow.set()
    assert "slow_to_import" in sys.modules


def test_an_error_is_left_to_the_next_import(slow: threading.Event) -> None:
    slow.set()
    with importing(["broken_to_import", "slow_to_import"]):
        pass
    assert "slow_to_import" in sys.modules
    with pytest.raises(ZeroDivisionError):
        importlib.import_module("broken_to_import")


def test_an_error_of_the_block_leaves_no_thread_behind(slow: threading.Event) -> None:
    slow.set()
    with pytest.raises(ValueError, match="refused"), importing(["slow_to_import"]):
        raise ValueError("refused")
    assert "slow_to_import" in sys.modules
    assert not processes.is_thread_left()


def test_a_command_that_is_stopped_does_not_wait_for_the_imports(slow: threading.Event) -> None:
    with pytest.raises(KeyboardInterrupt), importing(["slow_to_import"]):
        raise KeyboardInterrupt
    assert not slow.is_set()
    assert processes.is_thread_left()


def test_what_is_imported_beside_the_start_of_ray_imports_nothing_of_it() -> None:
    found = subprocess.run(
        [sys.executable, "-c", CODE.format(modules=run.HEAVY)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["torch"]
