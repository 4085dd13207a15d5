import pytest

from infra.cluster import ClusterConfig
from infra.pods import container, object_of, pod_spec, secret_env, values_env

CONFIG = ClusterConfig(name="lab", namespace="vision", image="mae:1")


def test_a_container_gets_what_it_may_use_and_no_rights() -> None:
    made = container("ray", "mae:1", 3, "5Gi")
    assert made["resources"]["requests"] == {"cpu": 3, "memory": "5Gi"}
    assert made["resources"]["limits"] == {"cpu": 3, "memory": "5Gi"}
    assert made["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


@pytest.mark.parametrize("user_id", [1000, 999])
def test_a_pod_runs_as_a_user_who_owns_its_volumes(user_id: int) -> None:
    security = pod_spec(CONFIG, {"name": "main"}, user_id)["securityContext"]
    assert security["runAsNonRoot"] is True
    assert [security[key] for key in ("runAsUser", "runAsGroup", "fsGroup")] == [user_id] * 3


def test_a_pod_pulls_with_a_secret_only_if_one_is_named() -> None:
    assert "imagePullSecrets" not in pod_spec(CONFIG, {})
    private = CONFIG.model_copy(update={"image_pull_secret": "pull"})
    assert pod_spec(private, {})["imagePullSecrets"] == [{"name": "pull"}]


def test_an_object_lies_in_the_namespace_and_belongs_to_the_cluster() -> None:
    made = object_of(CONFIG, "v1", "Service", "lab-mlflow", {"ports": []})
    assert (made["apiVersion"], made["kind"], made["spec"]) == ("v1", "Service", {"ports": []})
    assert made["metadata"] == {
        "name": "lab-mlflow",
        "namespace": "vision",
        "labels": {
            "app.kubernetes.io/name": "lab-mlflow",
            "app.kubernetes.io/part-of": "lab",
        },
    }


def test_a_secret_is_named_and_a_value_is_written() -> None:
    assert values_env({"A": "1"}) == [{"name": "A", "value": "1"}]
    assert secret_env("KEY", "mae-s3", "secret") == {
        "name": "KEY",
        "valueFrom": {"secretKeyRef": {"name": "mae-s3", "key": "secret"}},
    }
