"""`mae run`: run the stages that changed, and keep the record of the run."""

import json
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from infra import machine, storage, tracking
from infra.lease import lease
from infra.own_files import read_or_none
from infra.redaction import write_redacted
from infra.run_names import name_with_differences
from infra.scratch import scratch_folder
from pipelines import driver, job
from pipelines.chain import report
from pipelines.chain.attempt import StageTry, resolved, reuse
from pipelines.chain.code import remember
from pipelines.chain.config import Chain, PromoteSpec, base_and_point
from pipelines.chain.execute import (
    Action,
    Capacity,
    Node,
    Running,
    StageRun,
    State,
    execute,
)
from pipelines.chain.folder import code_uri
from pipelines.chain.plan import (
    Forced,
    Planned,
    measure_digest,
    mermaid_graph,
    plan_chain,
    plan_table,
)
from pipelines.chain.promote import Judgement, promote
from pipelines.chain.record import PipelineRun, pipeline_folder, pipeline_tracking
from pipelines.outcome import STOPPED_CODES, ConfigError, StageResult
from pipelines.reading.fingerprints import fingerprint
from pipelines.terminal.run_page import say_run_page

logger = logging.getLogger(__name__)

REFUSED = 3  # exit code of a gate
LOOKED_BACK = 20  # number of past runs that are searched for interrupted ones


def run(chain: Chain, forced: Forced, words: Sequence[str]) -> int:
    """Run a pipeline, unless another process does, and return the exit code."""
    with lease(pipeline_folder(chain, "lease"), f"pipeline {chain.config.name}"):
        return _run(chain, forced, words)


def _run(chain: Chain, forced: Forced, words: Sequence[str]) -> int:
    started_s = time.monotonic()
    plans = plan_chain(chain, forced)
    logger.info("%s", plan_table(plans))
    capacity = _capacity()  # before we set signal handlers, because joining Ray sets its own
    run = _open(chain, plans, tuple(words))
    uri = chain.config.tracking.uri
    with scratch_folder() as workspace:
        killed = partial(tracking.end_run, uri, run.run_id, "KILLED")
        with driver.cancel_on_signals(killed):
            try:
                run.stages = execute(
                    _wanted_nodes(plans, forced),
                    partial(_start, run, workspace),
                    capacity=capacity,
                    notify=partial(_notify, run),
                )
            except Exception:
                tracking.end_run(uri, run.run_id, "FAILED")
                raise
            exit_code = _exit_code(run)
            if exit_code == 0 and chain.config.promote is not None and forced.only is None:
                exit_code = _judge(run, chain.config.promote)
            _close(run, "FINISHED" if exit_code in (0, REFUSED) else "FAILED")
    seconds = round(time.monotonic() - started_s, 1)
    write_redacted(json.dumps(_summary(run, exit_code, seconds)))
    say_run_page(chain.config, run.run_id)
    return exit_code


def _judge(run: PipelineRun, spec: PromoteSpec) -> int:
    """Judge the model at the end; an error here affects neither the stages nor the report."""
    try:
        run.verdict = _promote(run, spec)
    except (ConfigError, storage.StorageError) as error:
        logger.error("promote: %s", error)
        run.trouble = f"promote: {error}"
        return 2 if isinstance(error, ConfigError) else 5
    return REFUSED if run.verdict.is_refused else 0


def _promote(run: PipelineRun, spec: PromoteSpec) -> Judgement:
    """Promote the pipeline's model, or the best model of a sweep."""
    stage, _, metric = spec.metric.partition("/")
    judged = [name for name in run.results if base_and_point(name)[0] == stage]
    sign = 1 if spec.higher_is_better else -1
    best = max(judged, key=lambda name: sign * run.results[name].metrics.get(metric, -math.inf))
    made = [name for name in run.results if base_and_point(name)[0] == spec.stage]
    candidate = next(
        (name for name in made if base_and_point(name)[1] == base_and_point(best)[1]), made[0]
    )
    # The data set on which the metric's stage measured.
    plan = next(plan for plan in run.plans if plan.stage.name == best)
    data = resolved(plan, run.results, pipeline_folder(run.chain)).get("data")
    place = data.get("val") or data["train"] if isinstance(data, dict) else data
    if not place:
        raise ConfigError(f"promote.metric={spec.metric}: {stage} is not measured on any data")
    # How it was measured counts as well: a longer probe does not make a better model.
    track = pipeline_tracking(run.chain)
    how = f"{fingerprint(place)}-{measure_digest(plan.parts)}"
    return promote(spec, track, run.results[candidate], run.results[best], how)


