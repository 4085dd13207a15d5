"""The common parts of all pods: no root, no privileges, limited CPU and memory."""

from collections.abc import Mapping
from typing import Any

from infra.cluster import ClusterConfig

Manifest = dict[str, Any]

# Id of the user `mae` of infra/docker/Dockerfile.
USER_ID = 1000


def object_of(
    config: ClusterConfig, api_version: str, kind: str, name: str, spec: Manifest
) -> Manifest:
    """Build a Kubernetes object in the cluster's namespace."""
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": config.name}
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": name, "namespace": config.namespace, "labels": labels},
        "spec": spec,
    }


def pod_spec(config: ClusterConfig, main: Manifest, user_id: int = USER_ID) -> Manifest:
    """Build a pod of one container that runs as `user_id`, who also owns the pod's volumes."""
    spec: Manifest = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user_id,
            "runAsGroup": user_id,
            "fsGroup": user_id,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # Otherwise each Service adds variables to each pod, with names that programs may read.
        "enableServiceLinks": False,
        "containers": [main],
    }
    if config.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": config.image_pull_secret}]
    return spec


def container(name: str, image: str, cpus: int, memory: str) -> Manifest:
    """Build a container whose requests equal its limits: Ray counts resources by the limits."""
    return {
        "name": name,
        "image": image,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "resources": {
            "requests": {"cpu": cpus, "memory": memory},
            "limits": {"cpu": cpus, "memory": memory},
        },
    }


def values_env(values: Mapping[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in values.items()]


def secret_env(name: str, secret: str, key: str) -> Manifest:
    """Define a variable whose value Kubernetes takes from a Secret when the pod starts."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
