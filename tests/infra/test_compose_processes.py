"""Run compose.yaml's commands and variables as processes, without a container engine.

Unlike with containers, all hosts are this machine with free ports, and PostgreSQL and the object
store are the ones that are installed here.
"""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra import storage, tracking
from infra.config import TrackingConfig
from infra.processes import find_free_ports, start_process, stop_process, wait_until_ready

SERVICES = yaml.safe_load((Path(__file__).parents[2] / "infra/compose.yaml").read_text())[
    "services"
]
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 120.0
# More than a job's own 3 s, and less than what compose.yaml gives it.
JOB_END_S = 6

# Runs on the cluster's head: says where tasks run, then which tasks need no address at all.
TASKS = """
import ray, time
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init()
while len(nodes := [node for node in ray.nodes() if node["Alive"]]) < 2:
    time.sleep(0.2)
where = ray.remote(lambda: ray.get_runtime_context().get_node_id())
for node in nodes:
    is_worker = "CPU" in node["Resources"]
    task = where.options(scheduling_strategy=On(node["NodeID"], soft=False), num_cpus=0)
    print("TASK", "worker" if is_worker else "head", ray.get(task.remote()) == node["NodeID"])
    if is_worker:
        print("TASK free", ray.get(where.remote()) == node["NodeID"])
"""
STUBBORN = """
import signal, sys, time
def end(*_):
    time.sleep({seconds})
    print("ENDED BY ITSELF", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
print("READY", flush=True)
time.sleep(600)
"""
# One start of Python for what the `ray job` commands need five for.
CLIENT = """
import sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient()
tasks = client.submit_job(entrypoint="python " + sys.argv[1])
stubborn = client.submit_job(entrypoint="python " + sys.argv[2])
while not client.get_job_status(tasks).is_terminal():
    time.sleep(0.2)
print(client.get_job_logs(tasks))
while "READY" not in client.get_job_logs(stubborn):
    time.sleep(0.2)
client.stop_job(stubborn)
while not client.get_job_status(stubborn).is_terminal():
    time.sleep(0.2)
print(client.get_job_logs(stubborn))
"""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Make a short folder that PostgreSQL's user may enter, unlike pytest's."""
    made = Path(tempfile.mkdtemp(prefix="mae-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made, ignore_errors=True)


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    first = find_free_ports(7, also_free_at=0)
    names = ("postgres", "mlflow", "gcs", "dashboard", "client", "head-agent", "worker-agent")
    return {name: first + i for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def secret_values(object_store_env: dict[str, str]) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": object_store_env["AWS_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": object_store_env["AWS_SECRET_ACCESS_KEY"],
        "POSTGRES_PASSWORD": secrets.token_hex(16),
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


@pytest.fixture(scope="module")
def addresses(object_store_env: dict[str, str], ports: dict[str, int]) -> dict[str, str]:
    """Map compose.yaml's addresses to this machine."""
    return {
        "object-store:8333": object_store_env["AWS_ENDPOINT_URL"].removeprefix("http://"),
        "postgres:5432": f"127.0.0.1:{ports['postgres']}",
        "http://mlflow:5000": f"http://127.0.0.1:{ports['mlflow']}",
        "127.0.0.1:5000": f"127.0.0.1:{ports['mlflow']}",
        "ray-head:6379": f"127.0.0.1:{ports['gcs']}",
        "127.0.0.1:8265": f"127.0.0.1:{ports['dashboard']}",
        "127.0.0.1:52365": f"127.0.0.1:{ports['worker-agent']}",
        "--port=6379": f"--port={ports['gcs']}",
        "--port=5000": f"--port={ports['mlflow']}",
        "=0.0.0.0": "=127.0.0.1",
    }


def here(value: Any, addresses: dict[str, str], secret_values: dict[str, str]) -> Any:
    """Adapt a command or environment of compose.yaml to this machine."""
    if isinstance(value, list):
        return [here(item, addresses, secret_values) for item in value]
    if isinstance(value, dict):
        return {name: here(item, addresses, secret_values) for name, item in value.items()}
    for there, address in addresses.items():
        value = value.replace(there, address)
    return re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: secret_values[found[1]], value)


