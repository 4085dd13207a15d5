"""Nobody but its own processes runs code in the Ray that a command starts on this machine."""

import ast
import errno
import os
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import parameter, services
from ray._private.services import node_ip_address_from_perspective

from infra import storage
from pipelines import job
from pipelines.outcome import can_pass
from pipelines.training import local_ray
from tests.infra.ray_ports import REFUSALS, ask, listening, of_local_ray

GIVEN = local_ray.LocalRay(num_cpus=1, num_gpus=0, object_store_bytes=2**27, environment={})
# A process that knows nothing but the address asks Ray's head to run something.
ATTACK = """
import logging, sys
import ray
try:
    ray.init(sys.argv[1], logging_level=logging.CRITICAL, log_to_driver=False)
    print("RAN", ray.get(ray.remote(lambda: 1).remote(), timeout=60), flush=True)
except Exception as error:
    print(type(error).__name__, flush=True)
"""


@pytest.mark.ray
def test_a_bare_process_is_refused_without_the_token(local_ray: Path, tmp_path: Path) -> None:
    modes = {
        "no token": {"RAY_AUTH_MODE": "disabled"},
        "wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
    }
    # Ray takes the host's address for 127.0.0.1 unless it is told that it has no cluster.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **loopback}
    address = ray.get_runtime_context().gcs_address
    attacks = {
        name: subprocess.Popen(
            [sys.executable, "-c", ATTACK, address],
            env={**bare, **mode},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, mode in modes.items()
    }
    told = {name: attack.communicate(timeout=200)[0] for name, attack in attacks.items()}
    assert told == {"no token": "ConnectionError\n", "wrong token": "ConnectionError\n"}


@pytest.mark.ray
def test_a_local_ray_listens_on_the_loopback_only(local_ray: Path) -> None:
    ray.get(ray.remote(lambda: None).remote())  # a worker process is among them
    found = list(listening(of_local_ray()))
    assert len(found) >= 6  # driver, head, two of the raylet, its agent, worker
    assert {address for _, address, _ in found} == {"127.0.0.1"}
    host = node_ip_address_from_perspective()
    for _, _, port in found:
        with socket.socket() as caller:
            assert host == "127.0.0.1" or caller.connect_ex((host, port)) == errno.ECONNREFUSED


@pytest.mark.ray
def test_a_signal_to_the_command_s_process_group_does_not_reach_ray(local_ray: Path) -> None:
    ray.get(ray.remote(lambda: None).remote())
    groups = set()
    for process in of_local_ray():
        with suppress(ProcessLookupError):
            if process.pid != os.getpid():
                groups.add(os.getpgid(process.pid))
    assert groups
    assert os.getpgid(0) not in groups


@pytest.mark.ray
def test_no_process_of_a_local_ray_only_looks_on(local_ray: Path) -> None:
    ray.get(ray.remote(lambda: None).remote())
    words: set[str] = set()
    for process in of_local_ray():
        with suppress(psutil.NoSuchProcess):  # it has ended, or nobody has asked how
            words |= {Path(word).name for word in process.cmdline()}
    assert {"raylet", "gcs_server"} <= words
    assert not {"monitor.py", "log_monitor.py", "dashboard.py", "agent.py"} & words
    assert "ray_agent_stand_in.py" in words


@pytest.mark.ray
def test_no_port_of_a_local_ray_does_anything_without_the_token(local_ray: Path) -> None:
    ray.get(ray.remote(lambda: None).remote())
    answers = {port: ask(port) for _, _, port in listening(of_local_ray())}
    assert set().union(*answers.values()) <= REFUSALS, answers
    guarded = [port for port, told in answers.items() if told & {"UNAUTHENTICATED", "401"}]
    assert len(guarded) >= 6


@pytest.mark.ray
def test_the_token_is_in_a_private_file_and_in_no_process_s_arguments(local_ray: Path) -> None:
    file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    token = file.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    for process in of_local_ray():
        with suppress(psutil.NoSuchProcess):  # it has ended, or nobody has asked how
            assert token not in " ".join(process.cmdline())
    logs = [path for path in (file.parent / "ray").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if token.encode() in path.read_bytes()]
    # The sockets lie where only this user may enter.
    assert Path(ray._private.worker._global_node.raylet_socket_name).is_relative_to(file.parent)


def test_the_environment_is_as_before_after_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a cluster's")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    before = dict(os.environ)
    with local_ray._guarded(tmp_path):
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert os.environ["RAY_AUTH_MODE"] == "token"
    assert dict(os.environ) == before


def test_a_process_that_is_busy_is_not_taken_for_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_health_check_timeout_ms", raising=False)
    monkeypatch.setenv("RAY_worker_register_timeout_seconds", "77")  # what the user says holds
    with local_ray._guarded(tmp_path):
        given = dict(os.environ)
    assert given["RAY_health_check_timeout_ms"] == "300000"
    assert given["RAY_worker_register_timeout_seconds"] == "77"


def test_each_start_has_another_token(tmp_path: Path) -> None:
    tokens = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with local_ray._guarded(tmp_path / name):
            tokens.add(Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text())
    assert len(tokens) == 2


def test_a_ray_that_does_not_start_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_out(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path)[:20])
    monkeypatch.setattr(local_ray.ray, "init", time_out)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    with (
        pytest.raises(storage.StorageError, match=r"timed out during startup\. Its logs") as caught,
        local_ray.private_folder() as folder,
        local_ray.running(folder, GIVEN),
    ):
        pass
    assert can_pass(caught.value)
    assert str(folder) in str(caught.value)
    assert folder.is_dir()
    (folder / "ray-token").unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    ("told", "starts"),
    [
        ("The current node timed out during startup.", 3),
        ("No space left on device", 1),  # it will not go away
    ],
)
def test_a_ray_that_starts_too_slowly_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, starts: int
) -> None:
    asked = []

    def fail(*_: object, **__: object) -> None:
        asked.append(told)
        raise Exception(told)

    monkeypatch.setattr(local_ray.ray, "init", fail)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    with pytest.raises(local_ray.RayStartError), local_ray.running(tmp_path, GIVEN):
        pass
    assert len(asked) == starts


