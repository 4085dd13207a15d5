"""What is killed goes on as if nothing had happened: the same losses, no sample lost or twice."""

import hashlib
import json
import os
import re
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from tests.e2e.victims import train_workers

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


def counted_samples(trace: list[dict[str, Any]]) -> Counter[tuple[int, str]]:
    """(epoch, key) of what counts: what an attempt did beyond where the next one began does not."""
    attempts = sorted({line["attempt"] for line in trace})
    begins = {a: min(x["step"] for x in trace if x["attempt"] == a) for a in attempts}
    ends = dict(zip(attempts, [*(begins[a] for a in attempts[1:]), 10**9], strict=True))
    return Counter(
        (line["epoch"], line["key"]) for line in trace if line["step"] < ends[line["attempt"]]
    )


def run_status(place: Any, run_id: str | None) -> str:
    assert run_id is not None
    return str(MlflowClient(place.tracking_uri).get_run(run_id).info.status)


def weights_sha256(output: str) -> str:
    return hashlib.sha256((Path(output) / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.usefixtures("local_ray", "no_model_export")
def test_a_killed_driver_leaves_a_run_that_the_same_command_finishes(
    place: Any, undisturbed: Any, started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = started()
    place.wait_for_step(14)  # in the third epoch, after the checkpoint of step 10
    process.kill()
    process.wait()

    # At once: its workers train on for a second or two, until Ray finds that the driver is gone.
    result = place.run()
    assert result.status == "done"
    assert place.losses(result.run_id) == undisturbed.losses
    assert sorted(undisturbed.ranks) == [6, 12, 18, 24, 30]
    assert place.losses(result.run_id, "health/rank") == undisturbed.ranks
    assert weights_sha256(result.output) == undisturbed.weights_sha256
    trace = place.trace()
    assert all(line["step"] > 10 for line in trace if line["attempt"] == 2)
    counted = counted_samples(trace)
    assert len(counted) == 480  # 5 epochs of 96 samples
    assert set(counted.values()) == {1}
    assert len(MlflowClient(place.tracking_uri).search_runs(["1"])) == 1


@pytest.mark.usefixtures("no_model_export")
def test_a_killed_worker_is_replaced_and_the_run_ends_as_if_nothing_had_happened(
    place: Any, undisturbed: Any, local_ray: Path
) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        place.wait_for_step(14)
        for worker in train_workers(os.getpid()):
            killed.append(worker.pid)
            worker.send_signal(signal.SIGKILL)
            break  # the other one must be started again, too

    thread = threading.Thread(target=kill_one)
    thread.start()
    result = place.run("scaling.num_workers=2")
    thread.join()

    assert len(killed) == 1
    assert place.losses(result.run_id) == pytest.approx(undisturbed.losses, abs=1e-4)
    ranks = place.losses(result.run_id, "health/rank")
    assert ranks == pytest.approx(undisturbed.ranks, abs=1e-2)
    trace = place.trace()
    assert {line["attempt"] for line in trace} == {1, 2}
    counted = counted_samples(trace)
    assert len(counted) == 480
    assert set(counted.values()) == {1}


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "ctrl-c"]
)
@pytest.mark.usefixtures("local_ray", "no_model_export")
def test_a_stopped_run_says_so_and_goes_on(
    place: Any,
    undisturbed: Any,
    started: Callable[..., subprocess.Popen[str]],
    number: int,
    exit_code: int,
) -> None:
    process = started()
    place.wait_for_step(8)  # no checkpoint but that of step 5 is due before step 10
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(60) == exit_code
    assert process.stdout is not None
    said = json.loads(process.stdout.read())
    assert (said["status"], said["can_pass"]) == ("stopped", True)
    told = re.search(r"stopped at step (\d+) of 30; checkpoint written; the same", place.stderr())
    assert told is not None
    stopped_at = int(told[1])
    assert stopped_at >= 8
    assert "Traceback" not in place.stderr()
    assert "streaming_executor" not in place.stderr(), "news of Ray's that no user needs"
    (run,) = MlflowClient(place.tracking_uri).search_runs(["1"])
    assert run.info.status == "KILLED"
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []

    result = place.run()
    assert min(x["step"] for x in place.trace() if x["attempt"] == 2) == stopped_at + 1
    assert result.run_id == run.info.run_id
    assert run_status(place, result.run_id) == "FINISHED"
    assert place.losses(result.run_id) == undisturbed.losses
    assert place.losses(result.run_id, "health/rank") == undisturbed.ranks
    assert weights_sha256(result.output) == undisturbed.weights_sha256


@pytest.mark.usefixtures("local_ray", "no_model_export")
def test_from_one_worker_to_two_and_back_no_sample_is_lost_or_comes_twice(
    place: Any, undisturbed: Any, started: Callable[..., subprocess.Popen[str]]
) -> None:
    """Stopped in mid-epoch each time: epochs end at steps 6, 12, 18, 24 and 30."""
    for attempt, (workers, step) in enumerate([(1, 8), (2, 16)], start=1):
        process = started(f"scaling.num_workers={workers}")
        place.wait_for_step(step, attempt)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    result = place.run()

    trace = place.trace()
    assert {line["attempt"] for line in trace} == {1, 2, 3}
    first, second = (int(x) for x in re.findall(r"stopped at step (\d+) of 30", place.stderr()))
    assert 8 <= first < 16 <= second
    # Both workers stopped after the same step.
    assert min(line["step"] for line in trace if line["attempt"] == 2) == first + 1
    assert min(line["step"] for line in trace if line["attempt"] == 3) == second + 1
    counted = counted_samples(trace)
    assert len(counted) == 480
    assert set(counted.values()) == {1}
    assert place.losses(result.run_id) == pytest.approx(undisturbed.losses, abs=1e-4)


@pytest.mark.usefixtures("local_ray", "no_model_export")
@pytest.mark.parametrize(
    "split",
    [("scaling.num_workers=2",), ("optim.micro_batch_size=4", "scaling.num_workers=2")],
    ids=["two-workers", "two-workers-accumulating"],
)
def test_workers_and_micro_batches_do_not_change_the_losses(
    place: Any, undisturbed: Any, split: tuple[str, ...]
) -> None:
    result = place.run(*split)
    assert place.losses(result.run_id) == pytest.approx(undisturbed.losses, abs=1e-4)
