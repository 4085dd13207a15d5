"""Write the report of a pipeline run, one HTML file that works offline, and the model card."""

import base64
import hashlib
import io
import json
import math
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from PIL import Image

from infra import machine, storage, tracking
from infra.own_files import read_lines
from pipelines.chain.config import substitute
from pipelines.chain.execute import ENDED_WELL, StageRun, State
from pipelines.chain.plan import Planned, shown_time, text_graph, versions
from pipelines.chain.record import PipelineRun
from pipelines.driver import git_commit
from pipelines.outcome import StageResult

TEMPLATES = Path(__file__).parent / "templates"
MAX_PICTURES = 60  # per stage
MAX_PICTURE_PX = 1400
JPEG_QUALITY = 85
MAX_EXAMPLE_CHARS = 120
COUNTS = ("left_out", "bad_samples")  # metrics that are integers, besides those named num_...
LARGE, SMALL = 1000, 0.0005  # where three decimals show too much, or nothing
# Pictures that people look at first; the others are folded away.
FIRST_PICTURES = (
    "reconstruction.png",
    "label_fraction.png",
    "finetune-1-seed0/confusion.png",
    "finetune-1-seed0/detections.png",
    "finetune-1-seed0/segmentation.png",
)
CURVES = {"train/loss": "loss", "worker/images_per_s": "images/s"}
DRAWING = 1  # increased when curves are drawn in another way


class Picture(NamedTuple):
    caption: str
    source: str  # a data: URI


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]


def render(run: PipelineRun) -> str:
    """Render the page as HTML."""
    failures = [x for x in run.stages.values() if x.failure and x.state not in ENDED_WELL]
    return (
        _environment()
        .get_template("report.html")
        .render(
            run=run,
            title=f"{run.chain.config.name} {run.name}",
            status=_status(run),
            started=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.started_at)),
            total_time=shown_time(time.time() - run.started_at),
            failures=[
                {"name": x.node.name, "state": x.state.value, "message": x.failure.message}
                for x in failures
                if x.failure is not None
            ],
            trouble=run.trouble,
            headline=[(_breakable(name), number(name, x)) for name, x in run.headline.items()],
            stages=[_stage_row(run, stage) for stage in run.stages.values()],
            graph=text_graph(run.chain),
            root=storage.absolute(run.chain.config.storage.root),
            charts=list(_charts(run)),
            results=[_result(run, name, result) for name, result in run.results.items()],
            skipped=list(_skipped(run)),
            recoveries=_recoveries(run),
            environment=_facts_of_machine(),
        )
    )


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(name: str) -> Markup:
    """Allow line breaks in a name or path after punctuation, but not within words."""
    return Markup(re.sub(r"([/_@=.-])", r"\1<wbr>", str(escape(name))))


def _status(run: PipelineRun) -> str:
    states = {stage.state for stage in run.stages.values()}
    if State.CANCELLED in states:
        return "cancelled"
    if not states <= set(ENDED_WELL):
        return "failed"
    if run.trouble:
        return "failed"
    if run.verdict is not None and run.verdict.is_refused:
        return "refused"
    return "reused" if states == {State.REUSED} else "done"


def _stage_row(run: PipelineRun, stage: StageRun) -> dict[str, Any]:
    name = stage.node.name
    plan = next(plan for plan in run.plans if plan.stage.name == name)
    is_reused = stage.state is State.REUSED
    seconds = plan.done.seconds if is_reused and plan.done else stage.seconds
    root = storage.absolute(run.chain.config.storage.root)
    return {
        "name": name,
        "state": stage.state.value,
        "why": plan.decision.why,
        "made": _made(plan, stage),
        "time": shown_time(seconds) if seconds else "",
        "tries": 0 if is_reused else stage.tries,
        "output": stage.result.output.removeprefix(f"{root}/") if stage.result else "",
    }


def _made(plan: Planned, stage: StageRun) -> str:
    """Return when a reused result was made; "" if this run made it."""
    if stage.state is not State.REUSED or plan.done is None:
        return ""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(plan.done.finished_at))


def stage_table(run: PipelineRun) -> str:
    """Write Markdown for MLflow's description: why the run failed, then the stages with links."""
    uri = run.chain.config.tracking.uri
    lines = [
        *_why_it_failed(run),
        "| stage | state | why | made | time | result |",
        "|---|---|---|---|---|---|",
    ]
    for stage in run.stages.values():
        row = _stage_row(run, stage)
        result = stage.result
        link = tracking.run_link(uri, result.run_id) if result and result.run_id else ""
        name = f"[{row['name']}]({link})" if link else row["name"]
        metrics = [
            f"{key.removeprefix(row['name'] + '/')} {number(key, value)}"
            for key, value in run.headline.items()
            if key.startswith(f"{row['name']}/")
        ]
        why = row["why"].replace("|", "\\|")
        cells = [name, row["state"], why, row["made"], row["time"], ", ".join(metrics)]
        lines.append(f"| {' | '.join(cells)} |")
    if run.verdict is not None:
        lines += [
            "",
            f"**{'Refused' if run.verdict.is_refused else 'Promotion'}**: {run.verdict.text}",
        ]
    return "\n".join(lines)


