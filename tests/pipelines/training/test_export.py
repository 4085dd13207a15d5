"""The encoder becomes a model in MLflow; that this fails costs a warning and not the run."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.training import export


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an encoder of three channels in the place of a checkpoint's."""
    encoder = SimpleNamespace(embed_dim=12, eval=lambda: encoder)
    manifest = SimpleNamespace(
        model=SimpleNamespace(img_size=(32, 48), in_chans=3, patch_size=16),
        channel_mean=(0.1, 0.2, 0.3),
        channel_std=(1.0, 2.0, 3.0),
    )
    monkeypatch.setattr(export, "load_encoder", lambda *_, **__: (encoder, manifest))
    return Path("unused")


def test_without_a_run_nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "load_encoder", lambda *_, **__: pytest.fail("read"))
    export.log_encoder("sqlite:////x.db", None, Path("unused"))


def test_the_model_takes_batches_of_any_size_and_says_how_images_are_normalised(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[Any] = []
    monkeypatch.setattr(export, "_log_model", lambda *given: logged.append(given))
    export.log_encoder("sqlite:////x.db", "r1", checkpoint)
    ((uri, run_id, _, example, signature, metadata),) = logged
    assert (uri, run_id, example.shape) == ("sqlite:////x.db", "r1", (2, 3, 32, 48))
    assert signature.inputs.inputs[0].shape == (-1, 3, 32, 48)
    assert signature.outputs.inputs[0].shape == (-1, -1, 12)
    assert metadata == {
        "channel_mean": [0.1, 0.2, 0.3],
        "channel_std": [1.0, 2.0, 3.0],
        "patch_size": 16,
    }


def test_a_failed_export_is_a_warning(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(export, "_log_model", fail)
    with caplog.at_level(logging.WARNING):
        export.log_encoder("sqlite:////x.db", "r1", checkpoint)
    assert caplog.messages == ["the encoder could not be logged to MLflow as a model: no space"]