def _wanted_nodes(plans: list[Planned], forced: Forced) -> list[Node]:
    """Return the nodes to run; with `--only`, missing ones that were not named are left out."""
    nodes = [plan.stage.node for plan in plans]
    if forced.only is None:
        return nodes
    wanted = {p.stage.name for p in plans if p.done is not None or p.stage.name == forced.only}
    return [
        replace(node, needs=tuple(need for need in node.needs if need in wanted))
        for node in nodes
        if node.name in wanted
    ]


def _capacity() -> Capacity:
    if job.cluster_address():
        # Imported by name, because only here does the pipeline's own process need Ray.
        cpus, gpus = import_module("pipelines.training.launch").cluster_capacity()
        return Capacity(cpus, gpus)
    # Each stage has its own Ray, which takes the first GPUs, so stages with GPUs run alone.
    return Capacity(float(machine.count_cpus()), 0.0)


def _open(chain: Chain, plans: list[Planned], words: tuple[str, ...]) -> PipelineRun:
    """Start the run's record, or continue that of an interrupted run with the same work to do."""
    keys = {plan.stage.name: plan.folder.key for plan in plans}
    earlier = _unfinished(chain, keys)
    name = earlier["name"] if earlier else _name_of_now()
    run = PipelineRun(chain, plans, words, name)
    if earlier:
        run.started_at = earlier["started_at"]
        logger.info("continues the run %s, which was interrupted", name)
    track = pipeline_tracking(chain)
    # The few values that differ from the file, to compare runs by.
    given = dict(word.split("=", 1) for word in words)
    params = {k: v for k, v in given.items() if k.split(".")[0] not in ("storage", "tracking")}
    run.run_id = tracking.start_run(
        track,
        run_name=_shown_name(chain.config.name, name, params),
        params=params,
        tags=driver.run_tags("pipeline", seed="", output=run.uri),
        run_id=earlier["run_id"] if earlier else None,
    )
    _write_state(run, keys, ended=None)
    remember(code_uri(chain.config.storage.root))
    states = {plan.stage.name: plan.decision.action.value for plan in plans}
    tracking.log_artifact_text(track.uri, run.run_id, mermaid_graph(chain, states), "graph.mmd")
    tracking.log_artifact_text(track.uri, run.run_id, plan_table(plans), "plan.txt")
    return run


def _shown_name(pipeline: str, name: str, params: Mapping[str, str]) -> str:
    """Return the run's name in MLflow: the overridden values, the time, and the pipeline.

    MLflow's list shows only the beginning of a name, so what differs between runs comes first.
    """
    changed = name_with_differences("", params, dict.fromkeys(params, ""))
    when = f"{name[5:10]} {name[11:13]}:{name[13:15]}"
    return f"{changed} {when} {pipeline}".strip()


def _name_of_now() -> str:
    """Return a name that sorts by time and differs within a second."""
    now_s = time.time()
    return time.strftime("%Y-%m-%dT%H%M%S", time.gmtime(now_s)) + f".{int(now_s % 1 * 1000):03d}Z"


class _RunState(TypedDict):
    name: str
    run_id: str | None
    started_at: float
    ended: str | None
    keys: dict[str, str]


def _unfinished(chain: Chain, keys: Mapping[str, str]) -> _RunState | None:
    """Return the state of the last run if it was interrupted and had the same work to do.

    Other interrupted runs cannot be running, because we hold the lease: they end as killed.
    """
    names = storage.list_folders(pipeline_folder(chain))[-LOOKED_BACK:]
    found = None
    for name in names:
        place = pipeline_folder(chain, name, "run.json")
        state = read_or_none(place, _RunState, "that run counts as ended")
        if state is None or state["ended"] is not None:
            continue
        if name == names[-1] and state["keys"] == dict(keys):
            found = state
        else:
            tracking.end_run(chain.config.tracking.uri, state["run_id"], "KILLED")
            storage.write_bytes(place, json.dumps({**state, "ended": "KILLED"}).encode())
    return found


