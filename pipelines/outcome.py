"""How a stage ends: with a result, or with an error that has an exit code and may be temporary.

The errors of the three packages and the exit code of each:

    ConfigError             2  the user's config can't run
    RefusedError            3  a gate refused
    DataError               4  the data can't be used (mae_core.data.samples)
      ChangedDataError         a shard does not match its index (pipelines.reading.shards)
      NotMeasuredError         an evaluation failed (pipelines.downstream.measuring)
    NoShardsError           4  there are no shards (infra.storage)
    DamagedFileError        4  one of our own files is damaged (infra.own_files)
    CorruptCheckpointError  4  a checkpoint is damaged (mae_core.checkpoint_manifest)
    StorageError            5  a store or a disk failed (infra.storage)
      HeldError                another process holds the lease (infra.lease)
      RayStartError            Ray cannot be started here (pipelines.training.local_ray)
      SupersededError          a later start took over the run (pipelines.training.run_folder)
    NonFiniteLossError      6  the loss is not finite (mae_core.training_error)

Classes are recognised by name, so that reporting an error imports neither torch nor Ray.
"""

import importlib
from typing import Any, Literal, NamedTuple

OURS = ("infra", "mae_core", "pipelines")
INFRASTRUCTURE = "infrastructure error"
# Exit code and first words on stderr of each class. See docs/guides/run.md.
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
# Of a command that Ctrl-C or SIGTERM stopped.
STOPPED_CODES = (130, 143)
# Ray's errors for a machine or process that failed, whatever it was asked to do.
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
# Parts of a store's messages for requests that would fail again.
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
    "this machine, or the share of it that the run may use, ran out of memory; the same command "
    "resumes from the last checkpoint. If it happens again, use a smaller optim.micro_batch_size "
    "or data.shuffle_window, fewer scaling.num_workers, or more memory"
)
NOT_STARTED = (
    "the training workers did not start in time; the machine or the cluster may be busy: try again"
)


class ConfigError(ValueError):
    """The user's config can't run; the message says what is wrong, where, and what to try."""


class RefusedError(RuntimeError):
    """A gate refused; the message is a table of what was found."""


class StageResult(NamedTuple):
    """What a stage produced. Printed as the last line of stdout."""

    stage: str
    status: Literal["done", "reused", "evaluated"]  # evaluated: trained earlier, measured again
    run_id: str | None  # in MLflow
    output: str  # URI of what the stage produced
    metrics: dict[str, float]


class Explanation(NamedTuple):
    """An error in terms of the command line."""

    exit_code: int
    title: str
    message: str
    can_pass: bool
    """Whether the same command may succeed later: a store or a worker failed, not the request."""


def explain(error: BaseException) -> Explanation:
    """Explain an error by the first known error in its chain of causes."""
    links = chain(error)
    # Checked first, because a worker killed for its memory also looks like one that crashed.
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
    """Return whether the same command may succeed later: a store or worker failed."""
    return explain(error).can_pass


def known_error(error: BaseException) -> Exception | None:
    """Return the first error with an exit code of its own in the chain of causes.

    A system error about a full or read-only disk becomes a StorageError.
    """
    return next((known for link in chain(error) if (known := _known(link)) is not None), None)


def lasting_error(error: BaseException) -> Exception | None:
    """Return the known error that the same step would hit again; None if a retry may help."""
    known = known_error(error)
    return None if known is None or _is_passing(known) else known


def chain(error: BaseException) -> list[BaseException]:
    """List an error, its causes, and the errors of each worker that a group's error holds."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop(0)
        if not isinstance(link, BaseException) or any(link is known for known in found):
            continue
        found.append(link)
        workers = getattr(link, "worker_failures", None)
        waiting += list(workers.values()) if isinstance(workers, dict) else []
        # Ray keeps a task's error in `cause`, its controller's in the second attribute, and the one
        # of a worker's own code in the third.
        inner = ("cause", "controller_failure", "_base_exc")
        waiting += [getattr(link, name, None) for name in inner]
        waiting += [link.__cause__, link.__context__]
    return found


def _kind(error: BaseException) -> str:
    """Return the name of the first class that has an exit code, or ""."""
    return next((x.__name__ for x in type(error).__mro__ if x.__name__ in EXIT_CODES), "")


def _is_out_of_memory(error: BaseException) -> bool:
    # CUDA has an OutOfMemoryError too, but the same step would hit that again.
    return isinstance(error, MemoryError) or "OutOfMemoryError" in _names_of_ray(error)


def _names_of_ray(error: BaseException) -> set[str]:
    """Return the names of the error's classes from Ray, which merges its own with the cause's."""
    return {x.__name__ for x in type(error).__mro__ if x.__module__.split(".")[0] == "ray"}


def _is_from(error: BaseException, *packages: str) -> bool:
    return any(cls.__module__.split(".")[0] in packages for cls in type(error).__mro__)


def _known(error: BaseException) -> Exception | None:
    if isinstance(error, Exception) and _kind(error) and _is_from(error, *OURS):
        return error
    # For a user's own file that we may not read, the system's message is better than ours.
    if isinstance(error, PermissionError):
        return None
    file = getattr(error, "filename", None)
    # Imported by name: a wrong config is reported before Arrow, which storage needs, is loaded.
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
