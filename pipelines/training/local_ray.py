"""Start a Ray on this machine so that nobody else can run code in it; no other module starts one.

Ray runs whatever it is asked to run, for anyone who reaches one of its ports. So this Ray asks
every caller for a random token that only its own processes know, listens on the loopback interface
only, and keeps its Unix sockets and files in a folder that only this user may enter.
docs/guides/security.md lists each port and how it is protected.
"""

import logging
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ray
from ray._private import parameter, ray_constants, services
from ray._raylet import (  # type: ignore[attr-defined]
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    AuthenticationTokenLoader,
    Config,
    persist_port,
)

from infra import processes, scratch
from infra.storage import StorageError
from pipelines.training import ray_agent_stand_in

# The path of a Unix socket has at most 107 characters; Ray's own part takes 65 of them.
MAX_FOLDER_CHARACTERS = 40
MAX_STARTS = 3
AGENT_COMMANDS = frozenset({"dashboard_agent_command", "runtime_env_agent_command"})
AGENT_PORTS = (
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
)
PORTS = range(20000, 32000)  # below those that the kernel gives to connections
NO_PORT = -1  # Ray's word for an agent that does not listen

# Ray takes a process that does not answer for some seconds for a machine that is lost, and ends
# what ran on it. Here it is only busy: the end of a process is noticed by its connection.
PATIENCE = {
    "RAY_health_check_timeout_ms": "300000",  # of 10,000 (2.60)
    "RAY_grpc_keepalive_timeout_ms": "300000",  # of 10,000
    "RAY_worker_register_timeout_seconds": "300",  # of 60
    "RAY_agent_register_timeout_ms": "300000",  # of 30,000
    # With Ray's default of 15, training would wait for everything else that runs on this machine.
    "RAY_worker_niceness": "0",
}

logger = logging.getLogger(__name__)


