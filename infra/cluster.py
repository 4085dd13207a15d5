"""The config of a Kubernetes cluster: its resources, and where its services store data.

What runs on the cluster is in the stages' configs. Secrets are named here but never contained;
docs/guides/kubernetes.md explains how to create them.
"""

from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from infra.config import _StrictConfig
from infra.typed_text import typed
from infra.yaml_files import YamlFileError, read_yaml

# The operator and the pods must use the same version; a test compares it with requirements.lock.
RAY_VERSION = "2.60.0"


class ClusterConfigError(ValueError):
    """The cluster config can't be rendered; the message has the file, the key and the problem."""


def _check_pinned(image: str) -> str:
    name, _, tag = image.rpartition(":")
    if not name or "/" in tag or tag == "latest":
        raise ValueError(f"{image!r} has no fixed version; write image:tag, and not latest")
    return image


# A DNS-1035 label, as RayCluster and Service require. Short, so that suffixes fit into 63.
Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=24)]
# A Secret's name may contain dots (DNS-1123).
SecretName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Image = Annotated[str, Field(pattern=r"^[a-z0-9][\w./:@-]*$"), AfterValidator(_check_pinned)]


class HeadConfig(_StrictConfig):
    cpus: int = Field(default=4, gt=0)
    """CPU cores of the head's pod. The drivers of jobs run there, tasks do not."""
    memory_gib: int = Field(default=16, gt=0)
    """Memory of the head's pod, in GiB."""


class WorkerGroupConfig(_StrictConfig):
    cpus: int = Field(default=8, gt=0)
    """CPU cores of a worker's pod."""
    memory_gib: int = Field(default=32, gt=0)
    """Memory of a worker's pod in GiB, including what is in /dev/shm."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a worker's pod."""
    min_workers: int = Field(default=0, ge=0)
    """Number of pods that stay when nothing runs."""
    max_workers: int = Field(default=4, ge=0)
    """Largest number of pods that the autoscaler may start."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes on which these pods may run."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers={self.min_workers} > max_workers={self.max_workers}")
        return self


class ObjectStoreConfig(_StrictConfig):
    root: str = Field(default="s3://mae/runs", pattern=r"^s3://[^/]+(/.*)?$")
    """Folder for the runs' checkpoints and results (`storage.root` of every stage)."""
    endpoint_url: str | None = None
    """Address of an S3 server that is not AWS."""
    region: str = "us-east-1"
    """AWS region of the buckets."""
    secret: SecretName = "mae-s3"
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""


class MlflowConfig(_StrictConfig):
    artifacts: str = Field(default="s3://mlflow", pattern=r"^s3://[^/]+(/.*)?$")
    """Folder for the server's artifacts; clients upload through the server and need no key."""
    cpus: int = Field(default=1, gt=0)
    """CPU cores of the server's pod, and of its database's pod."""
    memory_gib: int = Field(default=2, gt=0)
    """Memory of the server's pod, and of its database's pod, in GiB."""
    postgres_image: Image = "postgres:15.18-bookworm"
    """Container image of the database."""
    postgres_disk_gib: int = Field(default=20, gt=0)
    """Disk of the database in GiB; it stores metrics, not artifacts."""
    postgres_secret: SecretName = "mae-postgres"
    """Secret with the database's `password`."""


class JobConfig(_StrictConfig):
    retries: int = Field(default=1, ge=0)
    """Number of new clusters for a failed RayJob; finished stages do not run again."""
    keep_s: int = Field(default=600, ge=0)
    """Seconds that the cluster of a finished RayJob stays, to look at its logs."""


class ClusterConfig(_StrictConfig):
    name: Name = "mae"
    """Name of the cluster, and prefix of the names of all other objects."""
    namespace: Name = "mae"
    """Kubernetes namespace; created if it does not exist."""
    image: Image
    """Image built from infra/docker/Dockerfile, for head, workers, MLflow and job submission."""
    image_pull_secret: SecretName | None = None
    """Secret that gives access to a private image registry."""
    head: HeadConfig = HeadConfig()
    cpu_workers: WorkerGroupConfig = WorkerGroupConfig(min_workers=1)
    gpu_workers: WorkerGroupConfig = WorkerGroupConfig(gpus=1)
    idle_timeout_s: int = Field(default=300, ge=0)
    """Seconds without work after which a worker's pod is released."""
    stop_wait_s: int = Field(default=60, gt=0)
    """Seconds between SIGTERM and SIGKILL when a job is stopped (Ray's own default is 3)."""
    ray_token_secret: SecretName = "mae-ray-token"
    """Secret with the cluster's `auth_token`, which jobs and the dashboard require."""
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
        ClusterConfigError: The file is missing or not YAML, or a key is wrong or misspelt.
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
