"""The report of a pipeline run: its content, and that it needs no network and runs no code."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from infra import tracking
from infra.config import StorageConfig, TrackingConfig
from mae_core.config import StrictConfig
from pipelines.chain import charts, report
from pipelines.chain.config import Chain, ChainConfig, Stage, StageSpec
from pipelines.chain.execute import Failure, StageRun, State
from pipelines.chain.folder import Done
from pipelines.chain.kinds import StageKind
from pipelines.chain.plan import Forced, plan_chain
from pipelines.chain.promote import Judgement
from pipelines.chain.record import PipelineRun
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import StageResult

METRICS = {"finetune/top1": 0.5, "finetune/top1_std": 0.01, "scratch/top1": 0.4, "data/left_out": 2}


class Own(StrictConfig):
    text: str = "<script>alert(1)</script>"


KIND = StageKind(Own, "", (), (), headline=("/top1",))


class Tags(HTMLParser):
    """Collects every start tag with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture
def run(tmp_path: Path, store_uri: str) -> PipelineRun:
    """Build a run: one stage done with pictures and broken samples, one failed, one blocked."""
    names = ("good", "bad", "after")
    config = ChainConfig(
        name="c",
        stages={name: StageSpec() for name in names},
        storage=StorageConfig(root=str(tmp_path / "runs")),
        tracking=TrackingConfig(uri=store_uri, experiment="c"),
    )
    stages = tuple(Stage(name, StageSpec(), name, KIND, Own()) for name in names)
    chain = Chain(config, stages)
    plans = plan_chain(chain, Forced())
    folder = Path(plans[0].folder.uri) / "good/run-1"
    (folder / "arms/finetune-1-seed0").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "arms/finetune-1-seed0/confusion.png")
    Image.fromarray(pixels[:50, :50]).save(folder / "arms/finetune-1-seed0/other.png")
    bad = [{"shard": "a.tar", "key": "x<b>", "kind": "truncated"}] * 2
    (folder / "bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    track = config.tracking
    run_id = tracking.start_run(track, run_name="r", params={}, tags={}, run_id=None)
    writer = tracking.MetricWriter(track.uri, run_id)
    for step in (1, 2, 3):
        writer.write({"finetune-1-seed0/train/loss": 1 / step, "train/other": 1}, step)
    writer.close()
    result = StageResult("good", "done", run_id, str(folder), METRICS)
    found = PipelineRun(chain, plans, ("good.text=<i>",), "2026-11-25T000000Z", run_id="r1")
    nodes = {stage.name: stage.node for stage in stages}
    failure = Failure("it broke: <img src=x onerror=alert(1)>", 4, can_pass=False)
    found.stages = {
        "good": StageRun(nodes["good"], State.DONE, result, tries=2, seconds=75.0),
        "bad": StageRun(nodes["bad"], State.FAILED, failure=failure, tries=1, seconds=3.0),
        "after": StageRun(
            nodes["after"], State.BLOCKED, failure=Failure("needs bad", 0, can_pass=False)
        ),
    }
    return found


def test_the_page_needs_nothing_from_elsewhere(run: PipelineRun) -> None:
    tags = Tags(report.render(run)).found
    assert not [tag for tag, _ in tags if tag in ("script", "link", "iframe")]
    sources = [attrs["src"] for tag, attrs in tags if tag == "img"]
    assert len(sources) == 3  # two pictures and a chart
    assert all(source and source.startswith("data:image/") for source in sources)
    assert "viewport" in [attrs.get("name") for tag, attrs in tags if tag == "meta"]


def test_what_others_wrote_is_shown_and_not_run(run: PipelineRun) -> None:
    page = report.render(run)
    tags = Tags(page).found
    assert not [attrs for _, attrs in tags if "onerror" in attrs]
    assert "<script>alert" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "x&lt;b&gt;" in page


def test_the_page_says_what_became_of_each_stage(run: PipelineRun) -> None:
    text = re.sub(r"<[^>]+>", " ", report.render(run))
    words = " ".join(text.split())
    assert "c failed" in words
    assert "good done no earlier result 1m15s 2" in words
    assert "bad failed no earlier result 0m03s 1" in words
    assert "after blocked" in words
    assert "needs bad" in words
    assert "good/ finetune/ top1 0.500" in words
    assert "finetune 0.500 ± 0.010 scratch 0.400" in words
    assert "good truncated 2 a.tar: x" in words
    assert "Retried: good (2 tries)." in words
    assert "good: loss by optimizer step" in words


def test_the_page_says_what_pretraining_gives(run: PipelineRun) -> None:
    folder = Path(run.plans[0].folder.uri) / "good/run-1"
    lines = [
        "",
        "What pretraining gives:",
        "",
        "- top1: +0.081 ± 0.022",
        "- **Warning**: <b>low</b>",
    ]
    (folder / "verdict.md").write_text("\n".join(lines))
    page = report.render(run)
    assert "<p>top1: +0.081 ± 0.022</p>" in page
    assert "<p>Warning: &lt;b&gt;low&lt;/b&gt;</p>" in page


def test_a_chart_is_drawn_once_and_then_taken_from_the_stages_folder(
    run: PipelineRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.render(run)
    (kept,) = Path(run.plans[0].folder.uri).glob("chart-*.svg")

    monkeypatch.setattr(charts, "draw", lambda *_: pytest.fail("drawn again"))
    assert base64.b64encode(kept.read_bytes()).decode() in report.render(run)

    drawn: list[str] = []
    monkeypatch.setattr(charts, "draw", lambda _, label: drawn.append(label) or b"<svg/>")
    monkeypatch.setattr(report, "DRAWING", 2)  # another way to draw
    report.render(run)
    assert drawn == ["loss"]


def test_large_pictures_are_made_smaller(run: PipelineRun) -> None:
    sizes = [
        len(str(attrs["src"])) for tag, attrs in Tags(report.render(run)).found if tag == "img"
    ]
    whole = Path(run.results["good"].output, "arms/finetune-1-seed0/confusion.png").stat().st_size
    assert max(sizes) < whole / 4


def test_a_refusal_is_at_the_top(run: PipelineRun) -> None:
    run.stages = {"good": run.stages["good"]}
    run.verdict = Judgement(is_refused=True, text="m@champion: not better", value=0.4)
    page = report.render(run)
    assert page.index("Not promoted") < page.index("Stages")
    assert 'state refused">refused' in page


def test_the_description_for_mlflow_links_runs(run: PipelineRun) -> None:
    lines = report.stage_table(run).splitlines()
    run_id = run.results["good"].run_id
    assert re.match(
        rf"\| \[good\]\(#/experiments/\d+/runs/{run_id}\?workflowType=machine_learning\) "
        r"\| done \| no earlier result \|  \| 1m15s \| finetune/top1 0.500, scratch/top1 0.400 \|",
        lines[4],
    )
    assert lines[5] == "| bad | failed | no earlier result |  | 0m03s |  |"


def test_the_description_begins_with_why_the_run_failed(run: PipelineRun) -> None:
    failure = Failure("out of memory |\nand much more", 5, can_pass=True)
    run.stages["bad"] = replace(run.stages["bad"], failure=failure)
    run.trouble = "promote: refused"
    lines = report.stage_table(run).splitlines()
    assert lines[:4] == [
        "**bad failed**: out of memory \\|",
        "",
        "**failed**: promote: refused",
        "",
    ]


def test_the_page_says_when_what_it_reuses_was_made(run: PipelineRun) -> None:
    done = Done(output="o", run_id=None, metrics={}, files={}, seconds=75.0, finished_at=1e9)
    run.plans[0] = replace(run.plans[0], done=done)
    run.stages["good"] = replace(run.stages["good"], state=State.REUSED)
    words = " ".join(re.sub(r"<[^>]+>", " ", report.render(run)).split())
    assert "good reused no earlier result 2001-09-09 01:46 UTC 1m15s" in words
    assert "good made 2001-09-09 01:46 UTC" in words
    table = report.stage_table(run)
    assert "| no earlier result | 2001-09-09 01:46 UTC | 1m15s |" in table
    assert "| stage | state | why | made | time | result |\n" in table
    # A row with more cells than the header has its values under the wrong names.
    assert {line.count("|") for line in table.splitlines() if line.startswith("|")} == {7}


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("knn/top1", 0.08333, "0.083"),
        ("detect/ap", 0.0, "0.000"),
        ("a/loss", 1e-5, "1.0e-05"),
        ("num_bytes", 2037760.0, "2,037,760"),
        ("data/left_out", 3.0, "3"),
        ("images_per_s", 12345.6, "12,346"),
        ("classify/auroc", float("nan"), "-"),
    ],
)
def test_a_number_looks_the_same_wherever_it_is_shown(key: str, value: float, shown: str) -> None:
    assert report.number(key, value) == shown