class LocalRay(NamedTuple):
    """What a Ray on this machine gets."""

    num_cpus: int
    num_gpus: int
    object_store_bytes: int
    environment: dict[str, str]
    """Variables for all of its processes.

    A runtime environment of Ray's would set them as well, but then Ray waits for an agent that
    prepares it, and starts no process in advance.
    """
    setup_hook: str = ""
    """Full name of the function that each process for tasks and actors calls first."""
    prepares_environments: bool = True
    """Whether anything asks for a runtime environment, as the workers of Ray Train do."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """Provide a folder for a Ray's sockets, logs and token, which only this user may enter.

    The folder is kept if Ray does not start, because only Ray's own logs say why.

    Raises:
        StorageError: there is no place for it.
    """
    parent = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(parent) + len("/mae-12345678") > MAX_FOLDER_CHARACTERS:
        parent = "/tmp"
    scratch.remove_left_behind_once(parent)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch.held_folder(parent))
        except OSError as error:
            raise StorageError(
                f"no folder for Ray's files can be made in {parent}: {error.strerror}; "
                "set RAY_TMPDIR to a folder that you may write to",
                is_lasting=True,
            ) from error
        try:
            yield folder
        except RayStartError:
            scratch.keep(folder)
            raise
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


class RayStartError(StorageError):
    """No Ray could be started on this machine; the same command may succeed later."""


@contextmanager
def running(folder: Path, given: LocalRay) -> Iterator[None]:
    """Run a Ray of this process's own for the duration of the block; its files are in `folder`.

    Raises:
        RayStartError: Ray did not start; names the folder with its logs.
    """
    with _guarded(folder):
        with _environment(given):
            _start(folder, given)
        try:
            yield
        finally:
            # A thread that asked Ray for something after its shutdown would end the process with
            # code 1.
            if not processes.is_thread_left():
                ray.shutdown()


def _start(folder: Path, given: LocalRay) -> None:
    """Start Ray; start it once more if that takes longer than the 30 s that Ray allows (2.60)."""
    for attempt in range(1, MAX_STARTS + 1):
        try:
            with _without_onlookers(given), _in_their_own_session():
                ray.init(
                    "local",  # never join another Ray that happens to run on this machine
                    num_cpus=given.num_cpus,
                    num_gpus=given.num_gpus,
                    object_store_memory=given.object_store_bytes,
                    include_dashboard=False,
                    logging_level=logging.WARNING,
                    log_to_driver=False,  # Ray's own processes write much that helps nobody
                    _temp_dir=str(folder / "ray"),
                )
            return
        except Exception as error:
            ray.shutdown()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if processes.RAY_TOO_SLOW not in reason or attempt == MAX_STARTS:
                raise RayStartError(
                    f"Ray did not start on this machine: {reason} Its logs are in "
                    f"{folder / 'ray'}; the machine may be busy: try again"
                ) from error
        logger.warning("Ray did not start in time, because the machine is busy; starting it again")


@contextmanager
def _without_onlookers(given: LocalRay) -> Iterator[None]:
    """Start Ray in the block without processes that do nothing for a Ray on one machine.

    They are its autoscaler, the reader of its logs, and, without a dashboard, a server for usage
    reports. Usage reports are off, but `ray.init` waits for that server. Two others are agents of
    the raylet: one is for the dashboard and for metrics, and one prepares runtime environments,
    which not every run has. All five are Python programs that take about a CPU-second each, and
    `ray.init` has no arguments to leave them out (2.60).
    """
    fewer: dict[str, Any] = {
        "no_monitor": True,
        "include_log_monitor": False,
        "runtime_env_agent_port": _free_port() if given.prepares_environments else None,
    }
    start = partial(_start_without_agents, services.start_ray_process)
    with (
        _replaced(parameter, "RayParams", partial(parameter.RayParams, **fewer)),
        _replaced(services, "start_api_server", lambda *_, **__: ("", None)),
        _replaced(services, "start_ray_process", start),
    ):
        yield


def _start_without_agents(
    start: Callable[..., object], command: list[str], *args: object, **options: object
) -> object:
    """Start a process of Ray; if it is the raylet, give it stand-ins for agents without a task.

    The raylet does not run without agents, and ends itself if they have not told their ports, by
    files, within 15 s, which is too little to import them on a busy machine (2.60). So the files
    are written here.
    """
    given = dict(
        word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word
    )
    if given.keys() >= AGENT_COMMANDS:
        port = int(given["runtime_env_agent_port"])  # 0: nothing asks for an environment
        ports = {
            **dict.fromkeys(AGENT_PORTS, NO_PORT),
            RUNTIME_ENV_AGENT_PORT_NAME: port or NO_PORT,
        }
        for name, number in ports.items():
            persist_port(given["session_dir"], given["node_id"], name, number)
        idle = AGENT_COMMANDS - {"runtime_env_agent_command"} if port else AGENT_COMMANDS
        stand_in = subprocess.list2cmdline(
            [sys.executable, "-I", "-S", ray_agent_stand_in.__file__]
        )
        command = [
            f"--{name}={stand_in}" if (name := word[2:].split("=", 1)[0]) in idle else word
            for word in command
        ]
    return start(command, *args, **options)


def _free_port() -> int:
    """Choose a port that nobody uses, and that the kernel gives to no connection meanwhile."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no port in {PORTS.start}..{PORTS.stop - 1} is free")


@contextmanager
def _in_their_own_session() -> Iterator[None]:
    """Start Ray's processes in sessions of their own in the block.

    Otherwise they would end when a whole process group is sent SIGTERM, as `timeout` does, and the
    command could not save what it has. They still end with the command.
    """
    apart = partial(services.ConsolePopen, start_new_session=True)
    with _replaced(services, "ConsolePopen", apart):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _environment(given: LocalRay) -> Iterator[None]:
    """Give Ray's variables to the processes that are started in the block."""
    # Private (2.60): the variable that Ray sets for `worker_process_setup_hook`.
    hook = {ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR: given.setup_hook}
    variables = {**given.environment, **(hook if given.setup_hook else {})}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """Protect a Ray that starts in the block by its own token and by the loopback interface.

    Ray's processes inherit the name of the token's file from the environment, so the token is in no
    process's arguments.
    """
    token_file = folder / "ray-token"
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    guards = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # Ray uses the loopback address only if it believes that there is no cluster.
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        **{name: os.environ.get(name, value) for name, value in PATIENCE.items()},
    }
    before = {name: os.environ.get(name) for name in (*guards, "RAY_AUTH_TOKEN")}
    os.environ.pop("RAY_AUTH_TOKEN", None)  # Ray would prefer this variable to the file
    os.environ.update(guards)
    has_cluster = ray_constants.ENABLE_RAY_CLUSTER
    # Ray has read its environment when it was imported (2.60), so it must read it again.
    ray_constants.ENABLE_RAY_CLUSTER = False
    read_environment()
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = has_cluster
        _restore(before)


def read_environment() -> None:
    """Make Ray use the token that the environment names now, instead of the one it used before."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
