"""Checkpoints in storage: the newest whole one is found, whatever happened to the others."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

from mae_core.checkpoint import save_checkpoint
from mae_core.checkpoint_manifest import CheckpointRecord, CorruptCheckpointError
from mae_core.config import LossConfig, MaskingConfig, ModelConfig
from pipelines.outcome import ConfigError
from pipelines.training.checkpoints import (
    StartAgainError,
    at_newest_checkpoint,
    commit_checkpoint,
    fetch_checkpoint,
    fetch_found,
    find_checkpoint,
    list_steps,
    resume_position,
)
from pipelines.training.run_folder import SupersededError


def save(
    run: Path,
    local: Path,
    step: int,
    *,
    keep: int = 10,
    check: Callable[[], None] = lambda: None,
) -> Path:
    """Commits a checkpoint of a tiny module; 64 samples a step."""
    local.mkdir()
    record = CheckpointRecord(
        step=step,
        samples_seen=64 * step,
        epoch=step / 10,
        total_steps=100,
        seed=0,
        data_digest="d",
        channel_mean=(0.5, 0.5, 0.5),
        channel_std=(0.5, 0.5, 0.5),
        model=ModelConfig(),
        masking=MaskingConfig(),
        loss=LossConfig(),
    )
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, step)
    optimizer = torch.optim.AdamW(module.parameters())
    save_checkpoint(local, record, model=module, optimizer=optimizer)
    return Path(commit_checkpoint(local, str(run), step=step, keep=keep, check=check))


@pytest.mark.parametrize("allowed", [0, 1], ids=["before it began", "in mid-write"])
def test_a_commit_that_another_start_overtook_changes_nothing(
    tmp_path: Path, saved: dict[int, Path], allowed: int
) -> None:
    checks = []

    def check() -> None:
        checks.append(1)
        if len(checks) > allowed:
            raise SupersededError("taken over")

    with pytest.raises(SupersededError):
        save(tmp_path / "run", tmp_path / "late", 20, keep=1, check=check)
    assert resume_position(str(tmp_path / "run")) == 15 * 64
    assert set(list_steps(str(tmp_path / "run"))) >= {5, 10, 15}


@pytest.fixture
def saved(tmp_path: Path) -> dict[int, Path]:
    """Checkpoints of steps 5, 10 and 15 of the run in tmp_path/run."""
    return {step: save(tmp_path / "run", tmp_path / f"{step}", step) for step in (5, 10, 15)}


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def found_step(run: Path, workspace: Path) -> int | None:
    """The step that the workers go on from, after as many starts as that takes."""
    while (newest := find_checkpoint(str(run))) is not None:
        with suppress(StartAgainError):
            return fetch_found(str(run), newest.step, workspace).manifest.step
    return None


def test_a_run_without_checkpoints_begins_at_zero(tmp_path: Path) -> None:
    assert find_checkpoint(str(tmp_path / "run")) is None
    assert resume_position(str(tmp_path / "run")) == 0
    assert list_steps(str(tmp_path / "run")) == []


def test_the_newest_is_found_and_copied(saved: dict[int, Path], tmp_path: Path) -> None:
    newest = find_checkpoint(str(tmp_path / "run"))
    assert newest is not None
    found = fetch_found(str(tmp_path / "run"), newest.step, tmp_path / "w")
    assert found.uri == str(saved[15])
    assert found.manifest.step == 15
    assert sorted(p.name for p in found.folder.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "training_state.safetensors",
    ]
    assert found.folder.is_relative_to(tmp_path / "w")
    assert resume_position(str(tmp_path / "run")) == 960


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_a_bit(folder / "model.safetensors"),
        lambda folder: flip_a_bit(folder / "training_state.safetensors"),
        lambda folder: flip_a_bit(folder / "manifest.json"),
        lambda folder: cut(folder / "model.safetensors"),
        lambda folder: cut(folder / "manifest.json"),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "training_state.safetensors").unlink(),
    ],
    ids=["weights", "state", "manifest", "cut", "cut-manifest", "no-manifest", "no-state"],
)
def test_a_damaged_one_costs_a_warning_and_the_one_before_is_found(
    saved: dict[int, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    damage(saved[15])
    with caplog.at_level(logging.WARNING):
        assert found_step(tmp_path / "run", tmp_path / "w") == 10
    assert f"checkpoint {saved[15]} is not complete" in caplog.text
    assert str(saved[10]) not in caplog.text
    # The data goes on from there, too, and so does the next command.
    assert resume_position(str(tmp_path / "run")) == 640
    assert (saved[15] / "model.safetensors").exists()


def test_when_all_are_damaged_the_run_begins_anew(saved: dict[int, Path], tmp_path: Path) -> None:
    for folder in saved.values():
        cut(folder / "model.safetensors")
    assert resume_position(str(tmp_path / "run")) == 0


def test_a_folder_that_is_no_checkpoint_is_passed_over(
    saved: dict[int, Path], tmp_path: Path
) -> None:
    (tmp_path / "run/checkpoints/step-99.partial").mkdir()
    (tmp_path / "run/checkpoints/notes").mkdir()
    assert list_steps(str(tmp_path / "run")) == [5, 10, 15]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        (tmp_path / f"run/checkpoints/step-{step:08d}").mkdir(parents=True)
    assert list_steps(str(tmp_path / "run")) == [7, 99_999_999, 100_000_000]


@pytest.mark.parametrize(("keep", "left"), [(1, [20]), (2, [15, 20]), (3, [10, 15, 20])])
def test_the_newest_are_kept(
    saved: dict[int, Path], tmp_path: Path, keep: int, left: list[int]
) -> None:
    save(tmp_path / "run", tmp_path / "20", 20, keep=keep)
    assert list_steps(str(tmp_path / "run")) == left


def test_a_checkpoint_of_a_later_step_does_not_count_among_the_newest(
    saved: dict[int, Path], tmp_path: Path
) -> None:
    """As one that was found to be damaged, from which the run had to go back."""
    save(tmp_path / "run", tmp_path / "12", 12, keep=2)
    assert list_steps(str(tmp_path / "run")) == [10, 12, 15]


def test_a_step_is_written_over_a_damaged_one(saved: dict[int, Path], tmp_path: Path) -> None:
    cut(saved[15] / "model.safetensors")
    save(tmp_path / "run", tmp_path / "again", 15)
    assert resume_position(str(tmp_path / "run")) == 960


def test_a_fetched_checkpoint_must_be_whole(saved: dict[int, Path], tmp_path: Path) -> None:
    assert fetch_checkpoint(str(saved[5]), tmp_path / "a").manifest.step == 5
    cut(saved[5] / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors"):
        fetch_checkpoint(str(saved[5]), tmp_path / "b")


def test_only_what_the_manifest_lists_is_copied(saved: dict[int, Path], tmp_path: Path) -> None:
    (saved[5] / "extra").write_text("not ours")
    (saved[5] / "sub").mkdir()
    (saved[5] / "sub" / "extra").write_text("not ours")
    assert sorted(
        file.name for file in fetch_checkpoint(str(saved[5]), tmp_path / "a").folder.iterdir()
    ) == [
        "manifest.json",
        "model.safetensors",
        "training_state.safetensors",
    ]


def test_a_runs_folder_stands_for_its_newest_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    for step in (5, 200, 1000):
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    for step in (5, 200):  # the newest was cut off
        (run / f"checkpoints/step-{step:08d}/manifest.json").write_text("{}")
    newest = f"{run}/checkpoints/step-00000200"
    caplog.set_level("INFO")
    for given in (newest, str(run), f"{run}/", f"{run}/checkpoints"):
        assert at_newest_checkpoint(given) == newest
    assert f"init_from={run}: takes its newest checkpoint, {newest}" in caplog.text


def test_a_folder_without_a_checkpoint_is_told_with_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "pretrain-1").mkdir()
    with pytest.raises(
        ConfigError, match=r"is neither a complete checkpoint, nor .*; it holds pretrain-1"
    ):
        at_newest_checkpoint(str(tmp_path))


def test_a_damaged_checkpoint_is_named_by_its_place_and_not_by_its_copy(
    tmp_path: Path, saved: dict[int, Path]
) -> None:
    content = bytearray((saved[5] / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (saved[5] / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=f"^{saved[5]}/model.safetensors: sha256 is"):
        fetch_checkpoint(str(saved[5]), tmp_path / "copy")
