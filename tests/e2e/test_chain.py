"""`mae run` with processes: what is made once, what is made again, what goes on after a kill.

The stages are files of the test's own, so that a pipeline of four takes seconds.
"""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient

from pipelines import cli
from tests.e2e.planted_password import PLANTED, watched

ROOT = Path(__file__).parents[2]
NAMES = {1: "a", 10: "b", 100: "c", 1000: "d"}

# Appends a line to LOG at each start; `behave` is read anew at each, so that a test can change it.
STAGE = '''
"""Write a number, plus those of the stages before."""
import json
import os
import time
from pathlib import Path

from infra.storage import StorageError
from mae_core.config import StrictConfig
from mae_core.data.samples import DataError
from pipelines.outcome import StageResult


class Config(StrictConfig):
    name: str = ""
    folder: str = "{self}"
    number: int = 1
    before: tuple[str, ...] = ()
    log: str = ""


UNKEYED = ("name", "log")


def run(config: Config, *, fresh: bool) -> StageResult:
    with Path(config.log, "log").open("a") as log:
        log.write(f"{config.name}\\n")
    behave = Path(config.log, f"{config.name}.behave")
    how = behave.read_text() if behave.exists() else ""
    out = Path(config.folder) / "out"
    out.mkdir(parents=True, exist_ok=True)
    if how == "data":
        raise DataError("bad data")
    if how == "store":
        behave.unlink()
        raise StorageError("cannot read s3://x: NETWORK_CONNECTION")
    if how == "memory":
        from ray.exceptions import OutOfMemoryError
        behave.unlink()
        raise OutOfMemoryError("a worker was killed\\nand 700 lines more")
    if how == "die":
        behave.unlink()
        os.kill(os.getpid(), 9)
    if how == "slow" and not (out / "half").exists():
        (out / "half").write_text("half")
        time.sleep(60)
    if how == "nan":
        return StageResult("add", "done", None, str(out), {"total": float("nan"), "fine": 1.0})
    if how == "odd":
        return StageResult("add", "done", None, str(out), {"total": "many"})
    total = config.number + sum(int(Path(b, "n").read_text()) for b in config.before)
    (out / "n").write_text(str(total))
    return StageResult("add", "done", None, str(out), {"total": total})
'''


@pytest.fixture(autouse=True)
def _info_is_heard() -> Iterator[None]:
    before = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    yield
    logging.getLogger().setLevel(before)


@pytest.fixture
def chain(tmp_path: Path, store_uri: str) -> Path:
    """a -> b -> d, a -> c -> d."""
    stage = tmp_path / "add.py"
    stage.write_text(STAGE)

    def spec(number: int, *before: str) -> dict[str, Any]:
        values = {
            "name": NAMES[number],
            "number": number,
            "before": [f"{{{b}}}" for b in before],
            "log": str(tmp_path),
        }
        return {"stage": str(stage), "set": values}

    file = tmp_path / "chain.yaml"
    stages = {"a": spec(1), "b": spec(10, "a"), "c": spec(100, "a"), "d": spec(1000, "b", "c")}
    track = {"uri": store_uri}
    root = {"root": str(tmp_path / "runs")}
    file.write_text(
        yaml.safe_dump({"name": "sums", "stages": stages, "tracking": track, "storage": root})
    )
    return file


