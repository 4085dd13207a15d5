"""Check manifests against golden files, schemas, and rules that are in no schema.

Golden files show how a change affects the manifests. To rewrite them, review the difference and
commit it with the change:

    REWRITE_GOLDEN=1 python -m pytest tests/infra/test_kuberay.py -k golden
"""

import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import kuberay
from infra.cluster import RAY_VERSION, ClusterConfig, ClusterConfigError, load_cluster

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
EXAMPLE = ROOT / "configs/cluster/kuberay.yaml"
KUBERNETES_VERSION = "1.37"

Manifest = dict[str, Any]


def example_manifests() -> dict[str, list[Manifest]]:
    config = load_cluster(EXAMPLE)
    schedule = {"cron": "30 2 * * 1-5", "time_zone": "Europe/Berlin", "config": config}
    return {
        "platform": kuberay.render_platform(config),
        "ray_job": [kuberay.render_ray_job(config, "configs/chain/demo.yaml")],
        "cron_job": [
            kuberay.render_cron_job(
                "nightly", command=["mae", "schedule", "once", "--name", "nightly"], **schedule
            )
        ],
        "ray_cron_job": [
            kuberay.render_ray_cron_job(
                "nightly", command=["mae", "run", "configs/chain/demo.yaml"], **schedule
            )
        ],
    }


EXAMPLES = example_manifests()
each_example = pytest.mark.parametrize("name", EXAMPLES)


@each_example
def test_manifests_are_as_the_golden_files(name: str) -> None:
    file = GOLDEN / f"{name}.yaml"
    text = kuberay.dump(EXAMPLES[name])
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(text)
    golden = file.read_text()
    difference = difflib.unified_diff(golden.splitlines(), text.splitlines(), "golden", "rendered")
    assert golden == text, "\n".join(difference)


@each_example
def test_what_is_written_is_what_was_rendered(name: str) -> None:
    text = kuberay.dump(EXAMPLES[name])
    assert list(yaml.safe_load_all(text)) == EXAMPLES[name]
    assert not re.search(r"[&*]id\d", text)


@pytest.fixture(scope="session")
def ray_schemas(real_data: Path) -> dict[str, Manifest]:
    """Return KubeRay's schemas by kind, changed so that an unknown field is an error."""
    folder = real_data / "kuberay_crds"
    if not folder.is_dir():
        pytest.skip(f"{folder}: no such folder")
    schemas = {}
    for file in folder.glob("*.yaml"):
        definition = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)["spec"]
        [version] = [x for x in definition["versions"] if x["name"] == "v1"]
        assert version["served"]
        schemas[definition["names"]["kind"]] = strict(version["schema"]["openAPIV3Schema"])
    assert set(schemas) == {"RayCluster", "RayJob", "RayCronJob"}
    # The server knows it, and the definition says no more than that.
    for schema in schemas.values():
        schema["properties"]["metadata"] = {"type": "object"}
    return schemas


def strict(schema: Any) -> Any:
    """Make unknown fields errors, because Kubernetes silently drops them."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def check(manifest: Manifest, ray_schemas: dict[str, Manifest]) -> None:
    if manifest["kind"] in ray_schemas:
        jsonschema.Draft202012Validator(ray_schemas[manifest["kind"]]).validate(manifest)
        for pod in pods_of(manifest):
            check(pod_of_its_own(pod), {})
    else:
        used = kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
        assert used == KUBERNETES_VERSION


def pod_of_its_own(template: Manifest) -> Manifest:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": template["spec"]}


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield every value in a manifest with its path."""
    yield path, value
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield from walk(item, (*path, key))


def pods_of(manifest: Manifest) -> list[Manifest]:
    """Yield all pod templates in a manifest."""
    return [
        value
        for _, value in walk(manifest)
        if isinstance(value, dict) and "containers" in value.get("spec", {})
    ]


@pytest.mark.realdata
@each_example
def test_manifests_fit_the_schemas(name: str, ray_schemas: dict[str, Manifest]) -> None:
    for manifest in EXAMPLES[name]:
        check(manifest, ray_schemas)