def _why_it_failed(run: PipelineRun) -> list[str]:
    """Return a paragraph for each failure, but none for stages that a failure blocked."""
    reasons = [
        f"**{stage.node.name} {stage.state.value}**: {_plain(stage.failure.line)}"
        for stage in run.stages.values()
        if stage.failure is not None and stage.state in (State.FAILED, State.CANCELLED)
    ]
    if run.trouble:
        reasons.append(f"**failed**: {_plain(run.trouble)}")
    return [line for reason in reasons for line in (reason, "")]


def _plain(text: str) -> str:
    """Escape text so that Markdown and HTML have no effect in it."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", text)


def _charts(run: PipelineRun) -> Iterator[Picture]:
    uri = run.chain.config.tracking.uri
    places = {plan.stage.name: plan.folder.uri for plan in run.plans}
    for name, result in run.results.items():
        found = tracking.histories(uri, result.run_id, tuple(CURVES))
        for end, label in CURVES.items():
            curves = {
                key.removesuffix(end).strip("/"): points
                for key, points in found.items()
                if key.endswith(end) and len(points) > 1
            }
            if curves:
                source = _data_source("image/svg+xml", _chart(places[name], curves, label))
                yield Picture(f"{name}: {label} by optimizer step", source)


def _chart(folder_uri: str, curves: Mapping[str, tracking.Points], label: str) -> bytes:
    """Return a drawing of curves, which an earlier run may have left in the stage's folder.

    Where all stages are reused, drawing would take a third of the command's time.
    """
    facts = json.dumps([DRAWING, label, list(curves.items())])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    uri = storage.join(folder_uri, f"chart-{digest}.svg")
    with suppress(FileNotFoundError):
        return storage.read_bytes(uri)
    # Imported by name, because matplotlib is needed only here.
    drawn: bytes = import_module("pipelines.chain.charts").draw(curves, label)
    storage.write_bytes(uri, drawn)
    return drawn


def _result(run: PipelineRun, name: str, result: StageResult) -> dict[str, Any]:
    config = run.chain[name].config.model_dump(mode="json")
    pictures = list(_pictures(run, name))
    first = [p for end, p in pictures if end.endswith(FIRST_PICTURES)]
    more = [p for end, p in pictures if not end.endswith(FIRST_PICTURES)]
    plan = next(plan for plan in run.plans if plan.stage.name == name)
    return {
        "name": name,
        "made": _made(plan, run.stages[name]),
        "table": _metric_table(result.metrics),
        "verdict": _verdict_lines(run, name),
        "pictures": first,
        "more_pictures": more,
        "config": json.dumps(config, indent=1),
        "metrics": "\n".join(f"{key:40} {value:.6g}" for key, value in result.metrics.items()),
    }


def _verdict_lines(run: PipelineRun, name: str) -> list[str]:
    """Return what the stage says that pretraining gives; nothing for other stages."""
    folder = next(plan.folder for plan in run.plans if plan.stage.name == name)
    lines: list[str] = []
    for path in sorted(storage.list_tree(folder.uri)):
        if path.endswith("/verdict.md"):
            lines += storage.read_bytes(storage.join(folder.uri, path)).decode().splitlines()
    return [line.removeprefix("- ").replace("**", "") for line in lines if line.startswith("- ")]


def _metric_table(metrics: Mapping[str, float]) -> Table:
    """Build a table of arms by metrics if the names allow it, otherwise one of two columns."""
    split = [key.split("/") for key in metrics]
    if all(len(parts) >= 2 for parts in split if parts[0] != "data") and len(split) > 2:
        arms = list(dict.fromkeys(parts[0] for parts in split if parts[0] != "data"))
        # Each class has figures of its own; these are in the list of all metrics.
        names = list(dict.fromkeys(p[1] for p in split if len(p) == 2 and p[0] != "data"))
        names = [name for name in names if not name.endswith(("_std", "_se"))]
        rows = [[arm, *(_cell(metrics, f"{arm}/{name}") for name in names)] for arm in arms]
        return Table(["", *names], rows)
    return Table(["metric", "value"], [[key, number(key, value)] for key, value in metrics.items()])


def number(key: str, value: float) -> str:
    """Format a metric as all pages show it: counts as integers, others with three decimals."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    name = key.rsplit("/", 1)[-1]
    if name.startswith("num_") or name in COUNTS or abs(value) >= LARGE:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= SMALL else f"{value:.1e}"


