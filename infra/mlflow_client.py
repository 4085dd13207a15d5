"""Create MLflow clients, each bound to the store that it is given.

MLflow keeps a tracking URI and a registry URI for the whole process, in variables and in
MLFLOW_TRACKING_URI and MLFLOW_REGISTRY_URI, and falls back to files in the working folder. Nothing
in this project reads or sets these: all code that talks to MLflow gets its client here and calls no
function of `mlflow` that has no client.
"""

import logging
from functools import lru_cache
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from infra.config import TrackingConfig
from infra.quick_imports import hidden, without_collecting

# Without this tag, MLflow 3 treats an experiment as GenAI and opens it on its traces.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}

SQLITE_SCHEME = "sqlite:///"


@lru_cache(maxsize=4)
def client_of(uri: str) -> MlflowClient:
    """Return the client of the store at `uri`, for its runs and for its model registry."""
    if uri.startswith(SQLITE_SCHEME):
        Path(uri.removeprefix(SQLITE_SCHEME)).parent.mkdir(parents=True, exist_ok=True)
    # It would warn about each retry of a request; we warn once that the server is down.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    # The client imports what its store needs. Mako would show its errors in colour with Pygments.
    with without_collecting(), hidden(["pygments"]):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def artifact_location(uri: str) -> str | None:
    """Return the folder next to a sqlite store, or None to let a server decide.

    MLflow's default for a sqlite store is the folder in which the program was started.
    """
    if not uri.startswith(SQLITE_SCHEME):
        return None
    store = Path(uri.removeprefix(SQLITE_SCHEME)).absolute()
    return (store.parent / "mlartifacts").as_uri()


def experiment_of(client: MlflowClient, tracking: TrackingConfig) -> str:
    """Return the id of the experiment, creating it if necessary."""
    experiment = client.get_experiment_by_name(tracking.experiment)
    if experiment is None:
        location = artifact_location(tracking.uri)
        try:
            return client.create_experiment(tracking.experiment, location, EXPERIMENT_TAGS)
        except MlflowException as error:
            # Another run may have created it in the meantime.
            experiment = client.get_experiment_by_name(tracking.experiment)
            if experiment is None:
                raise error
    for key, value in EXPERIMENT_TAGS.items():
        if key not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)
