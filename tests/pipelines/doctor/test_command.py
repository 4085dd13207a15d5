"""`mae doctor`: findings for what is wrong, and an end within seconds if something hangs."""

import base64
import json
import os
import socket
import sqlite3
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import imagecodecs
import pytest

from infra.services import object_store
from pipelines.doctor import command as doctor
from pipelines.doctor import services as service_checks
from pipelines.doctor.command import (
    check_clock,
    check_codecs,
    check_disk,
    check_gpu,
    check_packages,
    check_shm,
    command,
    run_checks,
)
from pipelines.doctor.services import Finding, check_mlflow, check_ray, check_storage
from pipelines.outcome import ConfigError
from pipelines.terminal import progress

VARIABLES = ("MAE__", "RAY_", "AWS_", "MLFLOW_TRACKING_")


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


class FakeServer(NamedTuple):
    url: str
    answers: dict[str, tuple[int, str]]
    headers: list[dict[str, str]]
    clock: list[timedelta]


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server with given answers and a given clock error."""
    answers: dict[str, tuple[int, str]] = {}
    headers: list[dict[str, str]] = []
    clock = [timedelta()]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers.append(dict(self.headers))
            status, text = answers.get(self.path, (404, "no such page"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self) -> None:
            self.do_GET()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(datetime.now(UTC) + clock[0], usegmt=True)

        def log_message(self, format: str, *args: object) -> None: ...

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield FakeServer(f"http://127.0.0.1:{made.server_port}", answers, headers, clock)
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def hanging() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def nothing_there() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_a_machine_alone_is_fine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "TORCH_PROBE", "print('[\"2.14.1\", null, 0]')")
    monkeypatch.setattr(doctor, "MIN_SHM_BYTES", 0)
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 0)
    monkeypatch.setenv("PATH", "")
    assert command([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [
        "python",
        "packages",
        "codecs",
        "gpu",
        "ray",
        "storage",
        "mlflow",
        "disk",
        "shm",
        "clock",
    ]
    assert [line.split()[1] for line in lines[:-1] if "fix:" not in line] == names
    assert lines[-1].endswith("0 FAIL")
    assert not Path("runs").exists()  # looking makes nothing


def test_codecs_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_codecs().level == "ok"
    assert "not DICOM with JPEG Lossless" in check_codecs().what
    monkeypatch.setattr(imagecodecs, "LZW", SimpleNamespace(available=False))
    assert check_codecs() == Finding(
        "FAIL", "TIFFs compressed by LZW can't be read", "pip install imagecodecs"
    )


def test_what_fails_is_exit_code_5_with_a_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nothing_there: str
) -> None:
    monkeypatch.setattr(doctor, "check_gpu", lambda: Finding("ok", "none"))
    assert command([f"tracking.uri={nothing_there}", "storage.root=gs://b"]) == 5
    out = capsys.readouterr().out
    assert f"{nothing_there}: [Errno 111] Connection refused\n" in out
    assert "fix: start it (make up; . .services/env), or check MAE__TRACKING__URI" in out
    assert "fix: storage.root=FOLDER or s3://bucket/prefix" in out
    assert out.endswith("2 FAIL\n")


def test_a_wrong_word_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"storage\.rot: no such key; did you mean storage\.root"):
        command(["storage.rot=x"])


@pytest.mark.timeout(60)
def test_one_check_that_hangs_or_breaks_does_not_keep_the_others_and_is_named_meanwhile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "SAY_FIRST_S", 0.0)
    released = threading.Event()

    def breaks() -> Finding:
        raise KeyError("x")

    def hangs() -> Finding:
        released.wait(300)
        return Finding("ok", "late")

    checks = {"hangs": hangs, "breaks": breaks, "fine": lambda: Finding("ok", "yes")}
    found = run_checks(checks, timeout_s=0.5)
    released.set()
    assert list(found) == ["hangs", "breaks", "fine"]
    assert found["hangs"][0].level == "FAIL"
    assert found["breaks"][0].what == "could not be checked: KeyError: 'x'"
    assert found["fine"][0].what == "yes"
    assert caplog.messages[0] == "checking this machine ..."
    assert caplog.messages[1].startswith(
        "still checking this machine, 2 of 3, waits for hangs, after "
    )


@pytest.mark.timeout(150)  # their own limits, which are not theirs to keep, are longer
@pytest.mark.parametrize("check", [check_mlflow, lambda url: check_storage_at(url), None])
def test_a_server_that_hangs_does_not_hang_the_check(
    check: Callable[[str], Finding] | None, hanging: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_checks, "TIMEOUT_S", 0.3)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", hanging)
    finding = check_ray() if check is None else check(hanging)
    assert finding.level == "FAIL"
    assert "timed out" in finding.what.lower() or "timeout" in finding.what.lower()


def check_storage_at(url: str) -> Finding:
    os.environ.update(AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    try:
        return check_storage("s3://mae/runs")
    finally:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del os.environ[name]


RAY_OURS = service_checks.installed_version("ray")


@pytest.mark.parametrize(
    ("answer", "level", "message"),
    [
        ((200, json.dumps({"ray_version": RAY_OURS})), "ok", f"{RAY_OURS}, here and at"),
        ((200, '{"ray_version": "2.9.0"}'), "FAIL", f"{RAY_OURS} here; "),
        ((401, "no"), "FAIL", "refused the token"),
        ((502, "no"), "FAIL", "answered 502"),
    ],
)
def test_ray_answers(
    answer: tuple[int, str],
    level: str,
    message: str,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("token").write_text("secret\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "token")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", server.url)
    server.answers["/api/version"] = answer
    finding = check_ray()
    assert (finding.level, bool(finding.fix)) == (level, level != "ok")
    assert message in finding.what
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_a_ray_address_is_tried(
    hanging: str, nothing_there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", hanging.removeprefix("http://"))
    assert check_ray().level == "ok"
    monkeypatch.setenv("RAY_ADDRESS", nothing_there.replace("http", "ray"))
    finding = check_ray()
    assert (finding.level, "unset RAY_ADDRESS" in finding.fix) == ("FAIL", True)
    monkeypatch.delenv("RAY_ADDRESS")
    assert "no cluster is named" in check_ray().what


def test_a_folder_is_written_read_listed_and_left_clean(tmp_path: Path) -> None:
    finding = check_storage("runs/deeper")
    assert finding.level == "ok"
    assert finding.what.startswith(f"{tmp_path}: 1 MiB: write ")
    assert [word in finding.what for word in ("read", "list", "delete")] == [True, True, True]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise service_checks.storage.StorageError("read-only file system")

    monkeypatch.setattr(service_checks.storage, "write_bytes", refuse)
    finding = check_storage("runs")
    assert finding.level == "FAIL"
    assert "cannot write: read-only file system" in finding.what


@pytest.mark.services
@pytest.mark.slow
def test_a_bucket_is_looked_at_as_runs_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store(tmp_path / "store") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        fine = check_storage("s3://mae/runs")
        assert fine.level == "ok", fine.what
        assert fine.what.startswith("s3://mae/runs: 1 MiB: write ")
        assert service_checks.storage.list_files("s3://mae/runs") == []
        assert check_clock([fine]).what.endswith("the servers'")
        assert "create the bucket" in check_storage("s3://maes/runs").fix
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert check_storage("s3://mae/runs").fix == "check AWS_SECRET_ACCESS_KEY"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        assert check_storage("s3://mae/runs").fix == "check AWS_ACCESS_KEY_ID"
    assert check_storage("s3://mae/runs").fix.startswith("start it")


SEARCH = "/api/2.0/mlflow/experiments/search"
MLFLOW_OURS = service_checks.installed_version("mlflow")


@pytest.mark.parametrize(
    ("answers", "level", "message"),
    [
        ({SEARCH: (200, '{"experiments": []}'), "/version": (200, f"{MLFLOW_OURS}")}, "ok", "ms,"),
        ({SEARCH: (200, '{"experiments": []}'), "/version": (200, "2.9.0")}, "warn", "MLflow 2.9"),
        ({SEARCH: (401, "no")}, "FAIL", "401"),
        ({SEARCH: (200, "<html>")}, "FAIL", "not as MLflow does"),
    ],
)
def test_mlflow_answers(
    answers: dict[str, tuple[int, str]], level: str, message: str, server: FakeServer
) -> None:
    server.answers.update(answers)
    finding = check_mlflow(f"{server.url}/")
    assert (finding.level, bool(finding.fix)) == (level, level != "ok")
    assert message in finding.what


def test_a_password_is_used_and_not_shown(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = check_mlflow(server.url.replace("//", "//ann:pa55@"))
    assert "pa55" not in str(finding)
    ann = f"Basic {base64.b64encode(b'ann:pa55').decode()}"
    assert server.headers[0]["Authorization"] == ann
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t")
    check_mlflow(server.url)
    assert server.headers[-1]["Authorization"] == "Bearer t"


def test_a_sqlite_store_is_opened_and_not_made() -> None:
    assert check_mlflow("sqlite:///m.db").what == "m.db will be created by the first run"
    assert not Path("m.db").exists()
    with sqlite3.connect("m.db") as connection:
        connection.execute("create table runs (x)")
        connection.execute("insert into runs values (1)")
    connection.close()
    assert check_mlflow("sqlite:///m.db") == Finding("ok", "m.db: 1 runs")
    Path("m.db").write_text("no database at all" * 100)
    assert check_mlflow("sqlite:///m.db").level == "FAIL"
    assert check_mlflow("file:runs").what == "file:runs: MLflow keeps no runs in files"


@pytest.mark.parametrize(
    ("off_s", "level", "message"),
    [(0, "ok", "0 s"), (60, "warn", "60 s behind"), (-3600, "FAIL", "3600 s ahead of")],
)
def test_the_clock_is_compared_with_servers(off_s: int, level: str, message: str) -> None:
    ours = datetime(2027, 3, 28, tzinfo=UTC)
    pairs = [(ours, ours), (ours + timedelta(seconds=off_s), ours)]
    finding = check_clock([Finding("ok", "x", "", pair) for pair in pairs])
    assert finding.level == level
    assert message in finding.what


def test_a_server_s_clock_is_read_from_its_answer(server: FakeServer) -> None:
    server.answers[SEARCH] = (200, '{"experiments": []}')
    server.clock[0] = timedelta(hours=2)
    finding = check_clock([check_mlflow(server.url)])
    assert (finding.level, "behind" in finding.what) == ("FAIL", True)
    assert "no server to compare with" in check_clock([Finding("ok", "x")]).what


def project(dependencies: list[str], lock: str) -> Path:
    Path("pyproject.toml").write_text(f"[project]\ndependencies = {json.dumps(dependencies)}\n")
    Path("requirements.lock").write_text(lock)
    return Path()


def test_packages_are_compared_with_what_is_asked_and_locked() -> None:
    pytest_ = service_checks.installed_version("pytest")
    fine = check_packages(project(["pytest>=1"], f"pytest=={pytest_}\nnvidia-nothing==1\n"))
    assert fine == Finding("ok", "as pyproject.toml asks, 1 as locked")
    off = check_packages(project(["pytest>=1"], "pytest==1.0\n"))
    assert (off.level, f"pytest {pytest_}, locked 1.0" in off.what) == ("warn", True)
    missing = check_packages(project(["no-such-thing>=1", "pytest<1"], ""))
    assert missing.level == "FAIL"
    assert missing.what == f"no-such-thing is missing, needed >=1; pytest {pytest_}, needed <1"


def test_this_checkout_has_the_packages_that_it_asks_for() -> None:
    assert check_packages(Path(__file__).parents[3]).level != "FAIL"


@pytest.mark.parametrize(
    ("card", "torch", "level", "message"),
    [
        ("", '["2.14.1", null, 0]', "ok", "none: training runs on the CPU (torch 2.14.1"),
        (
            "NVIDIA H100, 81559 MiB",
            '["2.14.1", "13.0", 1]',
            "ok",
            "1 seen by torch 2.14.1, CUDA 13",
        ),
        ("NVIDIA H100, 81559 MiB", '["2.14.1", null, 0]', "FAIL", "CUDA not in this build"),
        ("", "broken", "FAIL", "torch can't be imported"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_told(
    card: str, torch: str, level: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "TORCH_PROBE", f"print('''{torch}''')")
    monkeypatch.setenv("PATH", str(tmp_path))
    if card:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!{sys.executable}\nprint({card!r})\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    finding = check_gpu()
    assert (finding.level, message in finding.what) == (level, True)


def test_gpus_that_cuda_visible_devices_hides_are_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "TORCH_PROBE", """print('["2.14.1", "13.0", 0]')""")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    finding = check_gpu()
    assert (finding.level, "CUDA_VISIBLE_DEVICES=-1 names none of" in finding.what) == ("ok", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert check_gpu().level == "FAIL"


def test_little_room_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 2**60)
    monkeypatch.setattr(doctor, "MIN_SHM_BYTES", 2**60)
    assert check_disk("runs/deeper").level == "warn"
    assert check_disk("s3://b/runs").what.endswith("free for /tmp")
    assert "--shm-size" in check_shm(tmp_path).fix
    assert check_shm(tmp_path / "none").level == "ok"
    monkeypatch.setattr(doctor, "MIN_FREE_BYTES", 0)
    assert check_disk("runs/deeper").level == "ok"
