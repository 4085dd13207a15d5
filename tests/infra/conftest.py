import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.services import object_store

S3 = pytest.param("s3", marks=pytest.mark.services)


@pytest.fixture(scope="session")
def object_store_env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a real S3 server with the buckets data, mae and mlflow; yield its AWS_* variables."""
    with object_store(tmp_path_factory.mktemp("object-store")) as env:
        yield env


@pytest.fixture
def s3(object_store_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process to the S3 server."""
    for name, value in object_store_env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["local", S3])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a folder that does not exist yet, on a disk and in a bucket."""
    if request.param == "local":
        return str(tmp_path / "root")
    request.getfixturevalue("s3")
    return f"s3://mae/{tmp_path.name}"


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """Run a process that does not belong to us."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()