def _cell(metrics: Mapping[str, float], key: str) -> str:
    value = metrics.get(key)
    if value is None:
        return ""
    spread = metrics.get(f"{key}_std", metrics.get(f"{key}_se"))
    return number(key, value) if spread is None else f"{number(key, value)} ± {spread:.3f}"


def _pictures(run: PipelineRun, name: str) -> Iterator[tuple[str, Picture]]:
    """Yield the pictures that the stage wrote to its folder, which are also in MLflow."""
    folder = next(plan.folder for plan in run.plans if plan.stage.name == name)
    paths = [p for p in sorted(storage.list_tree(folder.uri)) if p.endswith(".png")]
    for path in paths[:MAX_PICTURES]:
        if "/checkpoints/" not in path:
            data = storage.read_bytes(storage.join(folder.uri, path))
            parts = path.removesuffix(".png").split("/")
            caption = " ".join(part for part in parts[2:] if part != "arms").replace("_", " ")
            yield path, Picture(f"{name}: {caption}", _data_uri(data))


def _data_uri(png: bytes) -> str:
    with Image.open(io.BytesIO(png)) as image:
        shown = image.convert("RGB")
    shown.thumbnail((MAX_PICTURE_PX, 4 * MAX_PICTURE_PX))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=JPEG_QUALITY)
    data = min(buffer.getvalue(), png, key=len)
    return _data_source("image/png" if data is png else "image/jpeg", data)


def _data_source(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _skipped(run: PipelineRun) -> Iterator[dict[str, Any]]:
    for plan in run.plans:
        if plan.stage.name not in run.results:
            continue
        names = storage.list_tree(plan.folder.uri)
        for path in [n for n in names if n.endswith(("bad_samples.jsonl", "skipped.jsonl"))]:
            place = storage.join(plan.folder.uri, path)
            lines = read_lines(place)
            kinds = Counter(str(x.get("kind") or x.get("reason", "")) for x in lines)
            for kind, count in kinds.most_common():
                one = next(x for x in lines if kind in (x.get("kind"), x.get("reason")))
                example = one.get("source") or f"{one.get('shard')}: {one.get('key')}"
                yield {
                    "stage": plan.stage.name,
                    "kind": kind,
                    "count": count,
                    "example": str(example)[-MAX_EXAMPLE_CHARS:],
                }


def _recoveries(run: PipelineRun) -> str:
    again = [f"{x.node.name} ({x.tries} tries)" for x in run.stages.values() if x.tries > 1]
    resumed = [p.stage.name for p in run.plans if p.decision.action.value == "resume"]
    parts = []
    if again:
        parts.append(f"Retried: {', '.join(again)}.")
    if resumed:
        parts.append(f"Resumed where they were stopped: {', '.join(resumed)}.")
    return " ".join(parts) or "No stage had to be retried."


def _facts_of_machine() -> list[tuple[str, str]]:
    memory = machine.memory_bytes() / 2**30
    facts = {
        **versions(),
        "system": f"{platform.system()} {platform.release()}",
        "CPUs": str(machine.count_cpus()),
        "memory": f"{memory:.0f} GiB",
    }
    commit = git_commit()
    return [*facts.items(), *([("commit", commit)] if commit else [])]


def model_card(run: PipelineRun, name: str) -> str | None:
    """Write Markdown about the model that stage `name` pretrained; None without a checkpoint."""
    result = run.results[name]
    try:
        text = storage.read_bytes(storage.join(result.output, "manifest.json"))
    except FileNotFoundError:
        return None
    manifest = json.loads(text)
    model = manifest["model"]
    outputs = {stage: result.output for stage, result in run.results.items()}
    config = substitute(run.chain[name].config.model_dump(mode="json"), outputs)
    shown = {
        "architecture": model["encoder"],
        "image, patch": f"{'x'.join(map(str, _pair(model['img_size'])))}, {model['patch_size']}",
        "channels": model["in_chans"],
        "masking": f"{config['masking']['kind']}, {config['masking']['mask_ratio']} removed",
        "optimizer steps": manifest["step"],
        "key": next(p.folder.key for p in run.plans if p.stage.name == name),
        "MLflow run": result.run_id,
        "checkpoint": result.output,
    }
    metrics = {k: number(k, v) for k, v in run.headline.items()}
    data = {key: config["data"][key] for key in ("train", "val") if config["data"].get(key)}
    return (
        _environment()
        .get_template("model_card.md")
        .render(
            run=run,
            name=f"{run.chain.config.name}/{name}",
            facts=_escaped(shown.items()),
            metrics=_escaped(metrics.items()),
            data=[*data.items(), ("digest", manifest.get("data_digest", ""))],
            left_out=int(result.metrics.get("data/left_out", 0)),
            checkpoint=result.output,
            is_remote=storage.is_remote(result.output),
            size="x".join(map(str, _pair(model["img_size"]))),
            channels=model["in_chans"],
        )
    )


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _escaped(items: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(key, str(value).replace("|", "\\|")) for key, value in items]
