"""`mae checkpoint` says what weights are, and names file and fix where they can't be used."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mae_core.checkpoint_manifest import CorruptCheckpointError
from pipelines.commands import completion
from pipelines.commands.checkpoint import command
from pipelines.outcome import ConfigError
from tests.pipelines.training.test_init_from import encoder_weights, write_own, write_run


class Told(NamedTuple):
    code: int
    out: str


def checkpoint(capsys: pytest.CaptureFixture[str], *words: object) -> Told:
    code = command(list(map(str, words)))
    return Told(code, capsys.readouterr().out)


def test_a_file_from_elsewhere_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": encoder_weights()}, tmp_path / "a.pth")
    shown = json.loads(checkpoint(capsys, "show", tmp_path / "a.pth", "--json").out)
    assert shown["format"] == "MAE authors' file"
    assert shown["encoder"] == "vit_micro: 192 wide, 6 deep, 3 heads"
    assert shown["image size"] == "16x16, 3 channels"
    assert shown["positions"] == "trained, for 2x2 patches"
    assert (shown["decoder"], shown["target"]) == ("none", "the file does not say")
    assert shown["parameters"] == "2,706,816 (encoder 2,706,816)"
    assert shown["channel mean"] == "0.485 0.456 0.406"
    assert len(shown["sha256"]) == 64


def test_a_run_is_described_by_its_newest_checkpoint_and_its_lineage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, "cars-00000001", age_s=0, config={"init_from": "/elsewhere"})
    for words in ((tmp_path / "pretrain/cars-00000001",), ("run:latest", "--root", tmp_path)):
        told = checkpoint(capsys, "show", *words)
        lines = dict(line.split("  ", maxsplit=1) for line in told.out.splitlines())
        fields = {name.strip(): value.strip() for name, value in lines.items()}
        assert fields["format"] == "checkpoint of ours"
        assert fields["trained for"] == "pretrain, step 7 of 7"
        assert fields["positions"] == "fixed, for 2x2 patches"
        assert fields["target"] == "norm_pix: each patch normalized"
        assert fields["MLflow run"] == "id-cars-00000001"
        assert fields["started from"] == "/elsewhere"


def test_convert_says_what_it_does_and_prints_where_the_weights_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_own(tmp_path / "own")
    caplog.set_level("INFO")
    told = checkpoint(capsys, "convert", tmp_path / "own", tmp_path / "a.pth", "--to", "fair")
    assert (told.code, told.out) == (0, f"{tmp_path / 'a.pth'}\n")
    assert caplog.messages[0] == "converting the weights ..."
    assert torch.load(tmp_path / "a.pth", weights_only=True).keys() == {"model"}


def test_what_is_no_checkpoint_has_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a.pth: is neither a complete checkpoint"):
        command(["show", str(tmp_path / "a.pth")])
    (tmp_path / "a.pth").write_text("a text")
    with pytest.raises(CorruptCheckpointError, match=r"a.pth: is neither a safetensors file nor"):
        command(["show", str(tmp_path / "a.pth")])


def test_a_nan_in_our_own_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.zeros_like(x, dtype=torch.bool))
    write_own(tmp_path / "own")
    with pytest.raises(CorruptCheckpointError, match=r"has a NaN or infinite value"):
        command(["show", str(tmp_path / "own")])


def test_help_says_what_may_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "No code in a file is run" in capsys.readouterr().out
    assert 'checkpoint) words="show convert --to' in completion.script()
