"""One holder at a time, on a disk and on S3; a dead holder's lease is free again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from infra import lease as leases
from infra import storage
from infra.lease import HeldError, lease
from infra.services import object_store

HOLD = """
import sys, time
from infra.lease import lease
with lease(sys.argv[1], "the first"):
    print("held", flush=True)
    time.sleep(60)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("s3")
    with object_store(folder) as env, pytest.MonkeyPatch.context() as patch:
        for key, value in env.items():
            patch.setenv(key, value)
        yield "s3://mae/leases"


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.services)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    name = request.node.name.replace("[", "-").strip("]")
    folder = str(tmp_path) if request.param == "disk" else request.getfixturevalue("store")
    return f"{folder}/{name}/lease"


def test_a_second_holder_is_refused_and_told_who_is_first(place: str) -> None:
    with lease(place, "run 1"), pytest.raises(HeldError) as caught, lease(place, "run 2"):
        pytest.fail("held twice")
    text = str(caught.value)
    assert "run 1" in text
    assert socket.gethostname() in text
    assert str(os.getpid()) in text
    assert place in text


@pytest.mark.parametrize("text", ["", "[]", '{"pur'])
def test_a_holder_that_cannot_be_read_is_told_without_its_name(text: str, tmp_path: Path) -> None:
    place = tmp_path / "lease"
    second = lease(str(place), "run 2")
    with lease(str(place), "run 1"):
        place.write_text(text)
        with pytest.raises(HeldError, match=r"another run .* \(process \? on \?\)"), second:
            pytest.fail("held twice")


def test_after_the_first_has_ended_the_second_may(place: str) -> None:
    for number in range(3):
        with lease(place, f"run {number}"):
            pass


def test_an_error_inside_gives_it_back(place: str) -> None:
    with pytest.raises(RuntimeError), lease(place, "run 1"):
        raise RuntimeError
    with lease(place, "run 2"):
        pass


def test_a_killed_holder_is_not_waited_for(place: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, place],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(leases.__file__).parents[1])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(HeldError, match="the first"), lease(place, "mine"):
        pytest.fail("held twice")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with lease(place, "mine"):
        pass


@pytest.mark.services
def test_what_a_holder_elsewhere_left_is_taken_over_when_it_is_stale(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = f"{store}/stale/lease"
    holder = {"purpose": "elsewhere", "host": "another-machine", "pid": 1, "token": "x"}
    storage.write_bytes(place, json.dumps(holder).encode())
    says = r"elsewhere.*another-machine.*refreshed"
    with pytest.raises(HeldError, match=says), lease(place, "mine"):
        pytest.fail("held twice")
    monkeypatch.setattr(leases, "STALE_S", 1.0)
    time.sleep(2.1)
    with lease(place, "mine"):
        assert b"mine" in storage.read_bytes(place)


@pytest.mark.services
def test_a_heartbeat_keeps_it_fresh(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"{store}/beat/lease"
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.3)
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])

    def written() -> object:
        return client.head_object(Bucket="mae", Key="leases/beat/lease")["LastModified"]

    with lease(place, "mine"):
        first = written()
        wait_for(lambda: written() != first)


@pytest.mark.services
def test_one_that_was_taken_over_does_not_take_it_back(
    store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"{store}/stolen/lease"
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.3)
    with lease(place, "mine") as held:
        held.check()
        storage.write_bytes(place, b"theirs")
        wait_for(lambda: held.is_lost)
        with pytest.raises(HeldError, match="another process took it over"):
            held.check()
    assert storage.read_bytes(place) == b"theirs"
    assert "another process took it over" in caplog.text


@pytest.mark.services
def test_giving_it_back_leaves_what_another_wrote_meanwhile(store: str) -> None:
    place = f"{store}/given-back/lease"
    with lease(place, "mine"):
        storage.write_bytes(place, b"theirs")
    assert storage.read_bytes(place) == b"theirs"