def test_plain_kinds_fit_the_schemas() -> None:
    kinds = []
    for manifest in [*EXAMPLES["platform"], *EXAMPLES["cron_job"]]:
        if not manifest["apiVersion"].startswith("ray.io"):
            check(manifest, {})
            kinds.append(manifest["kind"])
    assert kinds == ["Namespace", "Service", "StatefulSet", "Service", "Deployment", "CronJob"]


@pytest.mark.realdata
@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "RayCronJob"])
def test_an_unknown_field_is_found_at_any_depth(
    kind: str, ray_schemas: dict[str, Manifest]
) -> None:
    """Test the check itself: it examines everything that it is given, except free maps."""
    [manifest] = [x for examples in EXAMPLES.values() for x in examples if x["kind"] == kind]
    validator = jsonschema.Draft202012Validator(ray_schemas[kind])
    free = ("labels", "rayStartParams", "limits", "requests", "metadata", "nodeSelector")
    num_places = 0
    for path, value in walk(manifest):
        if isinstance(value, dict) and not set(path) & set(free):
            value["unheardOf"] = 1
            with pytest.raises(jsonschema.ValidationError, match="unheardOf"):
                validator.validate(manifest)
            del value["unheardOf"]
            num_places += 1
    assert num_places > 50


PODS = [pod for examples in EXAMPLES.values() for manifest in examples for pod in pods_of(manifest)]


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod["spec"]["containers"][0]["name"])
def test_no_pod_is_root_or_becomes_it(pod: Manifest) -> None:
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["enableServiceLinks"]
    for container in spec["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert not container["image"].endswith(":latest")


def test_only_the_head_s_autoscaler_may_ask_kubernetes() -> None:
    may = {
        pod["spec"]["containers"][0]["name"]
        for pod in PODS
        if pod["spec"].get("automountServiceAccountToken", True)
    }
    assert may == {"ray-head"}


def test_ray_pods_keep_objects_in_memory() -> None:
    sizes = set()
    for pod in PODS:
        if pod["spec"]["containers"][0]["name"].startswith("ray-") and "volumes" in pod["spec"]:
            [volume] = pod["spec"]["volumes"]
            [mount] = pod["spec"]["containers"][0]["volumeMounts"]
            assert mount == {"name": volume["name"], "mountPath": "/dev/shm"}
            assert volume["emptyDir"]["medium"] == "Memory"
            sizes.add(volume["emptyDir"]["sizeLimit"])
    assert sizes == {"6553Mi", "13107Mi", "294912Mi"}


def test_services_find_their_pods() -> None:
    platform = EXAMPLES["platform"]
    labels = [
        pod["metadata"]["labels"]
        for manifest in platform
        for pod in pods_of(manifest)
        if "metadata" in pod
    ]
    services = [manifest for manifest in platform if manifest["kind"] == "Service"]
    assert [service["metadata"]["name"] for service in services] == ["mae-postgres", "mae-mlflow"]
    for service in services:
        assert labels.count(service["spec"]["selector"]) == 1


def test_stages_find_mlflow_where_its_service_is_and_it_lets_them_in() -> None:
    text = kuberay.dump(EXAMPLES["platform"])
    assert "http://mae-mlflow.mae.svc:5000" in text
    [hosts] = re.findall(r"--allowed-hosts=(\S+)", text)
    assert "mae-mlflow.mae.svc:5000" in hosts.split(",")


def test_a_job_has_time_to_end_where_ray_reads_it() -> None:
    """The process that stops a driver has the head's environment (tested with compose.yaml)."""
    for name in ("platform", "ray_job", "ray_cron_job"):
        heads = [
            pod["spec"]
            for manifest in EXAMPLES[name]
            for pod in pods_of(manifest)
            if pod["spec"]["containers"][0]["name"] == "ray-head"
        ]
        [head] = heads
        stop_wait = {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "60"}
        assert stop_wait in head["containers"][0]["env"]
        assert head["terminationGracePeriodSeconds"] == 90


def test_the_ray_version_is_the_one_in_the_lock() -> None:
    assert f"ray=={RAY_VERSION}" in (ROOT / "requirements.lock").read_text().splitlines()


def test_a_chain_is_run_by_its_command() -> None:
    [job] = EXAMPLES["ray_job"]
    assert job["metadata"]["name"] == "mae-demo"
    assert job["spec"]["entrypoint"] == "mae run configs/chain/demo.yaml"
    odd = kuberay.render_ray_job(load_cluster(EXAMPLE), "configs/chain/My chain_2.yaml")
    assert odd["metadata"]["name"] == "mae-my-chain-2"
    assert odd["spec"]["entrypoint"] == "mae run 'configs/chain/My chain_2.yaml'"


def make_cron_job(**changes: Any) -> Manifest:
    arguments: dict[str, Any] = {
        "cron": "0 2 * * *",
        "time_zone": "UTC",
        "command": ["true"],
        "config": load_cluster(EXAMPLE),
        **changes,
    }
    return kuberay.render_cron_job(arguments.pop("name", "nightly"), **arguments)


@pytest.mark.parametrize(
    ("overlap", "policy"), [("skip", "Forbid"), ("queue", "Forbid"), ("replace", "Replace")]
)
def test_overlap_is_kubernetes_policy(overlap: str, policy: str) -> None:
    assert make_cron_job(overlap=overlap)["spec"]["concurrencyPolicy"] == policy


@pytest.mark.parametrize(
    ("catch_up", "deadline_s"), [("none", 60), ("latest", 86_400), ("all", 86_400)]
)
def test_catch_up_is_how_late_a_tick_may_start(catch_up: str, deadline_s: int) -> None:
    assert make_cron_job(catch_up=catch_up)["spec"]["startingDeadlineSeconds"] == deadline_s


def test_a_paused_schedule_is_suspended() -> None:
    assert make_cron_job(suspend=True)["spec"]["suspend"] is True
    assert make_cron_job()["spec"]["suspend"] is False


def test_a_cron_job_submits_to_the_cluster_with_its_token() -> None:
    command = ["mae", "schedule", "once", "--name", "nightly"]
    pod = make_cron_job(command=command)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"] == command
    env = {variable["name"]: variable for variable in container["env"]}
    assert env["RAY_API_SERVER_ADDRESS"]["value"] == "http://mae-head-svc.mae.svc:8265"
    token = {"secretKeyRef": {"name": "mae-ray-token", "key": "auth_token"}}
    assert env["RAY_AUTH_TOKEN"]["valueFrom"] == token


@pytest.mark.parametrize("cron", ["0 2 * * *", "*/15 0-6,22 1 JAN,JUL MON-FRI", "0 0 ? * 0"])
def test_cron_lines_that_kubernetes_reads(cron: str) -> None:
    assert make_cron_job(cron=cron)["spec"]["schedule"] == cron


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("0 2 * *", "has 4 fields"),
        ("0 0 2 * * *", "has 6 fields"),
        ("0 2 L * *", "'L'"),
        ("0 2 * * 1#2", "'1#2'"),
        ("0 2 * * 5-7", "Sunday is 0"),
        ("TZ=UTC 0 2 * * *", "TZ=UTC"),
        ("@daily", "@daily"),
    ],
)
def test_cron_lines_that_kubernetes_would_refuse_are_refused_here(cron: str, message: str) -> None:
    with pytest.raises(ClusterConfigError, match=re.escape(message)):
        make_cron_job(cron=cron)


