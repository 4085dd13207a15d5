"""One run of a pipeline: the plan, the outcome of each stage, and where the record is."""

import time
from dataclasses import dataclass, field

from infra import storage
from infra.config import TrackingConfig
from pipelines.chain.config import Chain
from pipelines.chain.execute import StageRun
from pipelines.chain.plan import Planned
from pipelines.chain.promote import Judgement
from pipelines.outcome import StageResult


@dataclass
class PipelineRun:
    chain: Chain
    plans: list[Planned]
    words: tuple[str, ...]  # `key=value` that override the file
    name: str  # its start time, such as 2026-11-25T180000Z
    run_id: str | None = None  # in MLflow
    started_at: float = field(default_factory=time.time)
    stages: dict[str, StageRun] = field(default_factory=dict)
    verdict: Judgement | None = None
    trouble: str = ""  # error of the gate at the end

    @property
    def uri(self) -> str:
        """Folder of the run's report."""
        return pipeline_folder(self.chain, self.name)

    @property
    def tracking(self) -> TrackingConfig:
        """Settings for the stages: their runs are shown below the pipeline's run."""
        return pipeline_tracking(self.chain).model_copy(update={"parent_run_id": self.run_id})

    @property
    def results(self) -> dict[str, StageResult]:
        return {name: x.result for name, x in self.stages.items() if x.result is not None}

    @property
    def headline(self) -> dict[str, float]:
        """The few metrics of each stage by which pipelines are compared."""
        return {
            f"{name}/{key}": value
            for name, result in self.results.items()
            for key, value in result.metrics.items()
            if f"/{key}".endswith(self.chain[name].kind.headline)
        }


def pipeline_folder(chain: Chain, *names: str) -> str:
    root = storage.absolute(chain.config.storage.root)
    return storage.join(root, "pipelines", chain.config.name, *names)


def pipeline_tracking(chain: Chain) -> TrackingConfig:
    """Use one experiment per pipeline, with its name unless the file gives another."""
    track = chain.config.tracking
    given = "experiment" in track.model_fields_set
    return track if given else track.model_copy(update={"experiment": chain.config.name})