def clean_env(**more: str) -> dict[str, str]:
    """Return a container's environment, without ours, so that only compose.yaml has an effect."""
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": tempfile.gettempdir(), **more}


@pytest.fixture(scope="module")
def postgres(
    folder: Path, ports: dict[str, int], secret_values: dict[str, str]
) -> Iterator[list[tuple[Any, ...]]]:
    """Start PostgreSQL with the user and the empty database that its image creates."""
    psycopg2 = pytest.importorskip("psycopg2")
    bins = os.pathsep.join(
        [os.environ["PATH"], *map(str, Path("/usr/lib/postgresql").glob("*/bin"))]
    )
    server, initdb = (shutil.which(name, path=bins) for name in ("postgres", "initdb"))
    if server is None or initdb is None:
        pytest.skip("PostgreSQL is not installed: no postgres and initdb on the PATH")
    user: list[str] = []
    data = folder / "postgres-data"
    data.mkdir()
    if os.geteuid() == 0:
        # It refuses to run as root.
        if shutil.which("setpriv") is None:
            pytest.skip("PostgreSQL does not run as root, and there is no setpriv")
        user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        os.chown(data, 65534, 65534)
    password = folder / "password"
    password.write_text(secret_values["POSTGRES_PASSWORD"])
    password.chmod(0o644)
    init = [
        initdb,
        "--username=mlflow",
        "--auth=scram-sha-256",
        f"--pwfile={password}",
        "--no-sync",
    ]
    subprocess.run([*user, *init, str(data)], cwd="/", check=True, capture_output=True, timeout=60)
    password.unlink()
    command = [*user, server, "-D", str(data), "-p", str(ports["postgres"]), "-h", "127.0.0.1"]
    # A test's data need not survive this machine.
    command += ["-c", "unix_socket_directories=", "-c", "fsync=off"]
    login = {
        "host": "127.0.0.1",
        "port": ports["postgres"],
        "user": "mlflow",
        "password": secret_values["POSTGRES_PASSWORD"],
    }

    def answers() -> bool:
        try:
            psycopg2.connect(dbname="postgres", **login).close()
        except psycopg2.OperationalError:
            return False
        return True

    try:
        start_process(folder, "postgres", command, clean_env())
        wait_until_ready(folder, "postgres", answers, START_TIMEOUT_S)
        connection = psycopg2.connect(dbname="postgres", **login)
        connection.autocommit = True
        connection.cursor().execute("CREATE DATABASE mlflow")
        connection.close()
        yield lambda query: _fetch(psycopg2.connect(dbname="mlflow", **login), query)
    finally:
        stop_process(folder, "postgres", 10.0)


def _fetch(connection: Any, query: str) -> list[tuple[Any, ...]]:
    cursor = connection.cursor()
    cursor.execute(query)
    rows = cursor.fetchall()
    connection.close()
    return rows


def start_mlflow(folder: Path, addresses: dict[str, str], secret_values: dict[str, str]) -> None:
    service = SERVICES["mlflow"]
    env = clean_env(**here(service["environment"], addresses, secret_values))
    start_process(folder, "mlflow", here(service["command"], addresses, secret_values), env)
    check = here(service["healthcheck"]["test"], addresses, secret_values)
    wait_until_ready(folder, "mlflow", lambda: fetch(check[-1])[0] == 200, START_TIMEOUT_S)


def fetch(url: str, host: str | None = None) -> tuple[int, bytes]:
    """Return status and body, or status 0 if nothing listens. Never uses a proxy."""
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=10) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, b""
    except OSError:
        return 0, b""