def test_a_ray_that_starts_at_the_second_time_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = [Exception("The current node timed out during startup."), None]

    def start(*_: object, **__: object) -> None:
        if error := outcomes.pop(0):
            raise error

    monkeypatch.setattr(local_ray.ray, "init", start)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    with local_ray.running(tmp_path, GIVEN):
        assert not outcomes


def test_ray_s_processes_inherit_their_variables_and_this_process_does_not_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("MAE_WORKER_LOG", "PYTHONPATH", "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR")
    inherited: dict[str, str | None] = {}

    def start(*_: object, **given: object) -> None:
        assert "runtime_env" not in given, "Ray starts no process ahead if it has to prepare one"
        inherited.update({name: os.environ.get(name) for name in names})
        params = parameter.RayParams()
        assert (params.no_monitor, params.include_log_monitor) == (True, False)
        assert services.start_api_server("and", its="arguments") == ("", None)

    monkeypatch.setattr(local_ray.ray, "init", start)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: None)
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.delenv("MAE_WORKER_LOG", raising=False)
    given = GIVEN._replace(
        environment={"MAE_WORKER_LOG": "/log", "PYTHONPATH": "/ours:/mine"}, setup_hook="a.set_up"
    )
    with local_ray.running(tmp_path, given):
        assert inherited == dict(zip(names, ("/log", "/ours:/mine", "a.set_up"), strict=True))
        assert [os.environ.get(name) for name in names] == [None, "/mine", None]
        assert parameter.RayParams().no_monitor is False
        assert services.start_api_server.__name__ == "start_api_server"
        assert services.start_ray_process.__name__ == "start_ray_process"


