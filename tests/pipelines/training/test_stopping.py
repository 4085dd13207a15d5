"""At the end of each step it is decided whether to save and to stop; the end is told truthfully."""

import time
from pathlib import Path

import pytest

from pipelines.training import recording, stopping
from pipelines.training.checkpoints import newest_step
from pipelines.training.stopping import AfterStep, LocalChannel, Phase, StepEnds, Told


def step_ends(channel: LocalChannel, every_minutes: float = 10.0) -> StepEnds:
    return StepEnds(channel, every_minutes=every_minutes, rank=0, world_size=1)


def wait_until_asked(ends: StepEnds) -> None:
    deadline_s = time.monotonic() + 20
    while not ends.is_asked:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_steps_go_on_until_a_checkpoint_is_due_or_the_run_is_to_stop() -> None:
    channel = LocalChannel()
    ends = step_ends(channel)
    assert ends.agree(is_due=False) is AfterStep.GO_ON
    assert ends.agree(is_due=True) is AfterStep.SAVE
    channel.ask()
    wait_until_asked(ends)
    assert ends.agree(is_due=False) is AfterStep.STOP
    assert ends.agree(is_due=True) is AfterStep.STOP


def test_a_checkpoint_is_due_by_the_clock_and_any_checkpoint_sets_it_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now)
    ends = step_ends(LocalChannel(), every_minutes=2)
    now += 119
    assert ends.agree(is_due=False) is AfterStep.GO_ON
    now += 1
    assert ends.agree(is_due=False) is AfterStep.SAVE
    assert ends.agree(is_due=False) is AfterStep.GO_ON
    now += 100
    assert ends.agree(is_due=True) is AfterStep.SAVE
    now += 100
    assert ends.agree(is_due=False) is AfterStep.GO_ON


def test_the_driver_hears_how_far_a_worker_in_its_own_process_is() -> None:
    channel = LocalChannel()
    assert channel.told() == Told(Phase.STARTING, 0)
    channel.tell(Told(Phase.TRAINING, 20, 500, "embedding", "eta=1m00s"))
    assert channel.told() == Told(Phase.TRAINING, 20, 500, "embedding", "eta=1m00s")
    assert not channel.is_asked()
    channel.ask()
    assert channel.is_asked()
    assert not LocalChannel().is_asked()


def commit(run: Path, step: int) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_a_checkpoint_without_its_manifest_is_not_the_newest(tmp_path: Path) -> None:
    assert newest_step(str(tmp_path)) is None
    commit(tmp_path, 20)
    (tmp_path / "checkpoints/step-00000030").mkdir()
    assert newest_step(str(tmp_path)) == 20


@pytest.mark.parametrize(
    ("checkpoint", "told", "expected"),
    [
        (
            None,
            Told(Phase.TRAINING, 0),
            "before the first checkpoint was written: the same command starts over",
        ),
        (
            213,
            Told(Phase.STOPPED, 213),
            "at step 213 of 500; checkpoint written; the same command goes on from there",
        ),
        (
            200,
            Told(Phase.TRAINING, 0),
            "before its next checkpoint was written; the newest is of step 200 of 500, and the "
            "same command goes on from there",
        ),
        (
            500,
            Told(Phase.MEASURING, 0),
            "after all 500 steps; the same command goes on from there",
        ),
        (
            20,
            Told(Phase.STARTING, 0),
            "before its next checkpoint was written; the newest is of step 20 of 500, and the "
            "same command goes on from there",
        ),
    ],
    ids=["none", "written", "no-time", "measuring", "starting"],
)
def test_a_stopped_run_says_what_is_saved(
    tmp_path: Path, checkpoint: int | None, told: Told, expected: str
) -> None:
    channel = LocalChannel()
    channel.tell(told)
    if checkpoint is not None:
        commit(tmp_path, checkpoint)
    assert recording.saved_steps(str(tmp_path), channel, 500) == expected
