"""What was left out is kept until it is written down; kinds are counted."""

import pytest

from pipelines import reporting
from pipelines.batches import BadSample
from pipelines.reporting import RunSize, StepReporter, count_kinds


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
