"""One attempt of a stage in a pipeline: wait for its lease, run its process, commit the result."""

import json
import logging
import math
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from infra import tracking
from infra.config import TrackingConfig
from infra.lease import HeldError, Lease, lease
from pipelines.chain.config import PIPELINE, SELF, Stage, substitute
from pipelines.chain.execute import Action, Failure
from pipelines.chain.plan import Planned, versions
from pipelines.chain.process import StageProcess
from pipelines.config.fields import flatten
from pipelines.driver import run_tags
from pipelines.outcome import StageResult, explain

logger = logging.getLogger(__name__)

LEASE_EVERY_S = 2.0


class StageTry:
    """Implements `pipelines.chain.execute.Running`."""

    def __init__(
        self,
        planned: Planned,
        results: Mapping[str, StageResult],
        track: TrackingConfig,
        pipeline_uri: str,
        workspace: Path,
    ) -> None:
        self._planned = planned
        self._results = results
        self._tracking = track
        self._pipeline_uri = pipeline_uri
        self._config_file = workspace / f"{planned.folder.key}.yaml"
        self._lease: Lease | None = None
        self._held = ExitStack()
        self._process: StageProcess | None = None
        self._looked_at_s = 0.0
        self._started_at_s = time.monotonic()
        self.is_waiting = False

    def poll(self) -> StageResult | Failure | None:
        try:
            ended = self._begin() if self._process is None else self._process.poll()
            if isinstance(ended, StageResult) and self._process is not None:
                ended = self._commit(ended)
        except Exception as error:  # of the lease or the commit: the other stages continue
            explained = explain(error)
            ended = Failure(
                f"{type(error).__name__}: {error}", explained.exit_code, explained.can_pass
            )
        if ended is not None:
            self._held.close()
        return ended

    def _begin(self) -> StageResult | None:
        """Start, unless another run of a pipeline is making the same result."""
        if time.monotonic() - self._looked_at_s < LEASE_EVERY_S:
            return None
        self._looked_at_s = time.monotonic()
        planned, folder = self._planned, self._planned.folder
        try:
            purpose = f"stage {planned.stage.name}"
            self._lease = self._held.enter_context(lease(folder.lease_uri, purpose))
        except HeldError as error:
            if not self.is_waiting:
                logger.info("%s: waits: %s", planned.stage.name, error)
            self.is_waiting = True
            return None
        # An earlier attempt has begun, and this one continues from what it made.
        is_begun = self._config_file.exists()
        is_fresh = planned.decision.fresh and not is_begun
        done = folder.read_done()
        is_whole = done is not None and folder.problem(done) is None
        if done is not None and is_whole and (not is_fresh or done != planned.found):
            # Another run of a pipeline has made the result in the meantime.
            return StageResult(
                planned.stage.kind_name, "reused", done.run_id, folder.output(done), done.metrics
            )
        is_fresh = is_fresh or (done is not None and not is_whole)
        if is_fresh:
            folder.clear()
        folder.write_parts(planned.parts)
        self._started_at_s = time.monotonic()
        self._process = StageProcess(planned.stage.name, self._words(is_fresh))
        return None

    def _words(self, is_fresh: bool) -> list[str]:
        stage = self._planned.stage
        config = resolved(self._planned, self._results, self._pipeline_uri)
        if "tracking" in config:
            config["tracking"] = self._tracking.model_dump(mode="json")
        self._config_file.write_text(json.dumps(config, indent=1, ensure_ascii=False))
        own = ["stage", str(stage.file)] if stage.file is not None else [stage.kind_name]
        # Needed also for what the stage writes outside of its folder.
        return [*own, str(self._config_file), *(["--fresh"] if is_fresh else [])]

    def _commit(self, result: StageResult) -> StageResult:
        stage = self._planned.stage
        assert self._lease is not None
        self._lease.check()
        run_id = result.run_id
        if run_id is None:
            run_id = record(stage, result, self._tracking)
        metrics = {key: float(value) for key, value in result.metrics.items()}
        if odd := [key for key, value in metrics.items() if not math.isfinite(value)]:
            logger.warning("%s: left out because not finite: %s", stage.name, ", ".join(odd))
            metrics = {key: value for key, value in metrics.items() if key not in odd}
        result = result._replace(run_id=run_id, metrics=metrics)
        assert self._process is not None
        self._planned.folder.commit(
            result,
            seconds=round(time.monotonic() - self._started_at_s, 1),
            peak_bytes=self._process.peak_bytes,
            steps=self._planned.cost.steps,
            made_with=versions(),
        )
        return result

    def ask_to_stop(self) -> None:
        if self._process is not None:
            self._process.ask_to_stop()

    def wait_until_stopped(self) -> None:
        if self._process is not None:
            self._process.wait_until_stopped()
        self._held.close()


def resolved(
    planned: Planned, results: Mapping[str, StageResult], pipeline_uri: str
) -> dict[str, Any]:
    """Return the stage's config with the names of stages replaced by their outputs."""
    texts = {name: result.output for name, result in results.items()}
    texts |= {SELF: planned.folder.uri, PIPELINE: pipeline_uri}
    config: dict[str, Any] = substitute(planned.stage.config.model_dump(mode="json"), texts)
    return config


def record(stage: Stage, result: StageResult, track: TrackingConfig) -> str | None:
    """Record a stage that has no MLflow run of its own; return the id of the new run."""
    run_id = tracking.start_run(
        track,
        run_name=stage.name,
        params=flatten(stage.config),
        tags=run_tags(
            stage.kind_name, seed=getattr(stage.config, "seed", ""), output=result.output
        ),
        run_id=None,
    )
    tracking.log_final_metrics(track.uri, run_id, result.metrics, 0)
    tracking.end_run(track.uri, run_id, "FINISHED")
    return run_id


def reuse(planned: Planned, track: TrackingConfig) -> StageResult:
    """Return the existing result; record its run again if MLflow has lost it."""
    done, folder, stage = planned.done, planned.folder, planned.stage
    assert done is not None
    result = StageResult(stage.kind_name, "reused", done.run_id, folder.output(done), done.metrics)
    if planned.decision.action is Action.REBUILD:
        if tracking.run_status(track.uri, done.run_id) == "MISSING":
            result = result._replace(run_id=record(stage, result, track))
            folder.write_done(done.model_copy(update={"run_id": result.run_id}))
        else:
            tracking.end_run(track.uri, done.run_id, "FINISHED")
    return result
