from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.entities import LoggedModelStatus
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    PERMISSION_DENIED,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
)

from infra import registry
from infra.registry import Version, alias_holder, register, set_alias
from infra.storage import StorageError

URI = "http://mlflow:5000"
ABSENT = MlflowException("no such model", error_code=RESOURCE_DOES_NOT_EXIST)


class FakeMlflow:
    """The part of MLflow's client that keeps one model's versions."""

    tracking_uri = URI

    def __init__(self, logged: list[Any] | None = None) -> None:
        self.versions: list[Any] = []
        self.aliases: dict[str, Any] = {}
        self.logged = logged or []

    def create_registered_model(self, name: str) -> None:
        if self.versions:
            raise MlflowException("there is one", error_code=RESOURCE_ALREADY_EXISTS)

    def search_model_versions(self, _: str) -> list[Any]:
        return self.versions

    def get_run(self, _: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(experiment_id="7"))

    def search_logged_models(self, experiments: list[str], filter_string: str) -> list[Any]:
        assert (experiments, filter_string) == (["7"], "source_run_id = 'run'")
        return self.logged

    def create_model_version(
        self, name: str, source: str, run_id: str, tags: dict[str, str], *, model_id: str | None
    ) -> Any:
        self.versions.append(
            SimpleNamespace(
                version=len(self.versions) + 1,
                run_id=run_id,
                tags=tags,
                source=source,
                model_id=model_id,
            )
        )
        return self.versions[-1]

    def set_model_version_tag(self, name: str, version: int, key: str, value: str) -> None:
        self.versions[version - 1].tags[key] = value

    def set_registered_model_alias(self, name: str, alias: str, number: str) -> None:
        self.aliases[alias] = self.versions[int(number) - 1]

    def get_model_version_by_alias(self, name: str, alias: str) -> Any:
        if alias not in self.aliases:
            raise ABSENT
        return self.aliases[alias]


def use(fake: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry, "client_of", lambda uri: fake)
    return fake


def test_an_alias_that_nobody_has_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeMlflow(), monkeypatch)
    assert alias_holder(URI, "mae", "champion") is None


def test_the_version_with_the_alias_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeMlflow(), monkeypatch)
    first = register(URI, "mae", "run", "s3://b/checkpoint", {"top1": "0.5"})
    assert first == Version("1", "run", {"top1": "0.5"})
    set_alias(URI, "mae", "champion", "1")
    assert alias_holder(URI, "mae", "champion") == first


def test_a_run_has_one_version_however_often_it_is_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = use(FakeMlflow(), monkeypatch)
    register(URI, "mae", "run", "s3://b/checkpoint", {"top1": "0.5", "kept": "yes"})
    again = register(URI, "mae", "run", "s3://b/checkpoint", {"top1": "0.6"})
    assert again == Version("1", "run", {"top1": "0.6", "kept": "yes"})
    assert len(fake.versions) == 1
    assert fake.versions[0].tags == {"top1": "0.6", "kept": "yes"}


def logged(status: LoggedModelStatus) -> Any:
    return SimpleNamespace(status=status, artifact_location="mlflow-artifacts:/m", model_id="m-1")


@pytest.mark.parametrize(
    ("tracking_uri", "models", "given", "source", "model_id"),
    [
        (URI, [logged(LoggedModelStatus.READY)], "runs/x", "mlflow-artifacts:/m", "m-1"),
        (URI, [logged(LoggedModelStatus.FAILED)], "s3://b/x", "s3://b/x", None),
        (URI, [], "s3://b/x", "s3://b/x", None),
        (URI, [], "runs/x", "runs:/run/checkpoint", None),
        ("sqlite:////a/mlflow.db", [], "runs/x", "runs/x", None),
    ],
)
def test_a_version_points_to_files_that_its_server_accepts(
    tracking_uri: str,
    models: list[Any],
    given: str,
    source: str,
    model_id: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = use(FakeMlflow(models), monkeypatch)
    fake.tracking_uri = tracking_uri
    register(tracking_uri, "mae", "run", given, {})
    assert (fake.versions[0].source, fake.versions[0].model_id) == (source, model_id)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            MlflowException("no rights", error_code=PERMISSION_DENIED),
            f"at {URI} refused: no rights",
        ),
        (ConnectionRefusedError("refused"), f"MLflow at {URI} does not answer: refused"),
    ],
)
def test_a_registry_that_cannot_be_used_is_a_storage_error(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: object, **__: object) -> None:
                raise error

            return fail

    use(Broken(), monkeypatch)
    for call in (
        lambda: alias_holder(URI, "mae", "champion"),
        lambda: register(URI, "mae", "run", "s3://b/x", {}),
        lambda: set_alias(URI, "mae", "champion", "1"),
    ):
        with pytest.raises(StorageError, match=message):
            call()
