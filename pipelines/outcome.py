"""How a stage ends: its result, or an error with an exit code that may or may not pass.

The errors of the three packages, and the exit code of each:

    ConfigError             2  the user's config can't run
    RefusedError            3  a gate refused
    DataError               4  the data can't be used (mae_core.data.samples)
      ChangedDataError         a shard is not what its index says (pipelines.reading.shards)
      NotMeasuredError         an evaluation failed (pipelines.downstream.measuring)
    NoShardsError           4  there are no shards (infra.storage)
    DamagedFileError        4  one of our own files is damaged (infra.own_files)
    CorruptCheckpointError  4  a checkpoint is not what its manifest says (mae_core.checkpoint)
    StorageError            5  a store or a disk failed (infra.storage)
      HeldError                another process holds the lease (infra.lease)
      RayStartError            no Ray starts here (pipelines.training.local_ray)
      SupersededError          a later start took the run over (pipelines.training.run_folder)
    NonFiniteLossError      6  the loss is not finite (mae_core.train_step)

Classes are recognised by their names, so that neither torch nor Ray is imported to report an
error.
"""

import importlib
from typing import Any, Literal, NamedTuple

OURS = ("infra", "mae_core", "pipelines")
INFRASTRUCTURE = "infrastructure error"
# By class: the exit code, and how the line on stderr begins. See docs/guides/run.md.
EXIT_CODES: dict[str, tuple[int, str]] = {
    "ConfigError": (2, "config error"),
    "RefusedError": (3, "refused"),
    "DataError": (4, "data error"),
    "NoShardsError": (4, "data error"),
    "DamagedFileError": (4, "data error"),
    "CorruptCheckpointError": (4, "data error"),
    "StorageError": (5, INFRASTRUCTURE),
    "NonFiniteLossError": (6, "training error"),
}
# Ray's: a machine or a process failed, not what it was asked.
PASSING_TYPES = {
    "ActorDiedError",
    "ActorUnavailableError",
    "GetTimeoutError",
    "NodeDiedError",
    "ObjectLostError",
    "OutOfMemoryError",
    "OwnerDiedError",
    "PreemptionError",
    "RayActorError",
    "RaySystemError",
    "WorkerCrashedError",
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
    "WorkerGroupStartupTimeoutError",
}
# What a store says when the same request would fail again.
LASTING_TEXTS = (
    "ACCESS_DENIED",
    "AccessDenied",
    "INVALID_ACCESS_KEY_ID",
    "InvalidAccessKeyId",
    "NO_SUCH_BUCKET",
    "NoSuchBucket",
    "SIGNATURE_DOES_NOT_MATCH",
    "SignatureDoesNotMatch",
    "HTTP status 403",
    "HTTP status 404",
    "No space left on device",
    "Read-only file system",
    "database or disk is full",
    "readonly database",
    "folder can't be made",
    "a later start of this run",
)


OUT_OF_MEMORY = (
    "this machine, or what it gives the run, ran out of memory; the same command goes on from the "
    "last checkpoint. If it happens again: a smaller optim.micro_batch_size or "
    "data.shuffle_window, fewer scaling.num_workers, or more memory"
)
NOT_STARTED = (
    "the training workers did not start in time; the machine or the cluster may be busy: try again"
)


class ConfigError(ValueError):
    """The user's config can't run; says what, where, and what to try."""


class RefusedError(RuntimeError):
    """A gate refused; says what was found, as a table."""


class StageResult(NamedTuple):
    """What a stage made. Printed as the last line of stdout."""

    stage: str
    status: Literal["done", "reused", "evaluated"]  # evaluated: trained before, measured anew
    run_id: str | None  # MLflow's
    output: str  # URI of what the stage made
    metrics: dict[str, float]


class Explanation(NamedTuple):
    """An error in the words of the command line."""

    exit_code: int
    title: str
    message: str
    can_pass: bool
    """Whether the same command may succeed: a store or a worker failed, not what it was asked."""


def explain(error: BaseException) -> Explanation:
    """Explain an error by the first one that we know among it and what caused it."""
    links = chain(error)
    # First, since a worker that was killed for its memory also looks like one that crashed.
    if any(_is_out_of_memory(link) for link in links):
        return Explanation(5, INFRASTRUCTURE, OUT_OF_MEMORY, True)
    for link in links:
        if (known := _known(link)) is not None:
            return Explanation(*EXIT_CODES[_kind(known)], str(known), _is_passing(known))
        if names := _names_of_ray(link) & PASSING_TYPES:
            is_late = "WorkerGroupStartupTimeoutError" in names
            message = NOT_STARTED if is_late else f"{type(link).__name__}: {_first_line(link)}"
            return Explanation(5, INFRASTRUCTURE, message, True)
    return Explanation(1, "error", f"{type(error).__name__}: {error}", False)


def can_pass(error: BaseException) -> bool:
    """Whether the same command may succeed: a store or a worker failed, not what it was asked."""
    return explain(error).can_pass


def known_error(error: BaseException) -> Exception | None:
    """The first error that has an exit code of its own, among an error and what caused it.

    A full or read-only disk that the system told of becomes a StorageError.
    """
    return next((known for link in chain(error) if (known := _known(link)) is not None), None)


def lasting_error(error: BaseException) -> Exception | None:
    """The known error that the same step would meet again; None where another try may help."""
    known = known_error(error)
    return None if known is None or _is_passing(known) else known


def chain(error: BaseException) -> list[BaseException]:
    """An error, what caused it, and the errors of each worker that a group's error holds."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, BaseException) or any(link is known for known in found):
            continue
        found.append(link)
        workers = getattr(link, "worker_failures", None)
        waiting += list(workers.values()) if isinstance(workers, dict) else []
        # Ray keeps what a task raised in `cause`, what its controller met in the second, and what a
        # worker's own code raised in the third.
        inner = ("cause", "controller_failure", "_base_exc")
        waiting += [getattr(link, name, None) for name in inner]
        waiting += [link.__cause__, link.__context__]
    return found


def _kind(error: BaseException) -> str:
    """The name of the first class that has an exit code; "" without one."""
    return next((x.__name__ for x in type(error).__mro__ if x.__name__ in EXIT_CODES), "")


def _is_out_of_memory(error: BaseException) -> bool:
    # CUDA has an OutOfMemoryError, too, which the same step meets again.
    return isinstance(error, MemoryError) or "OutOfMemoryError" in _names_of_ray(error)


def _names_of_ray(error: BaseException) -> set[str]:
    """The names of an error's classes that are Ray's, which joins its own and that of the cause."""
    return {x.__name__ for x in type(error).__mro__ if x.__module__.split(".")[0] == "ray"}


def _is_from(error: BaseException, *packages: str) -> bool:
    return any(cls.__module__.split(".")[0] in packages for cls in type(error).__mro__)


def _known(error: BaseException) -> Exception | None:
    if isinstance(error, Exception) and _kind(error) and _is_from(error, *OURS):
        return error
    # Of a user's own file that we may not read, the system's words are better than ours.
    if isinstance(error, PermissionError):
        return None
    file = getattr(error, "filename", None)
    # By name: a mistake in a config is told before Arrow, which storage needs, is loaded.
    disk_error: Any = importlib.import_module("infra.storage").disk_error
    found: Exception | None = disk_error(f"write {file}" if file else "write", error)
    return found


def _is_passing(error: Exception) -> bool:
    if _kind(error) != "StorageError":
        return False
    is_lasting: bool = getattr(error, "is_lasting", False)
    return not (is_lasting or any(text in str(error) for text in LASTING_TEXTS))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
