"""Which errors are tried again."""

import pytest
import ray.exceptions
from ray.train.v2.api.exceptions import WorkerGroupError

from infra.storage import StorageError
from mae_core.data.samples import DataError
from mae_core.train_step import NonFiniteLossError
from pipelines.config import ConfigError
from pipelines.failures import PASSING_TYPES, can_pass


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
        StorageError("the disk is full"),
        StorageError("/runs/x: a later start of this run has taken it over"),
        WorkerGroupError("a worker failed", {0: ValueError("bug"), 1: None}),
        KeyError("bug"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_what_it_was_asked_may_not(error: Exception) -> None:
    assert not can_pass(error)


def test_memory_of_a_gpu_is_not_rays() -> None:
    class OutOfMemoryError(RuntimeError):  # as torch's is named
        pass

    assert not can_pass(OutOfMemoryError("CUDA out of memory"))


def test_errors_in_a_circle_end() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not can_pass(first)


@pytest.mark.parametrize("name", sorted(PASSING_TYPES))
def test_each_name_is_one_of_rays(name: str) -> None:
    modules = [ray.exceptions, __import__("ray.train.v2._internal.exceptions", fromlist=["x"])]
    modules.append(__import__("ray.train.v2.api.exceptions", fromlist=["x"]))
    assert any(hasattr(module, name) for module in modules)
