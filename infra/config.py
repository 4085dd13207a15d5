"""Define the settings of the storage and of MLflow.

Secrets come from the environment, never from YAML.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class _StrictConfig(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True
    )


class StorageConfig(_StrictConfig):
    root: str = "runs"
    """Folder or s3://bucket/prefix for checkpoints and results. S3 credentials and endpoint come
    from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL."""


class TrackingConfig(_StrictConfig):
    uri: str = Field(default_factory=lambda: f"sqlite:///{Path('runs/mlflow.db').resolve()}")
    """MLflow tracking server (http://...) or an absolute sqlite store (sqlite:////...)."""
    experiment: str = "mae"
    """MLflow experiment that the run belongs to."""
    parent_run_id: str | None = None
    """MLflow run under which this one is shown; a pipeline sets it."""
