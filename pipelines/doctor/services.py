"""Check within seconds whether Ray, the storage and MLflow answer."""

import base64
import http.client
import json
import os
import secrets
import socket
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError

from infra import conditional, storage

TIMEOUT_S = 5.0  # of one request
START_HINT = "start it (make up; . .services/env)"

Level = Literal["ok", "warn", "FAIL"]


class Finding(NamedTuple):
    level: Level
    what: str
    fix: str = ""  # "" if it is ok
    server_time: tuple[datetime, datetime] | None = None  # a server's, and ours at that moment


class Answer(NamedTuple):
    status: int
    text: str
    server_time: tuple[datetime, datetime] | None


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_ray() -> Finding:
    ours = installed_version("ray")
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if ours is None:
        return Finding("FAIL", "is not installed", "pip install -r requirements.lock")
    if not address or address in ("auto", "local"):
        return Finding("ok", f"{ours}; no cluster is named, so a run starts its own")
    if not address.startswith(("http://", "https://")):
        place = urlsplit(address if "://" in address else f"tcp://{address}")
        if _is_open(place.hostname or "", place.port or 6379):
            return Finding("ok", f"{ours}; {address} takes connections")
        return Finding("FAIL", f"{ours}; nothing at RAY_ADDRESS={address}", _ray_fix("RAY_ADDRESS"))
    try:
        answer = _get(f"{address.rstrip('/')}/api/version", _ray_headers())
    except OSError as error:
        return Finding("FAIL", f"{ours}; {address}: {error}", _ray_fix("RAY_API_SERVER_ADDRESS"))
    if answer.status in (401, 403):
        fix = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (make up: . .services/env)"
        return Finding("FAIL", f"{ours}; {address} refused the token", fix)
    theirs = str(_json(answer).get("ray_version", f"answered {answer.status}"))
    if theirs != ours:
        fix = f"pip install ray=={theirs}, or rebuild the cluster's image: versions must be equal"
        return Finding("FAIL", f"{ours} here; {address}: {theirs}", fix)
    return Finding("ok", f"{ours}, here and at {address}")


def _ray_fix(variable: str) -> str:
    return f"{START_HINT}, or unset {variable} to run on this machine alone"


def _ray_headers() -> dict[str, str]:
    """Return headers with the token, from where Ray looks for it."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not token and file.is_file():
        token = file.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _is_open(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S):
            return True
    except OSError:
        return False


def _get(url: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
    """Send a request, or raise an OSError with a line that says why there is no answer."""
    request = urllib.request.Request(url, data=body, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            text = response.read(2**16).decode(errors="replace")
            return Answer(response.status, text, _server_time(response.headers.get("Date")))
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.reason, _server_time(error.headers.get("Date")))
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from error
    except http.client.HTTPException as error:
        raise OSError(f"no HTTP: {type(error).__name__} {error}") from error


def _server_time(header: str | None) -> tuple[datetime, datetime] | None:
    return (parsedate_to_datetime(header), datetime.now(UTC)) if header else None


def _json(answer: Answer) -> dict[str, Any]:
    try:
        found = json.loads(answer.text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def check_storage(root: str) -> Finding:
    """Write, read, list and delete a small file, as runs do."""
    try:
        place = storage.absolute(root)
    except ValueError as error:
        return Finding("FAIL", str(error), "storage.root=FOLDER or s3://bucket/prefix")
    server_time = None
    if storage.is_remote(place):
        try:
            server_time = _ask_bucket(place)
        except (BotoCoreError, ClientError) as error:
            return Finding("FAIL", f"{place}: {error}", _storage_fix(error))
    else:
        place = str(nearest_folder(place))
    probe = storage.join(place, f".doctor-{secrets.token_hex(4)}")
    steps: dict[str, Callable[[], object]] = {
        "write": partial(storage.write_bytes, probe, b"x" * 2**20),
        "read": partial(storage.read_bytes, probe),
        "list": partial(storage.list_files, place),
        "delete": partial(storage.delete_file, probe),
    }
    times = []
    for name, step in steps.items():
        started_s = time.monotonic()
        try:
            step()
        except (storage.StorageError, OSError) as error:
            fix = "get the permission for this, or choose another storage.root"
            return Finding("FAIL", f"{place}: cannot {name}: {error}", fix)
        times.append(f"{name} {1000 * (time.monotonic() - started_s):.0f} ms")
    return Finding("ok", f"{place}: 1 MiB: {', '.join(times)}", "", server_time)


def nearest_folder(place: str) -> Path:
    """Return the nearest existing folder, because checking must not create the run's folders."""
    return next(folder for folder in [Path(place), *Path(place).parents] if folder.is_dir())


