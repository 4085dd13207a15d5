"""Plan a pipeline: for each stage whether to run or reuse it, why, and its expected cost."""

import hashlib
import json
import platform
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from infra.run_records import run_status
from infra.shard_spec import as_entries
from mae_core.config import StrictConfig
from pipelines.chain.code import code_digests, recall
from pipelines.chain.config import (
    OWN_PLACES,
    PIPELINE,
    REFERENCE,
    Chain,
    Stage,
    after,
    base_and_point,
    dotted,
    substitute,
)
from pipelines.chain.execute import KEY_CHARS, Action, Decision, KeyParts, differences
from pipelines.chain.folder import Done, StageFolder, code_uri, earlier_folders
from pipelines.config.downstream import DownstreamConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.steps import HELD_SHARE, num_steps
from pipelines.outcome import ConfigError
from pipelines.reading.fingerprints import fingerprint, num_samples

MAX_REASONS = 3
SPLIT_KEYS = ("optim.micro_batch_size", "scaling.num_workers")  # how a global batch is split
_KEY_IN = re.compile(rf"\{{[0-9a-f]{{{KEY_CHARS}}}\}}")


class Cost(NamedTuple):
    """The expected cost of a stage; None where it is unknown."""

    steps: int | None = None
    samples: int | None = None
    seconds: float | None = None
    num_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Planned:
    stage: Stage
    parts: KeyParts
    folder: StageFolder
    decision: Decision
    done: Done | None  # the existing result that will be kept
    notes: tuple[str, ...]
    cost: Cost
    found: Done | None = None  # the result that existed when the plan was made, kept or not

    @property
    def output(self) -> str | None:
        return None if self.done is None else self.folder.output(self.done)


class Forced(NamedTuple):
    """The stages that the command line asks to run again."""

    stages: frozenset[str] = frozenset()
    only: str | None = None

    @classmethod
    def of(
        cls, chain: Chain, force: Collection[str], start: Collection[str], only: str | None
    ) -> "Forced":
        """Parse the options: `force` runs these stages again, `start` also those after them.

        `only` runs no other stage. The name of a stage that a sweep copied means all of its
        points, except for `only`.

        Raises:
            ConfigError: There is no such stage.
        """
        names = [stage.name for stage in chain.stages]

        def points(name: str) -> list[str]:
            found = [other for other in names if name in (other, base_and_point(other)[0])]
            if not found:
                raise ConfigError(f"there is no stage {name!r}; the stages are {', '.join(names)}")
            return found

        if only is not None and points(only) != [only]:
            raise ConfigError(f"--only {only}: choose one of {', '.join(points(only))}")
        again = [other for name in force for other in points(name)]
        first = [other for name in start for other in points(name)]
        return cls(frozenset(again) | after(first, chain), only)


def plan_chain(chain: Chain, forced: Forced) -> list[Planned]:
    """Check which results exist; starts nothing and writes nothing.

    Raises:
        ConfigError: Data from outside the pipeline is missing, or a result that `only` needs.
        StorageError: The store cannot be used.
    """
    plans: dict[str, Planned] = {}
    recall(code_uri(chain.config.storage.root))
    for stage in chain.stages:
        keys = {name: plan.folder.key for name, plan in plans.items()}
        parts = key_parts(stage, keys, chain.config.name)
        folder = StageFolder(chain.config.storage.root, stage.kind_name, parts.key)
        done = folder.read_done()
        decision = decide(chain.config.tracking.uri, stage, parts, folder, forced)
        kept = decision.action in (Action.REUSE, Action.REBUILD)
        outputs = {name: plan.output for name, plan in plans.items() if plan.output is not None}
        cost = Cost() if kept else _cost(stage, folder, outputs)
        notes = _notes(done) if done and kept else ()
        plans[stage.name] = Planned(
            stage, parts, folder, decision, done if kept else None, notes, cost, done
        )
    if forced.only is not None:
        _check_only(forced.only, plans)
    return list(plans.values())


def _check_only(only: str, plans: Mapping[str, Planned]) -> None:
    for need in plans[only].stage.references:
        if plans[need].done is None:
            raise ConfigError(
                f"--only {only}: needs {need}, which is not there ({plans[need].decision.why}); "
                "run the pipeline without --only"
            )