@pytest.mark.services
@pytest.mark.slow
def test_mlflow_keeps_runs_in_postgres_and_artifacts_in_the_object_store(
    folder: Path,
    addresses: dict[str, str],
    secret_values: dict[str, str],
    postgres: Any,
    object_store_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = addresses["http://mlflow:5000"]
    for name in object_store_env:
        monkeypatch.delenv(name, raising=False)  # clients need no key to the artifacts
    try:
        start_mlflow(folder, addresses, secret_values)
        run_id = tracking.start_run(
            TrackingConfig(uri=uri, experiment="x"), run_name="x", params={}, tags={}, run_id=None
        )
        assert run_id is not None
        writer = tracking.MetricWriter(uri, run_id)
        writer.write({"loss": 0.25}, 7)
        writer.close()
        tracking.log_artifact_text(uri, run_id, "hello", "hello.txt")

        stop_process(folder, "mlflow", 10.0)
        assert fetch(uri + "/health")[0] == 0
        start_mlflow(folder, addresses, secret_values)
        assert tracking.last_logged_step(uri, run_id, "loss") == 7
        artifact = f"{uri}/get-artifact?path=hello.txt&run_uuid={run_id}"
        assert fetch(artifact) == (200, b"hello")
        # By the name that Ray's containers use, and by no other.
        search = f"{uri}/api/2.0/mlflow/runs/get?run_id={run_id}"
        assert fetch(search, "mlflow:5000")[0] == 200
        assert fetch(search, "elsewhere.example")[0] == 403
    finally:
        stop_process(folder, "mlflow", 10.0)
    query = f"SELECT key, value, step FROM metrics WHERE run_uuid = '{run_id}'"
    assert postgres(query) == [("loss", 0.25, 7)]
    [(root,)] = postgres("SELECT artifact_location FROM experiments WHERE name = 'x'")
    for name, value in object_store_env.items():
        monkeypatch.setenv(name, value)
    below = root.removeprefix("mlflow-artifacts:/")
    assert storage.read_bytes(f"s3://mlflow/{below}/{run_id}/artifacts/hello.txt") == b"hello"


@pytest.fixture
def ray_env(
    folder: Path, ports: dict[str, int], addresses: dict[str, str], secret_values: dict[str, str]
) -> Iterator[dict[str, str]]:
    """Start compose.yaml's Ray head and a worker, as two nodes on this machine."""
    env = clean_env(
        **here(SERVICES["ray-head"]["environment"], addresses, secret_values),
        RAY_API_SERVER_ADDRESS=f"http://127.0.0.1:{ports['dashboard']}",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    )
    memory = f"--object-store-memory={100 * 2**20}"
    head = ["--include-dashboard=true", f"--dashboard-port={ports['dashboard']}"]
    head += [f"--ray-client-server-port={ports['client']}", f"--temp-dir={folder / 'ray'}"]
    head += [f"--dashboard-agent-listen-port={ports['head-agent']}", memory]
    worker = [f"--dashboard-agent-listen-port={ports['worker-agent']}", memory, "--num-cpus=1"]
    try:
        for name, flags in (("ray-head", head), ("ray-worker", worker)):
            command = here(SERVICES[name]["command"], addresses, secret_values)
            check = here(SERVICES[name]["healthcheck"]["test"], addresses, secret_values)
            start_process(folder, name, [*command, *flags], env)
            wait_until_ready(
                folder, name, lambda url=check[-1]: fetch(url)[0] == 200, START_TIMEOUT_S
            )
        yield env
    finally:
        stop_process(folder, "ray-worker", 10.0)
        stop_process(folder, "ray-head", 10.0)


@pytest.mark.services
@pytest.mark.slow
def test_jobs_run_on_both_ray_nodes_and_may_end_by_themselves(
    folder: Path, ray_env: dict[str, str]
) -> None:
    (folder / "tasks.py").write_text(TASKS)
    (folder / "stubborn.py").write_text(STUBBORN.format(seconds=JOB_END_S))
    client = [sys.executable, "-c", CLIENT, str(folder / "tasks.py"), str(folder / "stubborn.py")]
    done = subprocess.run(client, env=ray_env, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    seen = sorted(line for line in lines if line.startswith("TASK"))
    assert seen == ["TASK free True", "TASK head True", "TASK worker True"], (
        done.stdout + done.stderr
    )
    assert "ENDED BY ITSELF" in lines