@pytest.mark.parametrize(("port", "told"), [("0", "-1"), ("20123", "20123")])
def test_a_raylet_gets_stand_ins_for_agents_without_a_task_and_files_that_say_so(
    tmp_path: Path, port: str, told: str
) -> None:
    started: list[tuple[list[str], str]] = []
    command = [
        "raylet",
        f"--session_dir={tmp_path}",
        f"--node_id={'ab' * 28}",
        "--dashboard_agent_command=python agent.py --a=b",
        "--runtime_env_agent_command=python main.py",
        f"--runtime_env_agent_port={port}",
    ]
    local_ray._start_without_agents(lambda *given, **options: started.append(given), command, "x")
    ((words, kind),) = started
    assert (words[:3], words[5:], kind) == (command[:3], command[5:], "x")
    assert words[3].startswith("--dashboard_agent_command=")
    assert words[3].endswith("ray_agent_stand_in.py")
    assert words[4].startswith("--runtime_env_agent_command=")
    assert words[4].endswith("ray_agent_stand_in.py" if port == "0" else "python main.py")
    ports = {file.name: file.read_text() for file in tmp_path.iterdir()}
    names = ("dashboard_agent_listen", "metrics_agent", "metrics_export")
    expected = {**dict.fromkeys(names, "-1"), "runtime_env_agent": told}
    assert ports == {f"{name}_port_{'ab' * 28}": number for name, number in expected.items()}


def test_a_run_that_asks_for_no_environment_has_no_agent_for_them() -> None:
    for prepares in (True, False):
        with local_ray._without_onlookers(GIVEN._replace(prepares_environments=prepares)):
            port = parameter.RayParams().runtime_env_agent_port
        assert (port in local_ray.PORTS) if prepares else (port is None)


def test_ray_s_other_processes_start_as_they_are(tmp_path: Path) -> None:
    started = []
    command = ["gcs_server", f"--session_dir={tmp_path}", "--node_id=abc"]
    local_ray._start_without_agents(lambda *given, **options: started.append(given), command)
    assert started == [(command,)]
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_long_path_is_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = tmp_path / ("x" * 60)
    far.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(far))
    with local_ray.private_folder() as folder:
        socket_path = folder / "ray/session_2026-11-27_03-02-28_820383_1269100/sockets/plasma_store"
        with socket.socket(socket.AF_UNIX) as probe:
            socket_path.parent.mkdir(parents=True)
            probe.bind(str(socket_path))
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/no/such")
    with (
        pytest.raises(storage.StorageError, match=r"in /no/such: .*; set RAY_TMPDIR") as caught,
        local_ray.private_folder(),
    ):
        pass
    assert not can_pass(caught.value)


@pytest.mark.parametrize(
    ("given", "joined"),
    [(None, None), ("", None), ("local", None), ("auto", "auto"), ("10.0.0.1:6379",) * 2],
)
def test_only_a_cluster_s_address_is_joined(
    given: str | None, joined: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if given is not None:
        monkeypatch.setenv("RAY_ADDRESS", given)
    assert job.cluster_address() == joined


def calls_of_init(file: Path) -> list[str]:
    """Every place in a file that may start a Ray: `ray.init`, however it is called."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            found += [f"{file.name}:{node.lineno}" for name in node.names if name.name == "init"]
        if isinstance(node, ast.Attribute) and node.attr == "init":
            value = node.value
            if isinstance(value, ast.Name) and value.id == "ray":
                found.append(f"{file.name}:{node.lineno}")
    return found


def test_every_start_of_ray_goes_through_the_guarded_one() -> None:
    folders = ("pipelines", "infra", "mae_core", "benchmarks", "docs", "tests")
    files = [file for folder in folders for file in (job.ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    found = {file.name: calls_of_init(file) for file in files}
    # `launch` joins a cluster, which asks for its own token.
    assert {name: len(places) for name, places in found.items() if places} == {
        "local_ray.py": 1,
        "launch.py": 1,
    }
