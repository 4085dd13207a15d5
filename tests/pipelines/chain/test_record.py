"""Where a run of a pipeline is recorded, and by which numbers pipelines are compared."""

from pathlib import Path

import pytest

from infra.config import StorageConfig, TrackingConfig
from mae_core.config import StrictConfig
from pipelines.chain.config import Chain, ChainConfig, Stage, StageSpec
from pipelines.chain.execute import Node, StageRun, State
from pipelines.chain.kinds import StageKind
from pipelines.chain.record import PipelineRun, pipeline_tracking
from pipelines.outcome import StageResult


class Own(StrictConfig):
    number: int = 1


KIND = StageKind(Own, "", (), (), headline=("/top1", "num_images"))


@pytest.fixture
def run(tmp_path: Path) -> PipelineRun:
    config = ChainConfig(
        name="demo",
        stages={"a": StageSpec()},
        storage=StorageConfig(root=str(tmp_path / "runs")),
        tracking=TrackingConfig(uri="sqlite:////x.db"),
    )
    return PipelineRun(Chain(config, (Stage("a", StageSpec(), "a", KIND, Own()),)), [], (), "WHEN")


def test_the_report_lies_in_a_folder_of_the_pipeline_and_the_time(
    run: PipelineRun, tmp_path: Path
) -> None:
    assert run.uri == f"{tmp_path}/runs/pipelines/demo/WHEN"


def test_only_the_metrics_of_the_headline_are_compared(run: PipelineRun) -> None:
    metrics = {
        "knn/top1": 0.5,
        "top1": 0.4,
        "knn/top1_std": 0.1,
        "num_images": 7.0,
        "data/left_out": 0.0,
    }
    result = StageResult("a", "done", None, "/out", metrics)
    run.stages = {"a": StageRun(Node("a"), State.DONE, result), "b": StageRun(Node("b"))}
    assert run.results == {"a": result}
    assert run.headline == {"a/knn/top1": 0.5, "a/top1": 0.4, "a/num_images": 7.0}


def test_an_experiment_is_named_by_the_pipeline_unless_the_file_names_it(run: PipelineRun) -> None:
    run.run_id = "r1"
    assert pipeline_tracking(run.chain).experiment == "demo"
    assert (run.tracking.experiment, run.tracking.parent_run_id) == ("demo", "r1")
    named = TrackingConfig(uri="sqlite:////x.db", experiment="mine")
    chain = Chain(run.chain.config.model_copy(update={"tracking": named}), run.chain.stages)
    assert pipeline_tracking(chain).experiment == "mine"
