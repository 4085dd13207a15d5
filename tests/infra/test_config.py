from pathlib import Path

import pytest
from pydantic import ValidationError

from infra.config import StorageConfig, TrackingConfig


def test_runs_and_their_record_lie_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert StorageConfig().root == "runs"
    # Absolute, since workers have a working folder of their own.
    assert TrackingConfig().uri == f"sqlite:///{tmp_path.resolve()}/runs/mlflow.db"


def test_the_store_is_that_of_the_folder_in_which_a_config_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        uris.append(TrackingConfig().uri)
    assert uris[0] != uris[1]


@pytest.mark.parametrize("secret", ["aws_secret_access_key", "password", "token"])
def test_a_secret_has_no_place_in_a_config(secret: str) -> None:
    with pytest.raises(ValidationError, match=secret):
        StorageConfig.model_validate({secret: "x"})
    with pytest.raises(ValidationError, match=secret):
        TrackingConfig.model_validate({secret: "x"})