def _ask_bucket(place: str) -> tuple[datetime, datetime] | None:
    """Query the bucket with boto3, whose timeouts can be limited; return the server's time."""
    bucket, _, prefix = place.removeprefix(storage.S3_SCHEME).partition("/")
    once = BotoConfig(
        connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1}
    )
    client = conditional.open_client(once)
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
    return _server_time(found["ResponseMetadata"]["HTTPHeaders"].get("date"))


def _storage_fix(error: BotoCoreError | ClientError) -> str:
    code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
    return {
        "NoSuchBucket": "create the bucket, or check its name and AWS_ENDPOINT_URL",
        "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
        "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
        "AccessDenied": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the key's permissions",
        "RequestTimeTooSkewed": "set this machine's clock (timedatectl set-ntp true)",
        "": f"{START_HINT}, or check AWS_ENDPOINT_URL and AWS_ACCESS_KEY_ID",
    }.get(code, "check AWS_ENDPOINT_URL and the store's own log")


def check_mlflow(uri: str) -> Finding:
    if uri.startswith("sqlite:///"):
        return _check_sqlite(Path(uri.removeprefix("sqlite:///")))
    if uri.startswith(("http://", "https://")):
        return _check_mlflow_server(uri)
    if "://" in uri and not uri.startswith("file:"):
        return Finding("ok", f"{uri.partition('://')[0]} store: not looked at")
    return Finding(
        "FAIL", f"{uri}: MLflow keeps no runs in files", "tracking.uri=sqlite:////ABS/x.db"
    )


def _check_sqlite(file: Path) -> Finding:
    if not file.exists():
        return Finding("ok", f"{file} will be created by the first run")
    try:
        # Not as a URI with mode=ro, because a store that is not writable must be reported.
        with closing(sqlite3.connect(file, timeout=TIMEOUT_S)) as connection:
            connection.execute("begin immediate")
            ((count,),) = connection.execute("select count(*) from runs")
            connection.rollback()
    except sqlite3.Error as error:
        fix = "end what locks it, or give another tracking.uri; mlflow db upgrade after an update"
        return Finding("FAIL", f"{file}: {error}", fix)
    return Finding("ok", f"{file}: {count} runs")


def _check_mlflow_server(uri: str) -> Finding:
    parts = urlsplit(uri.rstrip("/"))
    headers = _mlflow_headers(parts.username, parts.password)
    # Without credentials: the address is shown, and urllib does not understand them.
    uri = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    started_s = time.monotonic()
    query = f"{uri}/api/2.0/mlflow/experiments/search"
    try:
        answer = _get(query, {"Content-Type": "application/json", **headers}, b'{"max_results": 1}')
        theirs = _get(f"{uri}/version", headers).text.strip()
    except OSError as error:
        fix = f"{START_HINT}, or check MAE__TRACKING__URI; runs continue without it, unrecorded"
        return Finding("FAIL", f"{uri}: {error}", fix)
    if answer.status in (401, 403):
        fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"
        return Finding("FAIL", f"{uri}: {answer.status} {answer.text}", fix)
    if answer.status != 200 or "experiments" not in _json(answer):
        return Finding(
            "FAIL", f"{uri} answers {answer.status}, not as MLflow does", "check its address"
        )
    what = f"{uri}: a query took {1000 * (time.monotonic() - started_s):.0f} ms, MLflow {theirs}"
    ours = installed_version("mlflow") or ""
    if theirs.partition(".")[0] != ours.partition(".")[0]:
        fix = f"pip install mlflow=={theirs}, or update the server"
        return Finding("warn", f"{what}; {ours} here", fix, answer.server_time)
    return Finding("ok", what, "", answer.server_time)


def _mlflow_headers(user: str | None, password: str | None) -> dict[str, str]:
    """Return login headers from the address, or from where MLflow's client looks for them."""
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if token and not user:
        return {"Authorization": f"Bearer {token}"}
    if not user:
        user = os.environ.get("MLFLOW_TRACKING_USERNAME")
        password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    if not user:
        return {}
    pair = base64.b64encode(f"{user}:{password or ''}".encode()).decode()
    return {"Authorization": f"Basic {pair}"}