def test_names_break_after_their_marks_only(run: PipelineRun) -> None:
    page = report.render(run)
    assert "good/<wbr>finetune/<wbr>top1" in page
    assert "overflow-wrap: anywhere" not in page[page.index(".tile {") : page.index(".why {")]


def test_without_mlflow_there_is_a_page_without_curves(run: PipelineRun) -> None:
    config = run.chain.config
    down = config.tracking.model_copy(update={"uri": "http://127.0.0.1:9"})
    run.chain = Chain(config.model_copy(update={"tracking": down}), run.chain.stages)
    page = report.render(run)
    assert "loss by optimizer step" not in page
    assert "good" in page


def test_a_stage_that_made_no_checkpoint_has_no_card(run: PipelineRun) -> None:
    assert report.model_card(run, "good") is None


def test_the_model_card_says_where_data_and_model_lie(run: PipelineRun, tmp_path: Path) -> None:
    config = PretrainConfig.model_validate({"data": {"train": "{good}/train"}})
    stage = Stage("p", StageSpec(), "pretrain", KIND, config)
    run.chain = Chain(run.chain.config, (*run.chain.stages, stage))
    run.plans = [*run.plans, run.plans[0]]
    run.plans[-1] = replace(run.plans[0], stage=stage)
    checkpoint = tmp_path / "step-1"
    checkpoint.mkdir()
    model = {"encoder": "vit_micro", "img_size": [64, 96], "patch_size": 16, "in_chans": 4}
    fields = {"model": model, "step": 1, "data_digest": "d1"}
    (checkpoint / "manifest.json").write_text(json.dumps(fields))
    result = StageResult("pretrain", "done", "r2", str(checkpoint), {"data/left_out": 3.0})
    run.stages["p"] = StageRun(stage.node, State.DONE, result)
    card = report.model_card(run, "p")
    assert card is not None
    assert f"`train`: {run.results['good'].output}/train" in card
    assert f'folder = Path("{checkpoint}")\nencoder, manifest = load_encoder(folder)' in card
    assert "64x96 pixels in 4 channels" in card
    assert "left out in training: 3." in card
    assert "| good/finetune/top1 | 0.500 |" in card
