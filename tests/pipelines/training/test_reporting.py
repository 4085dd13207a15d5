"""What was left out is kept until it is written down; kinds are counted."""

import logging
from typing import cast

import pytest
import torch

from infra.tracking import MetricWriter
from mae_core.train_step import StepMetrics
from pipelines.reading.batches import BadSample
from pipelines.training import reporting
from pipelines.training.reporting import After, RunSize, StepReporter, count_kinds
from pipelines.training.stopping import Phase, StepEnds, Told


def bad(number: int) -> BadSample:
    return BadSample(0, "s.tar", str(number), "truncated", "cut")


def test_bad_samples_are_kept_up_to_a_limit_and_all_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reporting, "MAX_UNSAVED_BAD", 3)
    reporter = StepReporter(RunSize(10, 8, 80, 2), 1, 0, None)
    reporter.count_bad([bad(0), bad(1)])
    reporter.count_bad([bad(2), bad(3)])
    assert [sample.key for sample in reporter.unsaved_bad] == ["0", "1", "2"]
    assert reporter.num_bad == 4


def test_places_are_images_and_samples_are_views() -> None:
    size = RunSize(total_steps=10, global_batch_size=8, samples_per_epoch=80, crops_per_image=2)
    assert (size.images_per_step, size.num_images) == (4, 40)


def test_kinds_are_told_most_frequent_first() -> None:
    kinds = ["empty", "truncated", "truncated"]
    assert count_kinds({"kind": kind} for kind in kinds) == "2 x truncated, 1 x empty"


class Clock:
    """In the place of the time."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(reporting, "time", fake)
    return fake


class Writer:
    """In the place of MLflow."""

    def __init__(self) -> None:
        self.written: dict[int, dict[str, float]] = {}

    def write(self, metrics: dict[str, float], step: int) -> None:
        self.written[step] = metrics


class Ends:
    """Keeps what is told to the driver."""

    def __init__(self) -> None:
        self.told: list[Told] = []

    def tell_progress(self, told: Told) -> None:
        self.told.append(told)


def metrics(loss: float, num_samples: int = 8) -> StepMetrics:
    return StepMetrics(torch.tensor(loss), torch.tensor(float(num_samples)), torch.tensor(1.0))


def reporter_of(
    writer: Writer, every_steps: int, *, after: After | None = None, ends: Ends | None = None
) -> StepReporter:
    """Of a run of ten steps of eight samples."""
    return StepReporter(
        RunSize(10, 8, 80, 1),
        every_steps,
        0,
        cast(MetricWriter, writer),
        cast(StepEnds, ends),
        after=after or After(),
    )


def run_steps(reporter: StepReporter, clock: Clock, seconds: list[float]) -> None:
    """A step for each duration; the loss is the step's number."""
    for step, duration_s in enumerate(seconds, start=1):
        clock.now_s += duration_s
        reporter.add(step, metrics(float(step)))
        if reporter.is_due(step):
            reporter.report(step, learning_rate=1e-3, metrics=metrics(0.0))


def test_the_loss_is_the_mean_over_the_steps_since_the_last_report(clock: Clock) -> None:
    writer = Writer()
    run_steps(reporter_of(writer, 4), clock, [1.0] * 10)
    losses = {step: row["train/loss"] for step, row in writer.written.items()}
    assert losses == {4: 2.5, 8: 6.5, 10: 9.5}


@pytest.mark.parametrize("stop", [1, 4, 6, 9])
def test_a_reporter_that_takes_over_in_mid_interval_reports_the_same(stop: int) -> None:
    undisturbed, stopped = Writer(), Writer()
    whole = reporter_of(undisturbed, 4)
    first, second = reporter_of(stopped, 4), reporter_of(stopped, 4)
    losses = [0.1, 0.7, 0.3, 0.9, 0.2, 0.5, 0.8, 0.4, 0.6, 0.05]
    for step, loss in enumerate(losses, start=1):
        num_samples = 8 if step % 3 else 5
        for reporter in (whole, first if step <= stop else second):
            reporter.add(step, metrics(loss, num_samples))
            if reporter.is_due(step):
                reporter.report(step, learning_rate=1e-3, metrics=metrics(0.0))
        if step == stop:
            second.take_over(first.unreported(), rank=0, world_size=1)
    expected = {step: row["train/loss"] for step, row in undisturbed.written.items()}
    assert {step: row["train/loss"] for step, row in stopped.written.items()} == expected
    assert sorted(expected) == [4, 8, 10]


