import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from infra import tracking
from infra.config import TrackingConfig
from infra.run_names import name_with_differences
from infra.tracking import MetricWriter, _StepEntry

DEAD_URI = "http://127.0.0.1:9"


@pytest.fixture(scope="session")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create one sqlite store for all tests, because creating its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/sub/mlflow.db"


@pytest.fixture
def run_id(uri: str) -> str:
    return make_run(uri)


def make_run(uri: str, run_id: str | None = None, **params: str) -> str:
    run_id = tracking.start_run(
        TrackingConfig(uri=uri, experiment="tests"),
        run_name="test",
        params=params,
        tags={"stage": "pretrain"},
        run_id=run_id,
    )
    assert run_id is not None
    return run_id


def history(uri: str, run_id: str, metric: str) -> list[tuple[int, float]]:
    points = MlflowClient(uri).get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in points)


def test_a_run_holds_its_name_params_and_tags(uri: str) -> None:
    params = {f"param.{i}": str(i) for i in range(250)}
    run = MlflowClient(uri).get_run(make_run(uri, **params))
    assert run.data.params == params
    assert run.data.tags["stage"] == "pretrain"
    assert run.info.run_name == "test"
    assert run.info.status == "RUNNING"


def test_an_experiment_opens_as_model_training_also_one_that_was_there(uri: str) -> None:
    client = MlflowClient(uri)
    old = client.create_experiment("old")
    for name in ("old", "new"):
        config = TrackingConfig(uri=uri, experiment=name)
        tracking.start_run(config, run_name="r", params={}, tags={}, run_id=None)
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert client.get_experiment(old).name == "old"


def test_a_later_run_is_named_by_what_differs_from_the_first(uri: str) -> None:
    config = TrackingConfig(uri=uri, experiment="names")
    first = {"name": "a", "m.ratio": "0.75", "arms": '["knn"]', "storage.root": "/x", "seed": "0"}
    changes: list[dict[str, str]] = [
        {},
        {"m.ratio": "0.5"},
        {"storage.root": "/y"},
        {"arms": '["knn", "probe"]', "seed": "1"},
    ]
    names = []
    for change in changes:
        run_id = tracking.start_run(
            config,
            run_name="a",
            params={**first, **change},
            tags={"stage": "pretrain"},
            run_id=None,
            unnamed=("name", "storage."),
        )
        names.append(MlflowClient(uri).get_run(str(run_id)).info.run_name)
    assert names == ["a", "a ratio=0.5", "a", "a arms=knn,probe seed=1"]


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"data.train": "/long/way/to/cifar10/train"}, "a train=cifar10/train"),
        ({"x": "v" * 30}, f"a x={'v' * 23}…"),
        ({f"k{i}": "1" for i in range(5)}, "a k0=1 k1=1 k2=1 +2"),
    ],
)
def test_a_name_stays_short(params: dict[str, str], name: str) -> None:
    assert name_with_differences("a", params, dict.fromkeys(params, "")) == name


def test_a_runs_page_has_an_address(uri: str, run_id: str) -> None:
    experiment = MlflowClient(uri).get_run(run_id).info.experiment_id
    assert tracking.run_link(uri, run_id) == (
        f"#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"
    )


def test_a_class_of_any_name_can_be_part_of_a_metric(uri: str, run_id: str) -> None:
    names = {"ap/fish (sea), ö": 0.5, "ap/": 0.75, "ap/..": 0.875, "top1": 0.25}
    tracking.log_final_metrics(uri, run_id, names, 3)
    assert history(uri, run_id, "ap/fish _sea__ ö") == [(3, 0.5)]
    assert history(uri, run_id, "top1") == [(3, 0.25)]


