"""The parts that all pods are made of: no root, no privileges, bounded CPU and memory."""

from collections.abc import Mapping
from typing import Any

from infra.cluster import ClusterConfig

Manifest = dict[str, Any]

# The user `mae` of infra/docker/Dockerfile.
USER_ID = 1000


def object_of(
    config: ClusterConfig, api_version: str, kind: str, name: str, spec: Manifest
) -> Manifest:
    """A Kubernetes object in the cluster's namespace."""
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/part-of": config.name}
    return {
        "apiVersion": api_version,
        "kind": kind,
        "metadata": {"name": name, "namespace": config.namespace, "labels": labels},
        "spec": spec,
    }


def pod_spec(config: ClusterConfig, main: Manifest, user_id: int = USER_ID) -> Manifest:
    """A pod of one container that runs as `user_id`, who also owns the pod's volumes."""
    spec: Manifest = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user_id,
            "runAsGroup": user_id,
            "fsGroup": user_id,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        # Or each Service would put variables into each pod, with names that programs may read.
        "enableServiceLinks": False,
        "containers": [main],
    }
    if config.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": config.image_pull_secret}]
    return spec


def container(name: str, image: str, cpus: int, memory: str) -> Manifest:
    """What is asked for is what is given: Ray counts CPUs and memory by the limits."""
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
    """A variable whose value is a Secret's, put in by Kubernetes when the pod starts."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}
