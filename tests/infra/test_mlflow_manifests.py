from typing import Any

import pytest

from infra.cluster import ClusterConfig, ObjectStoreConfig
from infra.mlflow_manifests import mlflow_uri, render_mlflow

CONFIG = ClusterConfig(name="lab", namespace="vision", image="mae:1")


def rendered(config: ClusterConfig = CONFIG) -> dict[str, Any]:
    return {f"{x['kind']}/{x['metadata']['name']}": x for x in render_mlflow(config)}


def main_container(manifest: dict[str, Any]) -> dict[str, Any]:
    (found,) = manifest["spec"]["template"]["spec"]["containers"]
    return dict(found)


def variables(manifest: dict[str, Any]) -> dict[str, Any]:
    return {x["name"]: x.get("value", x.get("valueFrom")) for x in main_container(manifest)["env"]}


def test_stages_find_the_server_by_its_service() -> None:
    assert mlflow_uri(CONFIG) == "http://lab-mlflow.vision.svc:5000"
    service = rendered()["Service/lab-mlflow"]["spec"]
    assert service["ports"] == [{"port": 5000}]
    pod = rendered()["Deployment/lab-mlflow"]["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= pod.items()


def test_the_server_answers_under_each_name_of_its_service() -> None:
    command = main_container(rendered()["Deployment/lab-mlflow"])["command"]
    (hosts,) = (x.removeprefix("--allowed-hosts=") for x in command if "--allowed-hosts" in x)
    assert hosts.split(",") == [
        "lab-mlflow:5000",
        "lab-mlflow.vision:5000",
        "lab-mlflow.vision.svc:5000",
        "localhost:*",
        "127.0.0.1:*",
    ]


def test_no_two_servers_change_the_tables_at_once() -> None:
    spec = rendered()["Deployment/lab-mlflow"]["spec"]
    assert (spec["replicas"], spec["strategy"]) == (1, {"type": "Recreate"})


def test_the_password_of_the_database_is_a_secret_in_both_pods() -> None:
    reference = {"secretKeyRef": {"name": "mae-postgres", "key": "password"}}
    assert variables(rendered()["Deployment/lab-mlflow"])["PGPASSWORD"] == reference
    assert variables(rendered()["StatefulSet/lab-postgres"])["POSTGRES_PASSWORD"] == reference
    command = main_container(rendered()["Deployment/lab-mlflow"])["command"]
    assert "--backend-store-uri=postgresql+psycopg2://mlflow@lab-postgres:5432/mlflow" in command


def test_the_database_keeps_its_files_below_its_disk() -> None:
    postgres = rendered()["StatefulSet/lab-postgres"]
    (mount,) = main_container(postgres)["volumeMounts"]
    assert variables(postgres)["PGDATA"] == f"{mount['mountPath']}/pgdata"
    (claim,) = postgres["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == mount["name"]


@pytest.mark.parametrize("endpoint", [None, "http://store:8333"])
def test_the_server_asks_a_store_that_is_not_aws_only_if_one_is_given(endpoint: str | None) -> None:
    config = CONFIG.model_copy(update={"storage": ObjectStoreConfig(endpoint_url=endpoint)})
    found = variables(rendered(config)["Deployment/lab-mlflow"])
    assert found.get("MLFLOW_S3_ENDPOINT_URL") == endpoint
