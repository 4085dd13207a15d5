"""`mae config`: the origin of values, and the schema for editors."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.commands.config import command
from pipelines.config.loading import load_with_origins
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError

ROOT = Path(__file__).parents[3]
KINDS_OF_FILES = ("chain", "classify", "detect", "prepare", "pretrain", "segment")
FILES = [
    *(
        (kind, file)
        for kind in KINDS_OF_FILES
        for file in sorted((ROOT / "configs" / kind).glob("*.yaml"))
    ),
    ("schedules", ROOT / "configs/schedules.yaml"),
    ("cluster", ROOT / "configs/cluster/kuberay.yaml"),
]


@pytest.fixture(autouse=True)
def _place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("MAE__"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    Path("one.yaml").write_text(
        "data:\n  train: in\nmodel:\n  encoder: vit_tiny\n  decoder: {dim: 64, depth: 3}\n"
    )
    Path("two.yaml").write_text("# over it\noptim:\n  epochs: 9\ndata: {train: other}\n")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, tuple[Any, str]]:
    assert command(["show", "pretrain", *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    return {key: (row["value"], row["origin"]) for key, row in told.items()}


def test_each_value_has_its_origin(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAE__OPTIM__BASE_LR", "3e-4")
    monkeypatch.setenv("MAE__STORAGE__ROOT", "s3://b/runs")
    rows = shown(capsys, "one.yaml", "two.yaml", "storage.root=here", "model.decoder={dim: 32}")
    assert rows["data.train"] == ("other", "two.yaml:4")
    assert rows["optim.epochs"] == (9, "two.yaml:3")
    assert rows["model.encoder"] == ("vit_tiny", "one.yaml:4")
    assert rows["model.decoder.depth"] == (3, "one.yaml:5")
    # Written as a block, over what a file says of one key in it.
    assert rows["model.decoder.dim"] == (32, "command line")
    assert rows["model.img_size"] == ([224, 224], "default")  # though its section is in a file
    assert rows["optim.base_lr"] == (3e-4, "environment MAE__OPTIM__BASE_LR")
    assert rows["storage.root"] == ("here", "command line")
    assert rows["seed"] == (0, "default")


def test_a_block_in_the_environment_is_the_origin_of_what_is_in_it() -> None:
    environment = {"MAE__MODEL__DECODER": "{dim: 96, num_heads: 3}"}
    config, origins = load_with_origins(PretrainConfig, [Path("one.yaml")], (), environment)
    assert (config.model.decoder.dim, config.model.decoder.depth) == (96, 3)
    assert origins["model.decoder.dim"] == "environment MAE__MODEL__DECODER"
    assert origins["model.decoder.depth"] == "one.yaml:5"


def test_the_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["show", "prepare", "source=a", "output=b", "seed=7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["source", "a", "command", "line"]
    assert "seed                  7          command line" in lines
    assert len({line.index("command line") for line in lines if "command line" in line}) == 1
    assert len({line.index("default") for line in lines if "default" in line}) == 1


def test_a_stage_of_one_s_own_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(
        "from mae_core.config import StrictConfig\n"
        "class Config(StrictConfig):\n    size: int = 3\n"
        "def run(config, *, fresh): ...\n"
    )
    command(["show", "mine.py", "--debug", "size=4"])
    assert capsys.readouterr().out == "size  4  command line\n"


@pytest.mark.parametrize("words", [["show", "pretrian"], ["schema", "pretrian"]])
def test_an_unknown_stage_is_told_with_the_nearest(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"no stage 'pretrian'; did you mean pretrain. There are"):
        command(words)


def test_a_mistake_is_told_as_the_stage_itself_tells_it() -> None:
    with pytest.raises(ConfigError, match=r"command line optim\.epohcs: no such key"):
        command(["show", "pretrain", "data.train=x", "optim.epohcs=3"])


def schema_of(capsys: pytest.CaptureFixture[str], *stage: str) -> dict[str, Any]:
    assert command(["schema", *stage]) == 0
    schema: dict[str, Any] = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


@pytest.mark.parametrize(("kind", "file"), FILES, ids=lambda x: getattr(x, "name", x))
def test_each_file_that_comes_with_the_project_fits_its_schema(
    kind: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(file.read_text())
    jsonschema.validate(values, schema_of(capsys, kind))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("pretrain", {"optim": {"epohcs": 3}}, "'epohcs' was unexpected"),
        ("pretrain", {"model": {"img_size": "big"}}, "'big' is not valid under any"),
        ("pretrain", {"masking": {"kind": "blok"}}, "'blok' is not one of"),
        ("chain", {"stages": {}}, "'name' is a required property"),
        ("schedules", {"schedules": [{"name": "n", "chain": "c", "crom": "x"}]}, "'crom' was unex"),
    ],
)
def test_a_schema_sees_mistakes(
    kind: str, values: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(jsonschema.ValidationError) as caught:
        jsonschema.validate(values, schema_of(capsys, kind))
    assert message in caught.value.message


def test_the_schema_of_all_stages_takes_a_file_of_any(capsys: pytest.CaptureFixture[str]) -> None:
    schema = schema_of(capsys)
    jsonschema.validate({"query": "a.jpg"}, schema)  # embed's
    jsonschema.validate({"masking": {"mask_ratio": 0.6}}, schema)  # pretrain's
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"query": "a.jpg", "masking": {}}, schema)


def test_a_schema_tells_an_editor_what_each_field_means(capsys: pytest.CaptureFixture[str]) -> None:
    model = schema_of(capsys, "pretrain")["$defs"]["ModelConfig"]["properties"]
    assert model["patch_size"]["description"].startswith("Side of a square patch, in pixels.")
    assert model["img_size"]["description"].startswith("Height and width of the training crop")
