"""The gate at the end: a new model replaces the one in use only if it is better.

Both must have been measured on the same data. The verdict is recorded in either case.
"""

import logging
from typing import NamedTuple

from infra import registry
from infra.config import TrackingConfig
from pipelines.chain.config import PromoteSpec
from pipelines.outcome import ConfigError, StageResult

logger = logging.getLogger(__name__)

VALUE_TAG, METRIC_TAG, DATA_TAG, VERDICT_TAG, OUTPUT_TAG = (
    "eval.value",
    "eval.metric",
    "eval.data",
    "verdict",
    "output",
)


class Judgement(NamedTuple):
    is_refused: bool
    text: str
    value: float
    version: str | None = None  # version number of the candidate


def judge_candidate(
    spec: PromoteSpec, value: float, data: str, run_id: str, holder: registry.Version | None
) -> Judgement:
    """Decide whether a model with `value` on the data `data` takes the alias from its holder."""
    alias = f"{spec.model}@{spec.alias}"
    if holder is None:
        return Judgement(False, f"{alias}: the first: {spec.metric} {value:.4g}", value)
    if holder.run_id == run_id:
        return Judgement(False, f"{alias}: version {holder.number} is already this one", value)
    tags = holder.tags
    before = _number(tags.get(VALUE_TAG))
    if before is None or tags.get(METRIC_TAG) != spec.metric or tags.get(DATA_TAG) != data:
        what = (
            f"{tags.get(METRIC_TAG)} on data {tags.get(DATA_TAG)}"
            if before is not None
            else "no recorded metric"
        )
        text = (
            f"{alias}: version {holder.number} was measured by {what}, this one by {spec.metric} "
            f"on data {data}: not comparable; promote.other_data=replace would promote this one"
        )
        is_refused = spec.other_data == "refuse"
        return Judgement(is_refused, text, value)
    gain = value - before if spec.higher_is_better else before - value
    compared = (
        f"{spec.metric} {value:.4g}, version {holder.number} has {before:.4g}, margin "
        f"{spec.margin:g}"
    )
    if gain > spec.margin:
        return Judgement(False, f"{alias}: better: {compared}", value)
    return Judgement(True, f"{alias}: not better by more than the margin: {compared}", value)


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def promote(
    spec: PromoteSpec,
    track: TrackingConfig,
    candidate: StageResult,
    measured: StageResult,
    data: str,
) -> Judgement:
    """Judge a pipeline's model, register it with the verdict, and move the alias if it is better.

    Args:
        spec: What to compare.
        track: Where MLflow is.
        candidate: Result of the stage that made the model.
        measured: Result of the stage that has the metric.
        data: Names the data set that it was measured on.

    Raises:
        ConfigError: There is no such metric.
        StorageError: MLflow can't be used.
    """
    stage, _, name = spec.metric.partition("/")
    metrics = measured.metrics
    if name not in metrics:
        raise ConfigError(
            f"promote.metric={spec.metric}: {stage} has no such metric; it has "
            f"{', '.join(sorted(metrics))}"
        )
    if candidate.run_id is None:
        raise ConfigError(f"promote.stage={spec.stage}: has no run in MLflow to register")
    holder = registry.alias_holder(track.uri, spec.model, spec.alias)
    verdict = judge_candidate(spec, metrics[name], data, candidate.run_id, holder)
    tags = {
        VALUE_TAG: repr(metrics[name]),
        METRIC_TAG: spec.metric,
        DATA_TAG: data,
        VERDICT_TAG: "refused" if verdict.is_refused else "promoted",
        OUTPUT_TAG: candidate.output,
    }
    if holder is not None and holder.run_id == candidate.run_id:
        logger.info("promote: %s", verdict.text)
        return verdict._replace(version=holder.number)  # keeps its metrics from when it won
    made = registry.register(track.uri, spec.model, candidate.run_id, candidate.output, tags)
    if not verdict.is_refused:
        registry.set_alias(track.uri, spec.model, spec.alias, made.number)
    level = logging.WARNING if verdict.is_refused else logging.INFO
    logger.log(level, "promote: %s", verdict.text)
    return verdict._replace(version=made.number)
