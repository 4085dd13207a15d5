"""Log the trained encoder as a model in MLflow.

This is a separate module because its imports take seconds, and only the driver needs them.
"""

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow.pytorch
import numpy as np
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from numpy.typing import NDArray
from torch import nn

from infra.mlflow_client import client_of
from infra.scratch import scratch_folder
from mae_core.checkpoint import load_encoder
from pipelines.terminal import progress

logger = logging.getLogger(__name__)


def log_encoder(uri: str, run_id: str | None, checkpoint: Path) -> None:
    """Log the encoder as an MLflow model that loads without this package, for any batch size.

    If this fails, a warning is logged: the checkpoint is what counts.
    """
    if run_id is None:
        return
    encoder, manifest = load_encoder(checkpoint, is_verified=True)
    height, width = manifest.model.img_size
    channels = manifest.model.in_chans
    example = np.zeros((2, channels, height, width), np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, channels, height, width))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1, encoder.embed_dim))]),
    )
    metadata = {
        "channel_mean": list(manifest.channel_mean),
        "channel_std": list(manifest.channel_std),
        "patch_size": manifest.model.patch_size,
    }
    try:
        with progress.doing("logging the encoder to MLflow"):
            _log_model(uri, run_id, encoder.eval(), example, signature, metadata)
    except Exception as error:  # MLflow and the export may raise anything
        logger.warning("the encoder could not be logged to MLflow as a model: %s", error)


def _log_model(
    uri: str,
    run_id: str,
    encoder: nn.Module,
    example: NDArray[np.float32],
    signature: ModelSignature,
    metadata: dict[str, Any],
) -> None:
    """Do what `mlflow.pytorch.log_model` does, but in the store at `uri`.

    That function uses the tracking URI of the process, and leaves it set for everything that
    follows.
    """
    client = client_of(uri)
    experiment = client.get_run(run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name="encoder", source_run_id=run_id)
    try:
        with scratch_folder() as folder:
            mlflow.pytorch.save_model(
                encoder,
                f"{folder}/model",
                mlflow_model=Model(
                    artifact_path=logged.artifact_location,
                    run_id=run_id,
                    metadata=metadata,
                    model_id=logged.model_id,
                    model_uuid=logged.model_id,
                ),
                signature=signature,
                input_example=example,
                # Otherwise MLflow loads the model in another process to find out, which takes 5 s.
                pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "torch")],
            )
            client.log_model_artifacts(logged.model_id, f"{folder}/model")
    except BaseException:
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
        raise
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
