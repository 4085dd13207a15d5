"""Start Ray as the config asks, and refuse what cannot work before Ray would wait for it.

This module imports no torch and little of Ray, so that Ray can start while torch is imported.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import ray
from ray._private.state import state

from infra import machine, storage
from pipelines.config.sections import ScalingConfig
from pipelines.driver import cancelled_by_sigterm
from pipelines.job import ROOT, check_resources, cluster_address
from pipelines.terminal import progress, worker_logging
from pipelines.training import local_ray

logger = logging.getLogger(__name__)

# Logical CPUs that a local Ray gets beyond the workers', for reading: without any left, Ray Data
# waits for ever (facts: reproduced).
SPARE_CPUS = 2
READ_CPUS = 1  # per read task; Ray's default, which lets it run reading and slicing as one task
# By name: given as a function, every process of Ray would import this module to get at it.
SETUP_HOOK = "pipelines.terminal.worker_logging.set_up"


@contextmanager
def running_ray(scaling: ScalingConfig, *, in_driver: bool = False) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or run a local Ray, for the duration of the block.

    Args:
        scaling: the workers.
        in_driver: the one worker is the driver itself.

    Raises:
        ConfigError: the workers do not fit.
        StorageError: the cluster can't be reached, or no Ray starts here.
    """
    address = cluster_address()
    with ExitStack() as stack:
        if ray.is_initialized():
            logger.debug("Ray runs already")
        elif address:
            _join(address)
            stack.callback(ray.shutdown)
            stack.enter_context(cancelled_by_sigterm())
        else:
            cpus, gpus = machine.count_cpus(), machine.count_gpus()
            check_resources(scaling, cpus, gpus, "this machine")
            folder = stack.enter_context(local_ray.private_folder())
            log = folder / "workers.log"
            stack.enter_context(worker_logging.shown(log, progress.write))
            given = local_resources(scaling, log, cpus, gpus, in_driver=in_driver)
            with progress.doing("starting Ray"):
                stack.enter_context(local_ray.running(folder, given))
            stack.enter_context(cancelled_by_sigterm())
        worker_logging.set_up()  # the driver's own loggers, now that Ray has made them
        if address:
            check_resources(scaling, *_cluster_capacity(), f"the cluster {address}")
        yield


def _join(address: str) -> None:
    local_ray.read_environment()
    try:
        with progress.doing(f"joining the Ray cluster {address}"):
            ray.init(
                address,
                runtime_env={"worker_process_setup_hook": SETUP_HOOK},
                logging_level=logging.WARNING,
            )
    except ConnectionError as error:
        raise storage.StorageError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); "
            "start it (make up), or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def local_resources(
    scaling: ScalingConfig, log: Path, cpus: int, gpus: int, *, in_driver: bool = False
) -> local_ray.LocalRay:
    """Return what a Ray on this machine gets; its processes write what we say to `log`.

    Training in the driver takes none of Ray's CPUs. Ray gets fewer then, so that as many read the
    data as beside a worker of Ray's.
    """
    needed = scaling.num_workers * scaling.cpus_per_worker
    return local_ray.LocalRay(
        num_cpus=max(cpus, needed) - (needed if in_driver else 0) + SPARE_CPUS,
        num_gpus=gpus,
        object_store_bytes=machine.object_store_bytes(machine.memory_bytes()),
        environment={
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            worker_logging.LOG_FILE_VARIABLE: str(log),
            worker_logging.BAR_VARIABLE: "1" if progress.shows_bar() else "",
            **machine.ONE_NODE_OF_RAY,
            **_loopback_for_workers(),
        },
        setup_hook=SETUP_HOOK,
        prepares_environments=not in_driver,
    )


def _loopback_for_workers() -> dict[str, str]:
    """Return the variables that keep what training workers say to each other on the loopback.

    Without them, torch takes the interface of the host's name, which is often the network's.
    """
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    ]
    variables = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: os.environ.get(name, names[0]) for name in variables} if names else {}


def cluster_capacity() -> tuple[float, float]:
    """CPUs and GPUs for training of the cluster that RAY_ADDRESS names."""
    address = cluster_address()
    assert address is not None
    _join(address)
    try:
        return _cluster_capacity()
    finally:
        ray.shutdown()


def _cluster_capacity() -> tuple[float, float]:
    """Of the nodes that are there, or of as many as the autoscaler may start."""
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    # Private, and what Ray Train itself asks; there is no public way (2.60).
    limits = state.get_max_resources_from_cluster_config() or {}
    cpus, gpus = (max(there.get(key, 0), limits.get(key, 0)) for key in ("CPU", "GPU"))
    return cpus - READ_CPUS, gpus