def _write_state(run: PipelineRun, keys: Mapping[str, str], ended: str | None) -> None:
    state: _RunState = {
        "name": run.name,
        "run_id": run.run_id,
        "started_at": run.started_at,
        "ended": ended,
        "keys": dict(keys),
    }
    storage.write_bytes(storage.join(run.uri, "run.json"), json.dumps(state).encode())


def _start(
    run: PipelineRun, workspace: Path, node: Node, results: Mapping[str, StageResult]
) -> Running | StageResult:
    planned = next(plan for plan in run.plans if plan.stage.name == node.name)
    if planned.decision.action in (Action.REUSE, Action.REBUILD):
        return reuse(planned, run.tracking)
    return StageTry(planned, results, run.tracking, pipeline_folder(run.chain), workspace)


def _notify(run: PipelineRun, stage: StageRun) -> None:
    name, state = stage.node.name, stage.state
    if state is State.RUNNING:
        logger.info("%s: starts", name)
    elif state in (State.DONE, State.REUSED) and stage.result is not None:
        logger.info("%s: %s in %.0f s: %s", name, state.value, stage.seconds, stage.result.output)
    elif state is State.WAITING and stage.failure is not None:
        logger.warning("%s: failed, is tried again: %s", name, stage.failure.line)
    elif stage.failure is not None:
        logger.error("%s: %s: %s", name, state.value, stage.failure.line)
    run.stages[name] = stage


def _exit_code(run: PipelineRun) -> int:
    for stage in run.stages.values():
        if stage.state is State.FAILED and stage.failure is not None:
            return stage.failure.exit_code or 1
    return 0


def _close(run: PipelineRun, status: tracking.Status) -> None:
    """Log metrics and description, write the report, and end the run."""
    uri = run.chain.config.tracking.uri
    tracking.log_final_metrics(uri, run.run_id, run.headline, 0)
    tracking.set_tags(uri, run.run_id, _tags(run))
    try:
        page = report.render(run)
        storage.write_bytes(storage.join(run.uri, "report.html"), page.encode())
        tracking.log_artifact_text(uri, run.run_id, page, "report.html")
        _write_model_card(run)
        logger.info("report: %s", storage.join(run.uri, "report.html"))
    except Exception as error:  # of a picture, a table or the store: the results are safe
        logger.warning("the report could not be written: %s: %s", type(error).__name__, error)
    tracking.end_run(uri, run.run_id, status)
    keys = {plan.stage.name: plan.folder.key for plan in run.plans}
    _write_state(run, keys, ended=status)


def _write_model_card(run: PipelineRun) -> None:
    """Write the model card beside the report and to the model's run in MLflow."""
    uri = run.chain.config.tracking.uri
    for name, result in run.results.items():
        card = report.model_card(run, name) if run.chain[name].kind_name == "pretrain" else None
        if card is not None:
            file_name = f"model_card_{name}.md"
            storage.write_bytes(storage.join(run.uri, file_name), card.encode())
            tracking.log_artifact_text(uri, result.run_id, card, "model_card.md")


def _tags(run: PipelineRun) -> dict[str, str]:
    tags = {"mlflow.note.content": report.stage_table(run)}
    for name, stage in run.stages.items():
        if stage.state is State.REUSED and stage.result is not None and stage.result.run_id:
            tags[f"reused.{re.sub('[^A-Za-z0-9_. -]', '_', name)}"] = stage.result.run_id
    return tags


def _summary(run: PipelineRun, exit_code: int, seconds: float) -> dict[str, Any]:
    status = {0: "done", REFUSED: "refused"}.get(exit_code, "failed")
    if exit_code in STOPPED_CODES:  # a stage was
        status = "stopped"
    stages = {name: stage.state.value for name, stage in run.stages.items()}
    if status == "done" and set(stages.values()) == {"reused"}:
        status = "reused"
    return {
        "stage": "pipeline",
        "status": status,
        "run_id": run.run_id,
        "output": run.uri,
        "metrics": run.headline,
        "stages": stages,
        "seconds": seconds,
    }