def key_parts(stage: Stage, keys: Mapping[str, str], pipeline: str = "") -> KeyParts:
    """Return the parts of the stage's key; `keys` are the keys of earlier stages.

    `pipeline` is the pipeline's name, because each pipeline has a folder of its own.
    """
    values = dict(dotted(stage.config.model_dump(mode="json")))
    inputs = {}
    for key in [key for key in values if _is_under(key, stage.kind.data_keys)]:
        value = values.pop(key)
        entries = as_entries(value or ())
        made = [entry for entry in entries if _references(entry)]
        found = [entry for entry in entries if not _references(entry)]
        if made:
            values[key] = made
        if found:
            inputs[key] = _fingerprint(stage, key, found)
    if values.get("existing") is not None:  # `mae prepare index` reads its own output folder
        inputs["output"] = _fingerprint(stage, "output", values["output"], by_time=True)
    kept = {key: value for key, value in values.items() if not _is_under(key, stage.kind.unkeyed)}
    if isinstance(stage.config, DownstreamConfig) and stage.config.depends_on_split:
        kept |= {key: values[key] for key in SPLIT_KEYS}
    texts = {name: f"{{{key}}}" for name, key in keys.items()} | {PIPELINE: pipeline}
    files = [stage.file] if stage.file is not None else []
    return KeyParts(
        kind=stage.kind_name,
        version=stage.kind.version,
        code=code_digests([*stage.kind.modules, *files]),
        config=substitute(kept, texts),
        inputs=inputs,
        # A stage that is only waited for, such as a gate, does not affect the result.
        needs={name: keys[name] for name in stage.references},
    )


def measure_digest(parts: KeyParts) -> str:
    """Return a digest of how a stage measures: its config without the outputs of other stages."""
    own = {key: value for key, value in parts.config.items() if not _KEY_IN.search(str(value))}
    return hashlib.sha256(json.dumps([parts.version, own], sort_keys=True).encode()).hexdigest()[:8]


def _fingerprint(stage: Stage, key: str, value: Any, *, by_time: bool = False) -> str:
    try:
        return fingerprint(value, by_time=by_time)
    except ConfigError as error:
        raise ConfigError(f"stages.{stage.name}: {key}: {error}") from error


