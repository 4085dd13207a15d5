"""Versions of a model in MLflow's registry, and the alias that says which one is in use."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

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
    """The version that has the alias; None if there is no such model or alias.

    Raises:
        StorageError: MLflow can't be used.
    """
    with _as_storage_errors(uri):
        try:
            return _version(MlflowClient(uri).get_model_version_by_alias(model, alias))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def register(uri: str, model: str, run_id: str, source: str, tags: Mapping[str, str]) -> Version:
    """A version of the model that a run made, or the one there is with these tags brought up to
    date.

    Args:
        uri: of MLflow.
        model: made if it is not there.
        run_id: of the run; its logged model is the source, if it has one.
        source: where the files are, otherwise.
        tags: of the version.

    Raises:
        StorageError: MLflow can't be used.
    """
    client = MlflowClient(uri)
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
        model_id = _logged_model(client, run_id)
        made = client.create_model_version(
            model,
            source=f"models:/{model_id}" if model_id else source,
            run_id=run_id,
            tags=dict(tags),
            model_id=model_id,
        )
        return _version(made)


def _logged_model(client: MlflowClient, run_id: str) -> str | None:
    experiment = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment], filter_string=f"source_run_id = '{run_id}'")
    return models[0].model_id if models else None


def set_alias(uri: str, model: str, alias: str, number: str) -> None:
    """Raises: StorageError: MLflow can't be used."""
    with _as_storage_errors(uri):
        MlflowClient(uri).set_registered_model_alias(model, alias, number)
