"""Training in the driver's process starts again after an error and leaves the process as it was."""

import threading

import pytest
import torch

from infra import processes
from pipelines.config.sections import ScalingConfig
from pipelines.training import local_mode


class Training:
    """Fails at its first starts."""

    def __init__(self, num_failures: int) -> None:
        self.starts = 0
        self.num_failures = num_failures

    def __call__(self) -> None:
        self.starts += 1
        torch.set_num_threads(1)
        torch.manual_seed(self.starts)
        if self.starts <= self.num_failures:
            raise OSError("the store is away")


@pytest.mark.parametrize(("num_failures", "starts"), [(0, 1), (2, 3)])
def test_it_is_started_again_until_it_ends(num_failures: int, starts: int) -> None:
    training = Training(num_failures)
    local_mode.fit_in_driver(training, ScalingConfig(max_failures=2), lambda: False)
    assert training.starts == starts


def test_one_failure_too_many_comes_out_as_it_is() -> None:
    training = Training(3)
    with pytest.raises(OSError, match="the store is away"):
        local_mode.fit_in_driver(training, ScalingConfig(max_failures=2), lambda: False)
    assert training.starts == 3


def test_nothing_is_started_again_once_the_run_is_to_stop() -> None:
    training = Training(1)
    with pytest.raises(OSError, match="the store is away"):
        local_mode.fit_in_driver(training, ScalingConfig(max_failures=2), lambda: True)
    assert training.starts == 1


@pytest.mark.parametrize("num_failures", [0, 1])
def test_threads_and_random_numbers_of_the_process_stay_as_they_were(num_failures: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        local_mode.fit_in_driver(
            Training(num_failures), ScalingConfig(max_failures=1), lambda: False
        )
        assert torch.equal(torch.rand(3), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_it_waits_for_the_threads_that_read_the_data() -> None:
    release, ended = threading.Event(), []

    def read() -> None:
        release.wait(10)
        ended.append(True)

    def train() -> None:
        threading.Thread(target=read, name="ahead_0", daemon=True).start()
        threading.Timer(0.05, release.set).start()

    local_mode.fit_in_driver(train, ScalingConfig(), lambda: False)
    assert ended == [True]
    assert not processes.is_thread_left()


def test_a_thread_that_reads_on_is_known_to_be_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_mode, "READERS_END_S", 0.05)
    release = threading.Event()
    reader = threading.Thread(target=release.wait, args=(10,), name="ahead_0", daemon=True)
    local_mode.fit_in_driver(reader.start, ScalingConfig(), lambda: False)
    assert processes.is_thread_left()
    release.set()
    reader.join()
    assert not processes.is_thread_left()


def test_a_worker_without_a_gpu_trains_on_the_cpu_whatever_the_machine_has() -> None:
    assert local_mode.training_device(ScalingConfig()) == torch.device("cpu")
    assert local_mode.training_device(ScalingConfig(use_gpu=True)) == torch.device("cuda", 0)
