"""Model versions in MLflow's registry, and the alias that marks the one in use."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from infra.mlflow_client import client_of
from infra.storage import StorageError


class Version(NamedTuple):
    number: str
    run_id: str | None
    tags: dict[str, str]


@contextmanager
def _as_storage_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise StorageError(f"the model registry of MLflow at {uri} refused: {error}") from error
    except OSError as error:
        raise StorageError(f"MLflow at {uri} does not answer: {error}") from error


def _version(found: ModelVersion) -> Version:
    return Version(str(found.version), found.run_id, dict(found.tags))


def alias_holder(uri: str, model: str, alias: str) -> Version | None:
    """Return the version that has the alias; None if there is no such model or alias.

    Raises:
        StorageError: MLflow can't be used.
    """
    with _as_storage_errors(uri):
        try:
            return _version(client_of(uri).get_model_version_by_alias(model, alias))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def register(uri: str, model: str, run_id: str, source: str, tags: Mapping[str, str]) -> Version:
    """Register the model that a run made, or update the tags of its existing version.

    Args:
        uri: Address of MLflow.
        model: Name of the model; created if it does not exist.
        run_id: The run; its logged model is the source, if it has one.
        source: Where the files are, otherwise.
        tags: Tags of the version.

    Raises:
        StorageError: MLflow can't be used.
    """
    client = client_of(uri)
    with _as_storage_errors(uri):
        try:
            client.create_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for found in client.search_model_versions(f"name='{model}'"):
            if found.run_id == run_id:
                for key, value in tags.items():
                    client.set_model_version_tag(model, found.version, key, value)
                return Version(str(found.version), run_id, {**found.tags, **tags})
        place, model_id = _source(client, run_id, source)
        made = client.create_model_version(model, place, run_id, dict(tags), model_id=model_id)
        return _version(made)


def _source(client: MlflowClient, run_id: str, otherwise: str) -> tuple[str, str | None]:
    """Return where the version's files are, and the logged model that they belong to, if any.

    The source is a location and never `models:/ID`, because MLflow resolves such a name with the
    tracking URI of the process and not with the client's.
    """
    logged = _logged_model(client, run_id)
    if logged is None:
        # A server accepts no local folder, which might be on another machine.
        is_taken = "://" in otherwise or not client.tracking_uri.startswith("http")
        return otherwise if is_taken else f"runs:/{run_id}/checkpoint", None
    return logged.artifact_location, logged.model_id


def _logged_model(client: MlflowClient, run_id: str) -> LoggedModel | None:
    experiment = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    whole = [found for found in models if found.status != LoggedModelStatus.FAILED]
    return whole[0] if whole else None


def set_alias(uri: str, model: str, alias: str, number: str) -> None:
    """Point the alias to a version, or raise a StorageError if MLflow can't be used."""
    with _as_storage_errors(uri):
        client_of(uri).set_registered_model_alias(model, alias, number)
