"""What a Kubernetes cluster lends us, and where the services on it keep things.

What runs on it is in the stages' configs. Secrets are named here, never held:
docs/guides/kubernetes.md says how to make them.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from infra.config import _StrictConfig
from infra.typed_text import typed
from infra.yaml_files import YamlFileError, read_yaml

# Operator and pods must agree on it; a test compares it with requirements.lock.
RAY_VERSION = "2.60.0"


class ClusterConfigError(ValueError):
    """The cluster config can't be rendered; says the file, the key and what is wrong."""


def _check_pinned(image: str) -> str:
    name, _, tag = image.rpartition(":")
    if not name or "/" in tag or tag == "latest":
        raise ValueError(f"{image!r} names no version; write image:tag, and not latest")
    return image


# A DNS-1035 label, as RayCluster and Service ask for. Short, so that what is appended fits in 63.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=24)]
# A Secret may have dots (DNS-1123).
SecretName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Image = Annotated[str, Field(pattern=r"^[a-z0-9][\w./:@-]*$"), AfterValidator(_check_pinned)]


class HeadConfig(_StrictConfig):
    cpus: int = Field(default=4, gt=0)
    """CPU cores of the head's pod. Jobs' drivers run there; tasks do not."""
    memory_gib: int = Field(default=16, gt=0)
    """Memory of the head's pod."""


class WorkerGroupConfig(_StrictConfig):
    cpus: int = Field(default=8, gt=0)
    """CPU cores of a worker's pod."""
    memory_gib: int = Field(default=32, gt=0)
    """Memory of a worker's pod, what lies in /dev/shm included."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a worker's pod."""
    min_workers: int = Field(default=0, ge=0)
    """Pods that stay when nothing runs."""
    max_workers: int = Field(default=4, ge=0)
    """Pods that the autoscaler may ask for."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that may carry these pods."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers={self.min_workers} > max_workers={self.max_workers}")
        return self


class ObjectStoreConfig(_StrictConfig):
    root: str = Field(default="s3://mae/runs", pattern=r"^s3://[^/]+(/.*)?$")
    """Where runs keep checkpoints and results (`storage.root` of every stage)."""
    endpoint_url: str | None = None
    """Address of an S3 server that is not AWS."""
    region: str = "us-east-1"
    """Region of the buckets."""
    secret: SecretName = "mae-s3"
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""


class MlflowConfig(_StrictConfig):
    artifacts: str = Field(default="s3://mlflow", pattern=r"^s3://[^/]+(/.*)?$")
    """Where the server puts artifacts; clients send them to the server, so need no key to it."""
    cpus: int = Field(default=1, gt=0)
    """CPU cores of the server's pod, and of its database's."""
    memory_gib: int = Field(default=2, gt=0)
    """Memory of the server's pod, and of its database's."""
    postgres_image: Image = "postgres:15.18-bookworm"
    """Image of the database."""
    postgres_disk_gib: int = Field(default=20, gt=0)
    """Disk of the database; it keeps metrics, not artifacts."""
    postgres_secret: SecretName = "mae-postgres"
    """Secret with the database's `password`."""


class JobConfig(_StrictConfig):
    retries: int = Field(default=1, ge=0)
    """New clusters that a failed RayJob gets; the chain resumes, so finished stages don't rerun."""
    keep_s: int = Field(default=600, ge=0)
    """Seconds that a finished RayJob's cluster stays, for a look at its logs."""


class ClusterConfig(_StrictConfig):
    name: Name = "mae"
    """What everything here is called, or begins with."""
    namespace: Name = "mae"
    """Kubernetes namespace; made if it does not exist."""
    image: Image
    """Image of infra/docker/Dockerfile, for head, workers, MLflow and what submits jobs."""
    image_pull_secret: SecretName | None = None
    """Secret for a private image registry."""
    head: HeadConfig = HeadConfig()
    cpu_workers: WorkerGroupConfig = WorkerGroupConfig(min_workers=1)
    gpu_workers: WorkerGroupConfig = WorkerGroupConfig(gpus=1)
    idle_timeout_s: int = Field(default=300, ge=0)
    """Seconds without work after which a worker's pod is given back."""
    stop_wait_s: int = Field(default=60, gt=0)
    """Seconds between SIGTERM and SIGKILL when a job is stopped (Ray's own default is 3)."""
    ray_token_secret: SecretName = "mae-ray-token"
    """Secret with the cluster's `auth_token`, which jobs and the dashboard ask for."""
    storage: ObjectStoreConfig = ObjectStoreConfig()
    mlflow: MlflowConfig = MlflowConfig()
    job: JobConfig = JobConfig()

    @model_validator(mode="after")
    def _check_gpus(self) -> Self:
        if self.cpu_workers.gpus or not self.gpu_workers.gpus:
            raise ValueError("cpu_workers.gpus must be 0, and gpu_workers.gpus at least 1")
        return self


def load_cluster(file: Path) -> ClusterConfig:
    """Read a cluster's YAML file.

    Raises:
        ClusterConfigError: no such file, not YAML, or a wrong or misspelt key.
    """
    try:
        return ClusterConfig.model_validate(typed(ClusterConfig, read_yaml(file).values))
    except FileNotFoundError:
        raise ClusterConfigError(f"{file}: no such file") from None
    except YamlFileError as error:
        raise ClusterConfigError(str(error)) from error
    except ValidationError as error:
        lines = [
            f"{file} {'.'.join(map(str, mistake['loc']))}: {mistake['msg']}"
            for mistake in error.errors()
        ]
        raise ClusterConfigError("\n".join(lines)) from error