def test_artifacts_lie_beside_a_sqlite_store(uri: str, run_id: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("seed: 1")
    tracking.log_artifact_file(uri, run_id, file, "config")
    tracking.log_artifact_text(uri, run_id, "hello", "notes/hello.txt")
    artifacts = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts" / run_id / "artifacts"
    assert (artifacts / "config" / "config.yaml").read_text() == "seed: 1"
    assert (artifacts / "notes" / "hello.txt").read_text() == "hello"


def test_a_resumed_run_is_the_same_run_and_runs_again(uri: str) -> None:
    run_id = make_run(uri, seed="1", num_workers="2")
    tracking.end_run(uri, run_id, "FAILED")
    assert MlflowClient(uri).get_run(run_id).info.status == "FAILED"
    assert make_run(uri, run_id, seed="1", num_workers="4", new="x") == run_id
    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"seed": "1", "num_workers": "2", "new": "x"}
    assert run.data.tags["resumed_with.num_workers"] == "4"
    assert "resumed_with.seed" not in run.data.tags


def test_a_run_that_is_gone_is_replaced(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    deleted = make_run(uri)
    MlflowClient(uri).delete_run(deleted)
    assert make_run(uri, deleted) != deleted
    assert make_run(uri, "0" * 32) != "0" * 32
    assert caplog.text.count("; starting a new one") == 2


def test_an_ended_run_has_its_status(uri: str, run_id: str) -> None:
    tracking.end_run(uri, run_id, "KILLED")
    assert MlflowClient(uri).get_run(run_id).info.status == "KILLED"


def test_the_status_of_a_run_is_told_from_a_missing_one(uri: str, run_id: str) -> None:
    assert tracking.run_status(uri, run_id) == "RUNNING"
    tracking.end_run(uri, run_id, "FINISHED")
    assert tracking.run_status(uri, run_id) == "FINISHED"
    assert tracking.run_status(uri, "0" * 32) == "MISSING"
    assert tracking.run_status(uri, None) == "MISSING"
    MlflowClient(uri).delete_run(run_id)
    assert tracking.run_status(uri, run_id) == "MISSING"
    assert tracking.run_status("http://127.0.0.1:9", run_id) == "UNKNOWN"


def test_histories_are_of_the_metrics_whose_names_end_so(uri: str, run_id: str) -> None:
    for step in (3, 1, 2):
        metrics = {"a/train/loss": float(step), "train/loss": 0.5, "loss": 9.0}
        tracking.log_final_metrics(uri, run_id, metrics, step)
    assert tracking.histories(uri, run_id, ("train/loss",)) == {
        "a/train/loss": [(1, 1.0), (2, 2.0), (3, 3.0)],
        "train/loss": [(1, 0.5), (2, 0.5), (3, 0.5)],
    }
    assert tracking.histories(uri, None, ("loss",)) == {}


def test_a_stages_run_is_shown_below_its_pipelines(uri: str, run_id: str) -> None:
    track = TrackingConfig(uri=uri, experiment="e", parent_run_id=run_id)
    child = tracking.start_run(track, run_name="c", params={}, tags={}, run_id=None)
    assert child is not None
    tags = MlflowClient(uri).get_run(child).data.tags
    assert tags["mlflow.parentRunId"] == run_id
    assert f"/runs/{child}?" in tracking.run_link(uri, child)


def test_a_data_set_is_an_input_of_the_run(uri: str, run_id: str) -> None:
    tracking.log_dataset(
        uri, run_id, name="cifar", digest="a" * 64, source="s3://data/cifar", context="train"
    )
    [dataset_input] = MlflowClient(uri).get_run(run_id).inputs.dataset_inputs
    assert dataset_input.dataset.name == "cifar"
    assert dataset_input.dataset.digest == "a" * 36
    assert dataset_input.dataset.source_type == "s3"
    assert json.loads(dataset_input.dataset.source) == {"uri": "s3://data/cifar"}
    assert [(tag.key, tag.value) for tag in dataset_input.tags] == [
        ("mlflow.data.context", "train")
    ]


def test_pictures_have_a_key_and_a_step(uri: str, run_id: str) -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    tracking.log_picture(uri, run_id, image, "reconstruction", 7)
    writer = MetricWriter(uri, run_id)
    writer.picture(image, "reconstruction", 20)
    writer.close()
    names = [file.path for file in MlflowClient(uri).list_artifacts(run_id, "images")]
    # The UI reads key and step from the names.
    found = {re.search(r"(\w+)[+%]step[+%](\d+)[+%]", name).groups() for name in names}  # type: ignore[union-attr]
    assert found == {("reconstruction", "7"), ("reconstruction", "20")}


def test_final_metrics_are_logged_at_their_step(uri: str, run_id: str) -> None:
    tracking.log_final_metrics(uri, run_id, {"val_loss": 0.5}, 100)
    assert history(uri, run_id, "val_loss") == [(100, 0.5)]


def test_all_that_was_written_is_stored_with_its_step_and_time(uri: str, run_id: str) -> None:
    writer = MetricWriter(uri, run_id)
    before_ms = time.time() * 1000
    for step in range(1500):
        writer.write({"loss": step / 2, "lr": 0.1}, step)
    after_ms = time.time() * 1000
    writer.close()
    assert history(uri, run_id, "loss") == [(step, step / 2) for step in range(1500)]
    points = MlflowClient(uri).get_metric_history(run_id, "lr")
    assert len(points) == 1500
    assert all(before_ms - 1 <= point.timestamp <= after_ms for point in points)


def test_metrics_are_sent_without_a_flush(
    uri: str, run_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricWriter, "SEND_INTERVAL_S", 0.05)
    writer = MetricWriter(uri, run_id)
    writer.write({"loss": 1.0}, 0)
    wait_for(lambda: history(uri, run_id, "loss") == [(0, 1.0)])
    writer.close()


def wait_for(condition: Any, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_a_resumed_run_has_each_step_once(uri: str, run_id: str) -> None:
    assert tracking.last_logged_step(uri, run_id, "loss") == -1
    first = MetricWriter(uri, run_id)
    for step in range(10):
        first.write({"loss": 1.0}, step)
    first.close()
    last_step = tracking.last_logged_step(uri, run_id, "loss")
    assert last_step == 9
    # The checkpoint that it resumes from is older than the last metrics.
    second = MetricWriter(uri, run_id, after_step=last_step)
    for step in range(5, 15):
        second.write({"loss": 2.0}, step)
    second.close()
    assert history(uri, run_id, "loss") == [(step, 1.0 if step < 10 else 2.0) for step in range(15)]


def test_what_mlflow_refuses_does_not_take_its_neighbours_with_it(
    uri: str, run_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MetricWriter(uri, run_id)
    writer.write({"loss": 1.0}, 1)
    writer.write({"too long a name" * 50: 1.0}, 2)
    writer.write({"loss": None}, 3)  # type: ignore[dict-item]
    writer.write({"loss": 4.0}, 4)
    writer.close()
    assert history(uri, run_id, "loss") == [(1, 1.0), (4, 4.0)]
    assert "refused what was logged at step 2" in caplog.text
    assert "step 3 is left out" in caplog.text
    assert "did not receive 2 steps or pictures" in caplog.text


def test_a_picture_is_not_changed_after_it_was_handed_over(uri: str, run_id: str) -> None:
    image = np.full((4, 4, 3), 200, np.uint8)
    writer = MetricWriter(uri, run_id)
    writer.picture(image, "x", 0)
    image[:] = 0
    [entry] = writer._pictures
    assert entry.image.min() == 200
    writer.close()


@pytest.mark.timeout(15)
def test_a_dead_server_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    run_id = tracking.start_run(
        TrackingConfig(uri=DEAD_URI), run_name="x", params={}, tags={}, run_id=None
    )
    assert run_id is None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "127.0.0.1:9 cannot be used" in record.message
    assert "Connection refused. Start it (make up), or set tracking.uri" in record.message


def test_a_run_that_was_not_started_is_not_written_to(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    tracking.end_run(DEAD_URI, None, "FINISHED")
    tracking.log_dataset(DEAD_URI, None, name="x", digest="x", source="x", context="x")
    tracking.log_artifact_text(DEAD_URI, None, "x", "x.txt")
    tracking.log_artifact_file(DEAD_URI, None, tmp_path)
    tracking.log_picture(DEAD_URI, None, image, "x", 0)
    tracking.log_final_metrics(DEAD_URI, None, {"x": 1.0}, 0)
    assert tracking.last_logged_step(DEAD_URI, None, "x") == -1
    writer = MetricWriter(DEAD_URI, None)
    writer.write({"x": 1.0}, 0)
    writer.picture(image, "x", 0)
    assert writer.flush(1.0)
    writer.close()
    assert caplog.records == []


class FakeServer:
    """The part of MLflow's server that log_batch needs; its port opens with `start`."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int, float]] = []
        self.num_failures = 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.num_failures -= 1
                if fake.num_failures < 0:
                    fake.points += [(m["key"], m["step"], m["value"]) for m in body["metrics"]]
                self.send_response(200 if fake.num_failures < 0 else 500)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(MetricWriter, "SEND_INTERVAL_S", 0.05)
    server = FakeServer()
    yield server
    server.stop()


@pytest.mark.timeout(60)
def test_a_server_that_goes_and_comes_back_gets_everything(
    fake: FakeServer, caplog: pytest.LogCaptureFixture
) -> None:
    fake.start()
    writer = MetricWriter(fake.uri, "run")
    writer.write({"loss": 0.0}, 0)
    assert writer.flush(20.0)
    fake.stop()
    for step in range(1, 2500):
        writer.write({"loss": float(step)}, step)
    assert not writer.flush(1.0)
    fake.start()
    writer.close(20.0)
    assert fake.points == [("loss", step, float(step)) for step in range(2500)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "metrics are kept for later" in caplog.text


def test_what_could_not_be_sent_comes_before_what_was_written_since() -> None:
    writer = MetricWriter(DEAD_URI, None)
    first, second, third = (_StepEntry(0, step, {}) for step in (1, 2, 3))
    writer._steps.append(third)
    writer._put_back([first, second])
    assert [entry.step for entry in writer._steps] == [1, 2, 3]


@pytest.mark.timeout(60)
def test_a_server_error_is_tried_again(fake: FakeServer) -> None:
    fake.num_failures = 2
    fake.start()
    writer = MetricWriter(fake.uri, "run")
    writer.write({"loss": 1.0}, 1)
    writer.close(20.0)
    assert fake.points == [("loss", 1, 1.0)]


@pytest.mark.timeout(60)
def test_nothing_is_sent_any_more_for_a_run_that_was_taken_over(fake: FakeServer) -> None:
    fake.start()
    superseded = threading.Event()
    writer = MetricWriter(fake.uri, "run", is_superseded=superseded.is_set)
    writer.write({"loss": 1.0}, 1)
    assert writer.flush(20.0)
    superseded.set()
    writer.write({"loss": 2.0}, 2)
    writer.close(20.0)
    assert fake.points == [("loss", 1, 1.0)]


@pytest.mark.timeout(60)
def test_what_is_kept_is_bounded_and_the_rest_is_counted_once(
    fake: FakeServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricWriter, "MAX_KEPT_STEPS", 10)
    writer = MetricWriter(fake.uri, "run")
    for step in range(25):
        writer.write({"loss": 1.0}, step)
    assert not writer.flush(0.5)
    fake.start()
    writer.close(20.0)
    assert [step for _, step, _ in fake.points] == list(range(15, 25))
    assert caplog.text.count("did not receive 15 steps or pictures") == 1


@pytest.mark.timeout(30)
def test_a_server_that_hangs_holds_up_neither_a_write_nor_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricWriter, "SEND_INTERVAL_S", 0.05)
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen(8)
        writer = MetricWriter(f"http://127.0.0.1:{hanging.getsockname()[1]}", "run")
        writer.write({"loss": 1.0}, 0)
        wait_for(lambda: writer._num_in_flight == 1)
        started_at_s = time.monotonic()
        for step in range(1, 1000):
            writer.write({"loss": 1.0}, step)
        assert time.monotonic() - started_at_s < 1.0
        writer.close(0.5)
        assert time.monotonic() - started_at_s < 5.0
        assert "did not receive 1000 steps or pictures" in caplog.text


def test_writing_after_the_end_does_nothing(uri: str, run_id: str) -> None:
    writer = MetricWriter(uri, run_id)
    writer.close()
    writer.close()
    writer.write({"loss": 1.0}, 0)
    assert writer.flush(1.0)
    assert history(uri, run_id, "loss") == []
