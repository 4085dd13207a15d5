"""Which errors may pass: a stage is tried again after them, and after no others."""

from infra import storage

# By name: neither Ray nor torch is imported to tell what went wrong.
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
    "INVALID_ACCESS_KEY_ID",
    "NO_SUCH_BUCKET",
    "SIGNATURE_DOES_NOT_MATCH",
    "HTTP status 403",
    "HTTP status 404",
    "disk is full",
    "a later start of this run",
)


def can_pass(error: BaseException) -> bool:
    """Whether the same command may succeed: a store or a worker failed, not what it was asked."""
    for link in _chain(error):
        if isinstance(link, storage.StorageError):
            return not any(text in str(link) for text in LASTING_TEXTS)
        # CUDA has an OutOfMemoryError, too, which the same step meets again.
        if type(link).__module__.startswith("ray.") and type(link).__name__ in PASSING_TYPES:
            return True
    return False


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, and the errors of each worker that a group's error holds."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is None or any(link is known for known in found):
            continue
        found.append(link)
        waiting += [link.__cause__, link.__context__, getattr(link, "cause", None)]
        workers = getattr(link, "worker_failures", None)
        waiting += list(workers.values()) if isinstance(workers, dict) else []
    return found
