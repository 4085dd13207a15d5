"""Render a cluster config as Kubernetes manifests: Ray, MLflow with PostgreSQL, jobs, schedules.

    python -m infra.kuberay render configs/cluster/kuberay.yaml [--chain FILE] [--out FOLDER]

The same config always gives the same text. Sources for what KubeRay v1.7 accepts: its custom
resource definitions, and the checks of its operator that are in no schema
(github.com/ray-project/kuberay, ray-operator/controllers/ray/utils/validation.go).
"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Literal

import yaml

from infra.cluster import (
    RAY_VERSION,
    ClusterConfig,
    ClusterConfigError,
    WorkerGroupConfig,
    load_cluster,
)
from infra.mlflow_manifests import mlflow_uri, render_mlflow
from infra.pods import Manifest, container, object_of, pod_spec, secret_env, values_env

Overlap = Literal["skip", "queue", "replace"]
CatchUp = Literal["none", "latest", "all"]

# The operator appends 6 characters to a RayJob's name to name its cluster, which may have 53. A
# RayCronJob appends "-" and the tick's minute, 8 digits, to its own name.
MAX_RAY_JOB_NAME = 47
MAX_RAY_CRON_JOB_NAME = MAX_RAY_JOB_NAME - 9
# Kubernetes appends "-" and 10 digits to name the Job, which may have 63 characters.
MAX_CRON_JOB_NAME = 52

# Share of a pod's memory for /dev/shm. Ray keeps its objects there, in 30 % of the memory.
SHM_SHARE = 0.4
# Seconds that a pod has to stop, beyond the job's own grace period.
TERMINATION_MARGIN_S = 30

# Kubernetes sees only the submitting pod. It runs one after another for "queue" and "skip" alike;
# the command decides what happens to a tick whose predecessor still runs on Ray.
CONCURRENCY_POLICY: dict[Overlap, str] = {"skip": "Forbid", "queue": "Forbid", "replace": "Replace"}
# Kubernetes starts the latest missed tick if it is not older than this; with "all" the command
# makes up for earlier ones. There must be a limit: Kubernetes gives up after 100 missed ticks.
STARTING_DEADLINE_S: dict[CatchUp, int] = {"none": 60, "latest": 86_400, "all": 86_400}


def render_platform(config: ClusterConfig) -> list[Manifest]:
    """Render what stays: namespace, MLflow with its database, a Ray cluster that accepts jobs."""
    labels = {
        # kubectl warns about pods that violate the "restricted" policy.
        "pod-security.kubernetes.io/enforce": "baseline",
        "pod-security.kubernetes.io/warn": "restricted",
    }
    namespace = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": config.namespace, "labels": labels},
    }
    cluster = object_of(config, "ray.io/v1", "RayCluster", config.name, _cluster_spec(config))
    return [namespace, *render_mlflow(config), cluster]


def render_ray_job(config: ClusterConfig, chain: str) -> Manifest:
    """Render a chain on its own cluster, which is removed when the chain is done.

    Args:
        config: Also sets how large the cluster may grow.
        chain: Path of the chain's file in the image.
    """
    stem = re.sub(r"[^a-z0-9]+", "-", Path(chain).stem.lower()).strip("-")
    name = _checked_name(f"{config.name}-{stem}", MAX_RAY_JOB_NAME)
    spec = _job_spec(config, ["mae", "run", chain])
    return object_of(config, "ray.io/v1", "RayJob", name, spec)


def render_cron_job(
    name: str,
    *,
    cron: str,
    time_zone: str,
    command: list[str],
    config: ClusterConfig,
    overlap: Overlap = "skip",
    catch_up: CatchUp = "latest",
    suspend: bool = False,
) -> Manifest:
    """Render a CronJob: at each tick a pod runs `command`, which submits a job to Ray.

    Kubernetes may, rarely, start a tick twice: the command must derive its job's id from the tick.
    """
    _check_cron(cron)
    ray = {
        "RAY_API_SERVER_ADDRESS": _head_address(config),
        "RAY_AUTH_MODE": "token",
    }
    env = [
        *_env(config),
        *values_env(ray),
        secret_env("RAY_AUTH_TOKEN", config.ray_token_secret, "auth_token"),
    ]
    submit = {"command": command, "env": env, "envFrom": _object_store_keys(config)}
    spec = {
        "schedule": cron,
        "timeZone": time_zone,
        "concurrencyPolicy": CONCURRENCY_POLICY[overlap],
        "startingDeadlineSeconds": STARTING_DEADLINE_S[catch_up],
        "suspend": suspend,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"spec": {"backoffLimit": 2, "template": _submitter_pod(config, submit)}},
    }
    checked = _checked_name(name, MAX_CRON_JOB_NAME)
    return object_of(config, "batch/v1", "CronJob", checked, spec)


def render_ray_cron_job(
    name: str,
    *,
    cron: str,
    time_zone: str,
    command: list[str],
    config: ClusterConfig,
    suspend: bool = False,
) -> Manifest:
    """Render a RayCronJob: at each tick `command` runs on its own Ray cluster.

    This is alpha in KubeRay 1.7, behind the feature gate RayCronJob, and has no rules for overlap
    or catch-up: runs may overlap, and all ticks missed while suspended start when it is resumed.
    """
    _check_cron(cron)
    spec = {
        "schedule": cron,
        "timeZone": time_zone,
        "suspend": suspend,
        "jobTemplate": _job_spec(config, command),
    }
    checked = _checked_name(name, MAX_RAY_CRON_JOB_NAME)
    return object_of(config, "ray.io/v1", "RayCronJob", checked, spec)


def dump(manifests: list[Manifest]) -> str:
    """Write YAML without anchors, which kubectl understands but people find hard to read."""
    return yaml.dump_all(manifests, Dumper=_PlainDumper, sort_keys=False, width=100)


class _PlainDumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _cluster_spec(config: ClusterConfig) -> Manifest:
    head = _ray_container(config, "ray-head", config.head.cpus, config.head.memory_gib)
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    head["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    return {
        "rayVersion": RAY_VERSION,
        "authOptions": {"mode": "token", "secretName": config.ray_token_secret},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": config.idle_timeout_s,
            "securityContext": head["securityContext"],
        },
        "headGroupSpec": {
            # Drivers only: a task would take the memory that they and Ray's tables need.
            "rayStartParams": {"num-cpus": "0"},
            "template": {"spec": _ray_pod(config, head, config.head.memory_gib)},
        },
        "workerGroupSpecs": [
            _worker_group(config, "cpu", config.cpu_workers),
            _worker_group(config, "gpu", config.gpu_workers),
        ],
    }


def _worker_group(config: ClusterConfig, name: str, group: WorkerGroupConfig) -> Manifest:
    worker = _ray_container(config, "ray-worker", group.cpus, group.memory_gib)
    pod = _ray_pod(config, worker, group.memory_gib) | {"automountServiceAccountToken": False}
    if group.node_selector:
        pod["nodeSelector"] = group.node_selector
    if group.gpus:
        for amounts in worker["resources"].values():
            amounts["nvidia.com/gpu"] = group.gpus
        # This taint often keeps other pods off GPU nodes.
        pod["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    return {
        "groupName": name,
        "replicas": group.min_workers,
        "minReplicas": group.min_workers,
        "maxReplicas": group.max_workers,
        "rayStartParams": {},
        "template": {"spec": pod},
    }


def _ray_container(config: ClusterConfig, name: str, cpus: int, memory_gib: int) -> Manifest:
    return container(name, config.image, cpus, f"{memory_gib}Gi") | {
        "env": _env(config),
        "envFrom": _object_store_keys(config),
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }


def _ray_pod(config: ClusterConfig, ray: Manifest, memory_gib: int) -> Manifest:
    # The runtime's default /dev/shm has 64 MB, so Ray would keep its objects on disk.
    shm = {"medium": "Memory", "sizeLimit": f"{int(memory_gib * 1024 * SHM_SHARE)}Mi"}
    return pod_spec(config, ray) | {
        # A restarted pod would be a new Ray node under the old node's name.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": config.stop_wait_s + TERMINATION_MARGIN_S,
        "volumes": [{"name": "shm", "emptyDir": shm}],
    }


def _job_spec(config: ClusterConfig, command: list[str]) -> Manifest:
    return {
        "entrypoint": shlex.join(command),
        "submissionMode": "K8sJobMode",
        "backoffLimit": config.job.retries,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": config.job.keep_s,
        "submitterPodTemplate": _submitter_pod(config, {}),
        "rayClusterSpec": _cluster_spec(config),
    }


def _submitter_pod(config: ClusterConfig, main: Manifest) -> Manifest:
    submitter = container("ray-job-submitter", config.image, 1, "1Gi") | main
    return {
        "spec": {
            **pod_spec(config, submitter),
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
        }
    }


def _env(config: ClusterConfig) -> list[Manifest]:
    endpoint = config.storage.endpoint_url
    return values_env(
        {
            **({"AWS_ENDPOINT_URL": endpoint} if endpoint else {}),
            "AWS_REGION": config.storage.region,
            "AWS_DEFAULT_REGION": config.storage.region,
            "MAE__STORAGE__ROOT": config.storage.root,
            "MAE__TRACKING__URI": mlflow_uri(config),
            # Read by the process that supervises a job's driver, which has its node's environment.
            "RAY_JOB_STOP_WAIT_TIME_S": str(config.stop_wait_s),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
    )


def _object_store_keys(config: ClusterConfig) -> list[Manifest]:
    return [{"secretRef": {"name": config.storage.secret}}]


def _head_address(config: ClusterConfig) -> str:
    return f"http://{config.name}-head-svc.{config.namespace}.svc:8265"


def _checked_name(name: str, max_length: int) -> str:
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > max_length:
        raise ClusterConfigError(
            f"{name!r} is not a Kubernetes name: a-z, 0-9 and -, from a letter to a letter or"
            f" digit, at most {max_length} characters"
        )
    return name


def _check_cron(cron: str) -> None:
    """Raise a ClusterConfigError for cron syntax that only other cron implementations accept."""
    fields = cron.split()
    for field in fields:
        if not all(re.fullmatch(r"[*?]|\d+|[A-Za-z]{3}", x) for x in re.split("[,/-]", field)):
            raise ClusterConfigError(f"cron {cron!r}: Kubernetes does not accept {field!r}")
    if len(fields) != 5:
        raise ClusterConfigError(f"cron {cron!r}: has {len(fields)} fields, not 5")
    if re.search(r"(^|[,-])7", fields[4]):
        raise ClusterConfigError(f"cron {cron!r}: in Kubernetes Sunday is 0, not 7")


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.kuberay", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="print or write manifests")
    render.add_argument("cluster", type=Path, help="e.g. configs/cluster/kuberay.yaml")
    render.add_argument("--chain", type=Path, help="render only a RayJob that runs this chain")
    render.add_argument("--out", type=Path, help="folder to write to, instead of stdout")
    return parser.parse_args(arguments)


def _render_files(config: ClusterConfig, chain: Path | None) -> dict[str, list[Manifest]]:
    if chain is None:
        return {"platform.yaml": render_platform(config)}
    if chain.is_absolute() or not chain.is_file():
        raise ClusterConfigError(f"{chain}: not a file below the project's folder")
    job = render_ray_job(config, chain.as_posix())
    return {f"{job['metadata']['name']}.yaml": [job]}


def main(arguments: list[str] | None = None) -> int:
    parsed = _parse(arguments)
    try:
        files = _render_files(load_cluster(parsed.cluster), parsed.chain)
    except ClusterConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, manifests in files.items():
        if parsed.out is None:
            print(dump(manifests), end="")
        else:
            parsed.out.mkdir(parents=True, exist_ok=True)
            (parsed.out / name).write_text(dump(manifests))
            print(parsed.out / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