@pytest.mark.parametrize("name", ["Nightly", "night_ly", "-x", "1x", "x" * 53, "", "x\n"])
def test_names_that_kubernetes_would_refuse_are_refused_here(name: str) -> None:
    with pytest.raises(ClusterConfigError, match="is not a Kubernetes name"):
        make_cron_job(name=name)


names = st.from_regex(r"[a-z]([-a-z0-9]{0,22}[a-z0-9])?", fullmatch=True)
groups = st.tuples(st.integers(0, 50), st.integers(0, 50)).map(
    lambda ends: {"min_workers": min(ends), "max_workers": max(ends)}
)
configs = st.builds(
    lambda name, namespace, cpu, gpu, gpus, selector, pull: ClusterConfig.model_validate(
        {
            "name": name,
            "namespace": namespace,
            "image": "mae-pipeline:0.1.0",
            "cpu_workers": cpu,
            "gpu_workers": {**gpu, "gpus": gpus, "node_selector": selector},
            "image_pull_secret": pull,
        }
    ),
    names,
    names,
    groups,
    groups,
    st.integers(1, 8),
    st.dictionaries(st.just("accelerator"), st.just("h100")),
    st.none() | names,
)


def all_of(config: ClusterConfig) -> list[Manifest]:
    return [
        *kuberay.render_platform(config),
        kuberay.render_ray_job(config, "configs/chain/demo.yaml"),
        make_cron_job(config=config),
    ]


