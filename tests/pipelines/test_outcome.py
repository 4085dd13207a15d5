"""The name and exit code of each error, and whether it is retried."""

import errno
from collections.abc import Callable

import pytest
import ray.exceptions
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from infra.lease import HeldError
from infra.storage import NoShardsError, StorageError
from mae_core.checkpoint_manifest import CorruptCheckpointError
from mae_core.data.samples import DataError
from mae_core.training_error import NonFiniteLossError
from pipelines.outcome import (
    NOT_STARTED,
    OUT_OF_MEMORY,
    PASSING_TYPES,
    ConfigError,
    RefusedError,
    can_pass,
    explain,
    lasting_error,
)


def caused(outer: Exception, inner: BaseException) -> Exception:
    outer.__cause__ = inner
    return outer


@pytest.mark.parametrize(
    "error",
    [
        StorageError("cannot read s3://b/k: AWS Error NETWORK_CONNECTION"),
        StorageError("cannot read s3://b/k: AWS Error UNKNOWN (HTTP status 502)"),
        ray.exceptions.RayActorError(),
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.OutOfMemoryError("killed"),
        caused(RuntimeError("training failed"), ray.exceptions.NodeDiedError("gone")),
        WorkerGroupError("a worker failed", {0: ray.exceptions.RayActorError()}),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_store_or_a_worker_that_failed_may_pass(error: Exception) -> None:
    assert can_pass(error)


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("optim.lrr"),
        DataError("half a tar"),
        NonFiniteLossError("nan at step 3"),
        StorageError("cannot read s3://b/k: ACCESS_DENIED"),
        StorageError("there is no bucket 'b'. (NO_SUCH_BUCKET)"),
        StorageError("the disk is full", is_lasting=True),
        CorruptCheckpointError("half a file"),
        WorkerGroupError("a worker failed", {0: StorageError("AccessDenied"), 1: OSError("net")}),
        ControllerError(StorageError("HTTP status 403")),
        OSError(errno.ENOSPC, "No space left on device", "/tmp/x"),
        StorageError("/runs/x: a later start of this run has taken it over"),
        WorkerGroupError("a worker failed", {0: ValueError("bug"), 1: None}),
        KeyError("bug"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_what_it_was_asked_may_not(error: Exception) -> None:
    assert not can_pass(error)


class TaskError(Exception):
    """Imitates Ray's error, which has the task's own error in `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a task failed")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (ConfigError("x"), 2, "config error: x"),
        (RefusedError("x"), 3, "refused: x"),
        (DataError("x"), 4, "data error: x"),
        (NoShardsError("x"), 4, "data error: x"),
        (CorruptCheckpointError("x"), 4, "data error: x"),
        (StorageError("x"), 5, "infrastructure error: x"),
        (HeldError("x"), 5, "infrastructure error: x"),
        (NonFiniteLossError("x"), 6, "training error: x"),
        (
            OSError(errno.EROFS, "Read-only file system", "/runs/x"),
            5,
            "infrastructure error: cannot write /runs/x: the disk is read-only ([Errno 30] "
            "Read-only file system: '/runs/x'). Mount it for writing, or choose another "
            "storage.root",
        ),
        (
            ray.exceptions.OutOfMemoryError("killed\n" + 700 * "noise\n"),
            5,
            f"infrastructure error: {OUT_OF_MEMORY}",
        ),
        (KeyError("x"), 1, "error: KeyError: 'x'"),
        (PermissionError(errno.EACCES, "no"), 1, "error: PermissionError: [Errno 13] no"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_has_an_exit_code_and_one_line(
    error: Exception, exit_code: int, line: str
) -> None:
    explained = explain(error)
    assert (explained.exit_code, f"{explained.title}: {explained.message}") == (exit_code, line)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda error: caused(RuntimeError("wrapped"), error),
        lambda error: TaskError(error),
        lambda error: caused(TaskError(caused(TaskError(error), KeyError("x"))), KeyError("y")),
        lambda error: WorkerGroupError("Traceback ...", {0: OSError("net"), 1: TaskError(error)}),
        lambda error: ControllerError(error),
    ],
    ids=["cause", "ray", "nested", "workers", "controller"],
)
def test_an_error_keeps_its_code_and_its_words_below_what_wraps_it(
    wrap: Callable[[Exception], Exception],
) -> None:
    explained = explain(wrap(StorageError("the disk is full", is_lasting=True)))
    assert explained == (5, "infrastructure error", "the disk is full", False)
    assert isinstance(lasting_error(wrap(DataError("x"))), DataError)
    assert lasting_error(wrap(StorageError("net"))) is None


def test_an_error_of_the_same_name_is_not_ours() -> None:
    foreign = type("DataError", (Exception,), {"__module__": "sqlalchemy.exc"})
    assert explain(foreign("x")).exit_code == 1


def test_memory_of_a_gpu_is_not_rays() -> None:
    class OutOfMemoryError(RuntimeError):  # as torch's is named
        pass

    assert not can_pass(OutOfMemoryError("CUDA out of memory"))


def task_error(cause: Exception) -> Exception:
    """Imitate the driver's error, whose class Ray derives from its own and the cause's."""
    return ray.exceptions.RayTaskError("read", "traceback\n" * 90, cause).as_instanceof_cause()


OUT = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low.\n" * 90)


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (OUT, OUT_OF_MEMORY),
        (task_error(OUT), OUT_OF_MEMORY),
        (WorkerGroupError("trace\n" * 90, {0: UserExceptionWithTraceback(OUT, "")}), OUT_OF_MEMORY),
        (
            WorkerGroupError("trace", {0: ray.exceptions.ActorDiedError(), 1: OUT}),
            OUT_OF_MEMORY,
        ),
        (WorkerGroupError("trace", {1: MemoryError()}), OUT_OF_MEMORY),
        (ControllerError(WorkerGroupStartupTimeoutError(2)), NOT_STARTED),
    ],
)
def test_memory_and_a_start_that_took_too_long_are_told_in_one_line(
    error: Exception, explained: str
) -> None:
    assert explain(error) == (5, "infrastructure error", explained, True)
    assert len(explained.splitlines()) == 1


def test_errors_in_a_circle_end() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not can_pass(first)


@pytest.mark.parametrize("name", sorted(PASSING_TYPES))
def test_each_name_is_one_of_rays(name: str) -> None:
    modules = [ray.exceptions, __import__("ray.train.v2._internal.exceptions", fromlist=["x"])]
    modules.append(__import__("ray.train.v2.api.exceptions", fromlist=["x"]))
    assert any(hasattr(module, name) for module in modules)