def _is_under(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _references(value: Any) -> bool:
    return any(name not in OWN_PLACES for name in REFERENCE.findall(str(value)))


def decide(
    tracking_uri: str, stage: Stage, parts: KeyParts, folder: StageFolder, forced: Forced
) -> Decision:
    """Decide whether the result exists, complete and recorded, or why it must be made."""
    if forced.only is not None and forced.only != stage.name:
        done = folder.read_done()
        if done is None or folder.problem(done):
            return Decision(Action.RUN, "does not exist yet")
        return Decision(Action.REUSE, f"--only {forced.only}")
    if stage.name in forced.stages:
        return Decision(Action.RUN, "--force or --from asks for it", fresh=True)
    done = folder.read_done()
    if done is None:
        if folder.read_parts() is not None:
            return Decision(Action.RESUME, "was started and not finished")
        return Decision(Action.RUN, why_new(stage, parts, folder))
    if problem := folder.problem(done):
        return Decision(Action.RUN, f"output changed: {problem}", fresh=True)
    status = run_status(tracking_uri, done.run_id)
    if status == "MISSING":
        return Decision(Action.REBUILD, "result exists, its run is missing in MLflow: re-recorded")
    if status not in ("FINISHED", "UNKNOWN"):
        # The result was committed: MLflow only missed the end, which must not cost the result.
        return Decision(Action.REBUILD, f"result exists, its run is {status} in MLflow: corrected")
    return Decision(Action.REUSE, "nothing changed")


def why_new(stage: Stage, parts: KeyParts, folder: StageFolder) -> str:
    """Describe the differences from the most similar earlier result of this kind."""
    candidates = []
    for other in earlier_folders(folder.root, stage.kind_name):
        earlier = other.read_parts()
        if earlier is not None:
            done = other.read_done()
            lines = differences(earlier, parts)
            candidates.append((len(lines), -(done.finished_at if done else 0), lines))
    if not candidates:
        return "no earlier result"
    lines = min(candidates, key=lambda candidate: candidate[:2])[2]
    more = f" and {len(lines) - MAX_REASONS} more" if len(lines) > MAX_REASONS else ""
    return "; ".join(lines[:MAX_REASONS]) + more


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Return versions on which results may depend slightly, although they are not in the key."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "torchvision", "ray", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _notes(done: Done) -> tuple[str, ...]:
    changed = [
        f"{name} {before}, now {versions()[name]}"
        for name, before in done.made_with.items()
        if versions().get(name, before) != before
    ]
    return (f"was made with {', '.join(changed)}",) if changed else ()


def _cost(stage: Stage, folder: StageFolder, outputs: Mapping[str, str]) -> Cost:
    """Estimate the cost from the config, the data, and the latest result of this kind."""
    samples = _num_samples(stage, outputs)
    steps = _num_steps(stage.config, samples)
    earlier = [d for f in earlier_folders(folder.root, stage.kind_name) if (d := f.read_done())]
    if not earlier:
        return Cost(steps, samples)
    last = max(earlier, key=lambda done: done.finished_at)
    scale = steps / last.steps if steps and last.steps else 1.0
    return Cost(
        steps, samples, last.seconds * scale, sum(last.files.values()), last.peak_bytes or None
    )


def _num_samples(stage: Stage, outputs: Mapping[str, str]) -> int | None:
    values = dict(dotted(stage.config.model_dump(mode="json")))
    drawn = values.get("num_train")
    if values.get("synthetic"):
        return int(drawn) + int(values["num_val"]) if isinstance(drawn, int) else None
    spec = values.get("data.train", values.get("data"))
    spec = substitute(spec, outputs)
    return None if spec is None or _references(spec) else num_samples(spec)


def _num_steps(config: StrictConfig, samples: int | None) -> int | None:
    if samples is None:
        return None
    if isinstance(config, PretrainConfig):
        return num_steps(config.optim, samples)
    if not isinstance(config, DownstreamConfig):
        return None
    section = config.section
    num_trained = sum(map(section.takes_steps, section.kinds))
    # What a number of labels of each class comes to is not known without reading the labels.
    if not all(budget.is_share for budget in section.label_budgets):
        return None
    shares = [samples * budget.amount for budget in section.label_budgets]
    steps = num_trained * sum(num_steps(config.optim, round(x)) for x in shares)
    rates = config.optim.rates
    if len(rates) > 1:
        num_tuned = len(rates) * sum(map(section.uses_base_lr, section.kinds))
        tried = [round(x * (1 - HELD_SHARE)) for x in shares]
        steps += num_tuned * sum(num_steps(config.optim, x) for x in tried)
    return steps * len(section.seeds)


def plan_table(plans: list[Planned]) -> str:
    """Format the plan for a terminal, a line for each stage."""
    head = ("stage", "", "why", "steps", "samples", "time", "bytes", "memory")
    rows: list[tuple[str, ...]] = [head]
    for plan in plans:
        runs = plan.decision.action in (Action.RUN, Action.RESUME)
        cost = plan.cost if runs else Cost()
        why = "; ".join([plan.decision.why, *plan.notes])
        counts = ["" if x is None else f"{x:,}" for x in (cost.steps, cost.samples)]
        sizes = [_size(cost.num_bytes), _size(cost.peak_bytes)]
        row = (plan.stage.name, plan.decision.action.value, why, *counts, shown_time(cost.seconds))
        rows.append((*row, *sizes))
    columns = list(zip(*rows, strict=True))
    # What no stage's cost is known by, as before the first run, has no column.
    known = columns[:3] + [column for column in columns[3:] if any(column[1:])]
    widths = [max(map(len, column)) for column in known]
    lines = [
        "  ".join(
            cell.rjust(width) if i > 2 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*known, strict=True)
    ]
    return "\n".join(lines)


def shown_time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"


def _size(num_bytes: int | None) -> str:
    if num_bytes is None:
        return ""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def text_graph(chain: Chain) -> str:
    """Draw the graph for a terminal: each stage below the last of those that it needs."""
    order = [stage.name for stage in chain.stages]
    above = {s.name: max(s.needs, key=order.index, default=None) for s in chain.stages}
    lines: list[str] = []

    def draw(name: str | None, indent: str) -> None:
        below = [other for other in order if above[other] == name]
        for i, other in enumerate(below):
            is_last = i == len(below) - 1
            mark = "" if name is None else "└─ " if is_last else "├─ "
            lines.append(f"{indent}{mark}{other}")
            draw(other, indent + ("" if name is None else "   " if is_last else "│  "))

    draw(None, "")
    return "\n".join(lines)


def mermaid_graph(chain: Chain, states: Mapping[str, str]) -> str:
    """Write the graph for Mermaid; `states` are shown below the names."""
    numbers = {stage.name: f"s{i}" for i, stage in enumerate(chain.stages)}
    lines = ["graph LR"]
    for stage in chain.stages:
        state = states.get(stage.name, "")
        label = f"{stage.name}<br/>{state}" if state else stage.name
        lines.append(f'  {numbers[stage.name]}["{label}"]')
    for stage in chain.stages:
        lines += [f"  {numbers[need]} --> {numbers[stage.name]}" for need in stage.needs]
    return "\n".join(lines) + "\n"