def start(chain: Path, *words: str, command: str = "run") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", command, str(chain), *words],
        cwd=chain.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(chain: Path, *words: str, exit_code: int = 0) -> dict[str, Any]:
    """In this process, which has MLflow loaded: a run costs a second instead of five."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    logging.getLogger().addHandler(handler)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(["run", str(chain), *words])
    finally:
        logging.getLogger().removeHandler(handler)
    assert code == exit_code, err.getvalue()
    lines = out.getvalue().splitlines()
    return {**(json.loads(lines[-1]) if lines else {}), "stderr": err.getvalue()}


def log(chain: Path) -> list[str]:
    """Names of the stages that were started since the last look."""
    file = chain.parent / "log"
    lines = file.read_text().split() if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def behave(chain: Path, stage: str, how: str) -> None:
    (chain.parent / f"{stage}.behave").write_text(how)


def outputs(chain: Path) -> dict[str, int]:
    return {str(f): int(f.read_text()) for f in chain.parent.glob("runs/stages/add/*/out/n")}


def test_a_pipeline_runs_once_and_again_only_what_changed(chain: Path) -> None:
    first = run(chain)
    assert first["status"] == "done"
    assert set(first["stages"].values()) == {"done"}
    order = log(chain)
    assert sorted(order) == ["a", "b", "c", "d"]
    assert (order[0], order[-1]) == ("a", "d")
    assert sorted(outputs(chain).values()) == [1, 11, 101, 1112]

    again = run(chain)
    assert again["status"] == "reused"
    assert log(chain) == []

    changed = run(chain, "c.number=200")
    assert sorted(log(chain)) == ["c", "d"]
    assert changed["stages"] == {"a": "reused", "b": "reused", "c": "done", "d": "done"}
    assert 1212 in outputs(chain).values()

    # Back to what was there: nothing to do.
    assert run(chain)["status"] == "reused"
    assert log(chain) == []
    # A comment in the stage's code, and other resources, are no change; its code is one.
    stage = chain.parent / "add.py"
    stage.write_text(STAGE + "\n# a comment\n")
    chain.write_text(chain.read_text() + "\n")
    assert run(chain)["status"] == "reused"
    stage.write_text(STAGE.replace("config.number + sum", "config.number - 0 + sum"))
    assert sorted(run(chain)["stages"].values()) == ["done"] * 4


def test_a_deleted_output_is_made_again_and_the_plan_says_why(chain: Path) -> None:
    run(chain)
    log(chain)
    gone = next(Path(f) for f, n in outputs(chain).items() if n == 11)
    gone.unlink()
    out, _ = start(chain, command="plan").communicate(timeout=60)
    assert "output changed: out/n is gone" in out
    assert log(chain) == [], "a plan runs nothing"
    found = run(chain)
    assert found["stages"] == {"a": "reused", "b": "done", "c": "reused", "d": "reused"}
    assert log(chain) == ["b"]
    assert gone.read_text() == "11"


def test_a_failed_stage_reruns_alone_with_what_it_blocked(chain: Path) -> None:
    behave(chain, "b", "data")
    failed = run(chain, exit_code=4)
    assert failed["status"] == "failed"
    assert failed["stages"] == {"a": "done", "b": "failed", "c": "done", "d": "blocked"}
    assert "bad data" in failed["stderr"]
    assert sorted(log(chain)) == ["a", "b", "c"], "what can't pass is not tried again"
    page = Path(failed["output"], "report.html").read_text()
    assert "bad data" in page
    (chain.parent / "b.behave").unlink()
    assert run(chain)["stages"] == {"a": "reused", "b": "done", "c": "reused", "d": "done"}
    assert sorted(log(chain)) == ["b", "d"]


@pytest.mark.parametrize("how", ["store", "die", "memory"])
def test_what_may_pass_is_tried_again(chain: Path, how: str) -> None:
    behave(chain, "a", how)
    assert run(chain)["stages"]["a"] == "done"
    assert log(chain)[:2] == ["a", "a"]


def test_a_metric_that_is_no_number_costs_its_stage_alone(chain: Path) -> None:
    behave(chain, "b", "odd")
    failed = run(chain, exit_code=1)
    assert failed["stages"] == {"a": "done", "b": "failed", "c": "done", "d": "blocked"}
    behave(chain, "c", "nan")
    assert run(chain, "c.number=200", exit_code=1)["stages"]["c"] == "done"


def test_only_a_stage_runs_though_one_it_waits_for_is_not_there(chain: Path) -> None:
    fields = yaml.safe_load(chain.read_text())
    gate = {"stage": fields["stages"]["a"]["stage"], "set": {"name": "gate", "number": 5}}
    gate["set"]["log"] = str(chain.parent)
    fields["stages"] = {"gate": gate, **fields["stages"]}
    fields["stages"]["a"]["needs"] = ["gate"]
    chain.write_text(yaml.safe_dump(fields))
    assert run(chain, "--only", "a")["stages"] == {"a": "done"}
    assert log(chain) == ["a"]


def test_a_forced_stage_that_is_tried_again_goes_on(chain: Path) -> None:
    run(chain)
    log(chain)
    behave(chain, "a", "store")  # fails once, and may pass
    place = next(Path(f).parent for f, n in outputs(chain).items() if n == 1)
    (place / "old").write_text("x")
    assert run(chain, "--force", "a")["stages"]["a"] == "done"
    assert log(chain) == ["a", "a"]
    assert not (place / "old").exists()


def test_trouble_with_promotion_costs_no_stage_and_no_report(chain: Path) -> None:
    words = ["promote={model: m, stage: a, metric: d/nothing}"]
    found = run(chain, *words, exit_code=2)
    assert set(found["stages"].values()) == {"done"}
    assert "d is not measured on any data" in Path(found["output"], "report.html").read_text()
    assert mlflow_runs(chain)["sums"] == "FAILED"


def wait_for(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def wait_until_half(chain: Path) -> None:
    wait_for(lambda: list(chain.parent.glob("runs/stages/add/*/out/half")), "stage did not start")


def mlflow_runs(chain: Path) -> dict[str, str]:
    """Status by name, the pipeline's own as `sums`, which is how its name ends."""
    client = MlflowClient(f"sqlite:///{chain.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    return {run.info.run_name.split()[-1]: run.info.status for run in runs}


def stage_processes(chain: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "stage" in words and str(chain.parent / "add.py") in words:
            found.append(process)
    return found


def test_a_killed_pipeline_goes_on_where_it_was(chain: Path) -> None:
    behave(chain, "c", "slow")
    process = start(chain)
    wait_until_half(chain)
    done = "runs/stages/add/*/done.json"
    wait_for(lambda: len(list(chain.parent.glob(done))) == 2, "b's result was not committed")
    process.kill()
    process.communicate()
    # Its stages end with it.
    wait_for(lambda: not stage_processes(chain), "a stage outlived its pipeline")
    log(chain)
    again = run(chain)
    assert again["stages"] == {"a": "reused", "b": "reused", "c": "done", "d": "done"}
    assert log(chain) == ["c", "d"]
    assert "continues the run" in again["stderr"]
    assert len(list((chain.parent / "runs/pipelines/sums").glob("*/run.json"))) == 1
    assert set(mlflow_runs(chain).values()) == {"FINISHED"}


def test_what_a_killed_pipeline_left_running_is_swept(chain: Path) -> None:
    behave(chain, "a", "slow")
    process = start(chain)
    wait_until_half(chain)
    process.kill()
    process.communicate()
    assert mlflow_runs(chain)["sums"] == "RUNNING"
    (chain.parent / "a.behave").unlink()
    assert run(chain, "d.number=2000")["status"] == "done", "something else than what was cut off"
    client = MlflowClient(f"sqlite:///{chain.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    parents = [
        found.info.status
        for found in client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])
        if found.info.run_name.endswith(" sums")
    ]
    assert parents == ["KILLED", "FINISHED"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_pipeline_is_marked_killed_and_leaves_no_stage(
    chain: Path, number: signal.Signals, code: int
) -> None:
    behave(chain, "a", "slow")
    process = start(chain)
    wait_until_half(chain)
    process.send_signal(number)
    _, err = process.communicate(timeout=90)
    assert process.returncode == code, err
    assert not stage_processes(chain)
    assert mlflow_runs(chain)["sums"] == "KILLED"
    assert run(chain)["status"] == "done"
    assert mlflow_runs(chain)["sums"] == "FINISHED"


def test_two_runs_of_a_pipeline_do_not_meet(chain: Path) -> None:
    behave(chain, "a", "slow")
    process = start(chain)
    wait_until_half(chain)
    second = run(chain, exit_code=5)
    assert "pipeline sums is at work here" in second["stderr"]
    process.terminate()
    process.communicate(timeout=90)


def test_two_pipelines_make_what_they_share_once(chain: Path) -> None:
    behave(chain, "a", "slow")
    other = chain.parent / "other.yaml"
    fields = yaml.safe_load(chain.read_text())
    other.write_text(yaml.safe_dump({**fields, "name": "other"}))
    # Slow only until its half is there: the test lets the first end after the second waits.
    first = start(chain)
    wait_until_half(chain)
    second = start(other)
    assert second.stderr is not None
    seen = ""
    while "a: waits" not in seen:
        line = second.stderr.readline()
        assert line, seen
        seen += line
    first.send_signal(signal.SIGTERM)  # gives the lease back
    first.communicate(timeout=90)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 0, seen + err
    assert log(chain)[:2] == ["a", "a"]
    assert run(chain)["status"] == "reused"


def test_the_record_has_one_level_and_links_what_was_reused(chain: Path) -> None:
    first = run(chain)
    second = run(chain, "d.number=2000")
    client = MlflowClient(f"sqlite:///{chain.parent}/mlflow.db")
    experiment = client.get_experiment_by_name("sums")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = {run.info.run_id: run.data.tags.get("mlflow.parentRunId") for run in runs}
    assert sum(parent is None for parent in parents.values()) == 2
    children = [run_id for run_id, parent in parents.items() if parent == first["run_id"]]
    assert len(children) == 4
    assert sum(parent == second["run_id"] for parent in parents.values()) == 1
    tags = client.get_run(second["run_id"]).data.tags
    assert tags["reused.a"] in children
    assert f"/runs/{tags['reused.a']}?" in tags["mlflow.note.content"]
    assert "config number 1000 -> 2000" in tags["mlflow.note.content"]
    files = {f.path for f in client.list_artifacts(second["run_id"])}
    assert {"graph.mmd", "plan.txt", "report.html"} <= files


def test_a_sweep_runs_what_it_changes_once_a_point(chain: Path) -> None:
    found = run(chain, "--sweep", "b.number=20,30")
    assert found["stages"] == dict.fromkeys(
        ["a", "c", "b@number=20", "b@number=30", "d@number=20", "d@number=30"], "done"
    )
    assert sorted(outputs(chain).values()) == [1, 21, 31, 101, 1122, 1132]
    # A point of it is what the value alone would give.
    log(chain)
    assert run(chain, "b.number=30")["status"] == "reused"


def test_mistakes_cost_exit_code_2_and_run_nothing(chain: Path) -> None:
    assert "no stage 'x'" in run(chain, "--force", "x", exit_code=2)["stderr"]
    assert "nmber" in run(chain, "a.nmber=1", exit_code=2)["stderr"]
    assert log(chain) == []


DEMO_WORDS = (
    "prepare.num_train=64",
    "prepare.num_val=32",
    "prepare.samples_per_shard=32",
    "pretrain.optim.max_steps=2",
    "classify.optim.max_steps=1",
    "classify.classify.arms=[logistic]",
    "detect.optim.max_steps=1",
    "detect.detect.arms=[finetune]",
    "detect.detect.seeds=[0]",
    "segment.optim.max_steps=1",
    "segment.segment.arms=[finetune]",
    "segment.segment.seeds=[0]",
)


def run_demo(folder: Path, command: str, *words: str) -> str:
    """Run the README's pipeline as a command that has nothing but a PATH and a home."""
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    demo = str(ROOT / "configs/chain/demo.yaml")
    process = subprocess.run(
        [sys.executable, "-P", "-m", "pipelines.cli", command, demo, *DEMO_WORDS, *words],
        cwd=folder,
        env={
            "PATH": os.defpath,
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": str(folder.parent),
            "MLFLOW_TRACKING_PASSWORD": PLANTED,
        },
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert PLANTED not in process.stdout + process.stderr
    assert "restart will fail" not in process.stderr, "a warning of Ray's that no user can act on"
    return process.stdout


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder whose path leaves room for the names of Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="m", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.ray
@pytest.mark.slow
def test_the_demo_makes_a_champion_in_an_empty_environment_and_again_reuses_all(
    short_folder: Path,
) -> None:
    folder = short_folder / "elsewhere"
    folder.mkdir()
    with watched(short_folder) as found:
        assert json.loads(run_demo(folder, "run").splitlines()[-1])["status"] == "done"
    assert found == set()
    assert [path.name for path in folder.iterdir()] == ["runs"]
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    assert int(client.get_model_version_by_alias("mae-demo", "champion").version) == 1

    assert json.loads(run_demo(folder, "run").splitlines()[-1])["status"] == "reused"
    assert [path.name for path in folder.iterdir()] == ["runs"]

    plan = run_demo(folder, "plan", "--set", "segment.optim.max_steps=2")
    rows = [line.split()[:2] for line in plan.splitlines()]
    actions = {row[0]: row[1] for row in rows if row[1:] in (["run"], ["reuse"])}
    assert actions == {
        **dict.fromkeys(["prepare", "validate", "pretrain", "classify", "detect"], "reuse"),
        "segment": "run",
    }
