"""`mae schedule render` writes what Kubernetes runs, or says what it cannot run."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipelines.outcome import ConfigError
from pipelines.schedule import command as schedule

CLUSTER = str(Path(__file__).parents[3] / "configs/cluster/kuberay.yaml")


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MAE__STORAGE__ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("name: demo\n")


def write(*entries: dict[str, Any]) -> None:
    full = [{"name": "nightly", "chain": "demo.yaml", **entry} for entry in entries]
    Path("s.yaml").write_text(yaml.safe_dump({"schedules": full}))


def render(*words: str) -> int:
    return schedule.command(["render", *words, "--cluster", CLUSTER, "--file", "s.yaml"])


def test_render_writes_what_kubernetes_runs(capsys: pytest.CaptureFixture[str]) -> None:
    watched = {"name": "watch", "new_data": {"path": "s3://data/in", "poll_s": 600}}
    berlin = {"cron": "30 2 * * *", "time_zone": "Europe/Berlin", "overlap": "replace"}
    write({**berlin, "enabled": False}, watched)
    assert render() == 0
    nightly, watch = yaml.safe_load_all(capsys.readouterr().out)
    for manifest in (nightly, watch):
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    assert (nightly["kind"], nightly["metadata"]["name"]) == ("CronJob", "nightly")
    spec = nightly["spec"]
    assert (spec["schedule"], spec["timeZone"]) == ("30 2 * * *", "Europe/Berlin")
    assert (spec["concurrencyPolicy"], spec["suspend"]) == ("Replace", True)
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    once_words = ["mae", "schedule", "once", "--name", "nightly", "--file", "s.yaml", "--wait"]
    assert container["command"] == once_words
    assert (watch["spec"]["schedule"], watch["spec"]["suspend"]) == ("*/10 * * * *", False)


def test_render_for_kuberay_runs_the_pipeline_itself(capsys: pytest.CaptureFixture[str]) -> None:
    write({"cron": "30 2 * * *", "words": ["a.b=1"]})
    assert render("--ray-cron-job") == 0
    (job,) = yaml.safe_load_all(capsys.readouterr().out)
    assert job["kind"] == "RayCronJob"
    assert job["spec"]["jobTemplate"]["entrypoint"] == "mae run demo.yaml a.b=1"


@pytest.mark.parametrize(
    ("words", "why"), [([], "a pod sees s3://"), (["--ray-cron-job"], "does not support new_data")]
)
def test_a_schedule_that_is_off_keeps_no_other_from_being_rendered(
    words: list[str],
    why: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    watched = {"name": "watch", "new_data": {"path": "in"}, "enabled": False}
    write({"cron": "30 2 * * *"}, watched)
    assert render(*words) == 0
    (manifest,) = yaml.safe_load_all(capsys.readouterr().out)
    assert manifest["metadata"]["name"] == "nightly"
    (told,) = caplog.messages
    assert told.startswith("watch is off and left out: ")
    assert why in told


@pytest.mark.parametrize(
    ("entry", "words", "message"),
    [
        ({"new_data": {"path": "in"}}, [], "a pod sees s3://bucket/prefix only"),
        ({"new_data": {"path": "s3://b/in"}}, ["--ray-cron-job"], "does not support new_data"),
        (
            {"cron": "1 1 * * *", "words": ["a={tick}"]},
            ["--ray-cron-job"],
            "does not support {tick}",
        ),
        ({"cron": "0 0 L * *"}, [], "Kubernetes does not accept"),
    ],
)
def test_what_kubernetes_can_not_do_is_told(
    entry: dict[str, Any], words: list[str], message: str
) -> None:
    write(entry)
    with pytest.raises(ConfigError) as caught:
        render(*words)
    assert message in str(caught.value)