def test_what_is_not_reported_is_kept_once_whatever_the_number_of_workers() -> None:
    """The sums are over all ranks; one rank begins with all of them."""
    reporter = reporter_of(Writer(), 4)
    reporter.add(1, metrics(0.5))
    kept = reporter.unreported()
    assert (kept.loss, kept.num_samples, kept.num_steps) == (0.5, 8.0, 1)
    first, other = reporter_of(Writer(), 4), reporter_of(Writer(), 4)
    first.take_over(kept, rank=0, world_size=2)
    other.take_over(kept, rank=1, world_size=2)
    assert first.unreported().loss == 1.0  # a sum over the ranks, of which a report takes the mean
    assert other.unreported().num_samples == 0.0


def test_samples_that_did_not_come_do_not_lower_the_mean() -> None:
    writer = Writer()
    reporter = reporter_of(writer, 2)
    # Each is the sum over the samples that came divided by the nominal eight.
    reporter.add(1, metrics(1.0, num_samples=8))
    reporter.add(2, metrics(0.5, num_samples=4))
    reporter.report(2, learning_rate=1e-3, metrics=metrics(0.0))
    assert writer.written[2]["train/loss"] == pytest.approx(1.0)


def test_the_terms_of_a_loss_are_reported_by_name() -> None:
    writer = Writer()
    reporter = reporter_of(writer, 1)
    terms = {"l1": torch.tensor(0.5), "ssim": torch.tensor(0.25)}
    step = metrics(0.75)._replace(terms=terms)
    reporter.add(1, step)
    reporter.report(1, learning_rate=1e-3, metrics=step)
    losses = {name: x for name, x in writer.written[1].items() if name.startswith("train/loss")}
    assert losses == {"train/loss": 0.75, "train/loss_l1": 0.5, "train/loss_ssim": 0.25}


def test_speed_and_time_left_leave_out_the_wait_for_the_first_step(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = Writer()
    run_steps(reporter_of(writer, 5), clock, [60.0, 2.0, 2.0, 2.0, 2.0])
    assert writer.written[5]["worker/images_per_s"] == 4.0
    assert caplog.messages[-1].endswith("eta=0m10s")  # five steps of two seconds


def test_the_time_left_includes_what_follows_the_steps(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run_steps(reporter_of(Writer(), 10, after=After(3, 20.0)), clock, [2.0] * 10)
    assert caplog.messages[-1].endswith("eta=0m26s")  # three steps of two seconds, and twenty


def test_the_time_left_follows_the_last_steps(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reporter = StepReporter(RunSize(400, 8, 80, 1), 100, 0, cast(MetricWriter, Writer()))
    run_steps(reporter, clock, [1.0] * 101 + [3.0] * 199)
    assert caplog.messages[-1].endswith("eta=5m00s")  # a hundred steps of three seconds


def test_a_few_seconds_of_slow_steps_hardly_move_the_time_left(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    reporter = StepReporter(RunSize(3200, 8, 80, 1), 200, 0, cast(MetricWriter, Writer()))
    run_steps(reporter, clock, [0.125] * 780 + [0.5] * 20)
    # 2,400 steps of 0.125 s take five minutes; by the last twenty steps it would be twenty.
    assert caplog.messages[-1].endswith("eta=5m39s")


def test_between_two_reports_only_the_driver_is_told(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ends = Ends()
    run_steps(reporter_of(Writer(), 10, ends=ends), clock, [60.0, 30.0, 30.0])
    assert caplog.messages == []
    assert [told[:5] for told in ends.told] == [
        (Phase.TRAINING, 1, 10, "training", "eta=?"),
        (Phase.TRAINING, 2, 10, "training", "eta=4m00s"),
        (Phase.TRAINING, 3, 10, "training", "eta=3m30s"),
    ]


def test_a_driver_is_told_which_arm_is_trained(clock: Clock) -> None:
    ends = Ends()
    reporter = reporter_of(Writer(), 10, ends=ends)
    reporter.prefix = "finetune-1-seed0/"
    run_steps(reporter, clock, [60.0])
    assert ends.told[-1].what == "training finetune-1-seed0"


def test_a_bar_takes_the_place_of_the_lines(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MAE_PROGRESS_BAR", "1")
    ends = Ends()
    run_steps(reporter_of(Writer(), 2, ends=ends), clock, [60.0, 30.0, 30.0])
    assert caplog.messages == []
    assert ends.told[-1][:4] == (Phase.TRAINING, 3, 10, "training")
    assert ends.told[-1].detail.startswith("epoch=0.20 loss=1.5000 ")
    assert ends.told[-1].detail.endswith("eta=3m30s")