@settings(max_examples=50)
@given(config=configs)
def test_every_name_is_a_dns_1123_label(config: ClusterConfig) -> None:
    for manifest in all_of(config):
        for path, value in walk(manifest):
            if path[-1:] == ("name",) and ("env" not in path):
                assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", value)


@settings(max_examples=50)
@given(config=configs, num_workers=st.integers(50, 99))
def test_more_gpu_workers_change_one_field_of_each_cluster(
    config: ClusterConfig, num_workers: int
) -> None:
    gpu_workers = config.gpu_workers.model_copy(update={"max_workers": num_workers})
    before, after = all_of(config), all_of(config.model_copy(update={"gpu_workers": gpu_workers}))
    changed = {
        path: new
        for (path, old), (_, new) in zip(walk(before), walk(after), strict=True)
        if old != new and not isinstance(new, dict | list)
    }
    if config.gpu_workers.max_workers == num_workers:
        assert changed == {}
    else:
        assert {path[-3:] for path in changed} == {("workerGroupSpecs", 1, "maxReplicas")}
        assert list(changed.values()) == [num_workers, num_workers]


@settings(max_examples=50)
@given(config=configs)
def test_secrets_are_only_named(config: ClusterConfig) -> None:
    """Test that no config field holds a secret, and that variables named like one use a Secret."""
    for manifest in all_of(config):
        assert manifest["kind"] != "Secret"
        for _, value in walk(manifest):
            if isinstance(value, dict) and re.search(
                "KEY|PASSWORD|TOKEN|SECRET", str(value.get("name"))
            ):
                assert set(value) == {"name", "valueFrom"}
                assert set(value["valueFrom"]) == {"secretKeyRef"}


def test_secrets_of_this_shell_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "PGPASSWORD")
    for name in names:
        monkeypatch.setenv(name, "s3cr3t")
    assert example_manifests() == EXAMPLES
    assert "s3cr3t" not in json.dumps(EXAMPLES)


@pytest.mark.realdata
def test_any_config_fits_the_schemas(ray_schemas: dict[str, Manifest]) -> None:
    smallest = ClusterConfig(image="mae-pipeline:0.1.0")
    fullest = load_cluster(EXAMPLE).model_copy(update={"image_pull_secret": "pull"})
    gpu_workers = fullest.gpu_workers.model_copy(update={"node_selector": {"gpu": "h100"}})
    fullest = fullest.model_copy(update={"gpu_workers": gpu_workers})
    for config in (smallest, fullest):
        for manifest in all_of(config):
            check(manifest, ray_schemas)


def test_a_wrong_config_prints_no_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("image: mae:latest")
    assert kuberay.main(["render", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {file} image: ")


def test_render_prints_the_platform(capsys: pytest.CaptureFixture[str]) -> None:
    assert kuberay.main(["render", str(EXAMPLE)]) == 0
    assert capsys.readouterr().out == (GOLDEN / "platform.yaml").read_text()


def test_render_writes_a_chain_s_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chain = Path("configs/chain/demo.yaml")
    assert kuberay.main(["render", str(EXAMPLE), "--chain", str(chain), "--out", "made"]) == 2
    chain.parent.mkdir(parents=True)
    chain.touch()
    assert kuberay.main(["render", str(EXAMPLE), "--chain", str(chain), "--out", "made"]) == 0
    assert capsys.readouterr().out == "made/mae-demo.yaml\n"
    assert Path("made/mae-demo.yaml").read_text() == (GOLDEN / "ray_job.yaml").read_text()
