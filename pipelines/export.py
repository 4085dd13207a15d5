"""The trained encoder as a model in MLflow.

A module of its own: what it imports takes seconds, and only the driver needs it.
"""

import logging
from importlib.metadata import version
from pathlib import Path

import mlflow
import mlflow.pytorch
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

from mae_core.checkpoint import load_encoder

logger = logging.getLogger(__name__)


def log_encoder(uri: str, run_id: str | None, checkpoint: Path) -> None:
    """Log the encoder as an MLflow model that loads without this package, for any batch size.

    A failure costs a warning: the checkpoint is the model of record.
    """
    if run_id is None:
        return
    encoder, manifest = load_encoder(checkpoint)
    height, width = manifest.model.img_size
    channels = manifest.model.in_chans
    example = np.zeros((2, channels, height, width), np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, channels, height, width))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1, encoder.embed_dim))]),
    )
    try:
        mlflow.set_tracking_uri(uri)
        with mlflow.start_run(run_id=run_id):
            mlflow.pytorch.log_model(
                encoder.eval(),
                name="encoder",
                input_example=example,
                signature=signature,
                # Else MLflow loads the model in a process of its own to find out: 5 s.
                pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "torch")],
                metadata={
                    "channel_mean": list(manifest.channel_mean),
                    "channel_std": list(manifest.channel_std),
                    "patch_size": manifest.model.patch_size,
                },
            )
    except Exception as error:  # whatever MLflow or the export raises
        logger.warning("the encoder could not be logged to MLflow as a model: %s", error)
