"""The YAML, JSON and Python examples of the pages are valid, and whole files of them load."""

import ast
import json
import re
from pathlib import Path

import pytest

from infra.yaml_files import read_yaml
from pipelines.chain.config import load_chain

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/guides/chain.md"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def examples(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_examples_are_valid_in_their_language(tmp_path: Path) -> None:
    for page in PAGES:
        for text in examples(page, "json"):
            json.loads(text)
        for text in examples(page, "python"):
            ast.parse(text)
        for text in examples(page, "yaml"):
            (tmp_path / "example.yaml").write_text(text)
            read_yaml(tmp_path / "example.yaml")


def test_the_pipeline_of_the_guide_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "demo.yaml").write_text(examples(GUIDE, "yaml")[0])
    chain = load_chain(tmp_path / "demo.yaml")
    names = [stage.name for stage in chain.stages]
    assert sorted(names) == ["detect-again", "prepare", "pretrain", "validate"]


def test_the_stage_of_the_guide_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (stage,) = examples(GUIDE, "python")
    Path("my_stages").mkdir()
    Path("my_stages/count.py").write_text(stage)
    Path("count.yaml").write_text(
        "name: own\nstages: {count: {stage: my_stages/count.py, set: {data: shards}}}\n"
    )
    assert load_chain(Path("count.yaml"))["count"].kind.data_keys == ("data",)
