"""Every file in configs/ loads."""

from pathlib import Path

import pytest

from pipelines.config import PrepareConfig, PretrainConfig, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
PRETRAIN = sorted((CONFIGS / "pretrain").glob("*.yaml"))
PREPARE = sorted((CONFIGS / "prepare").glob("*.yaml"))
CLUSTER = sorted((CONFIGS / "cluster").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert {file.name for file in PRETRAIN} >= {"demo.yaml", "vit_base_in1k.yaml"}
    assert {file.name for file in PREPARE} >= {"demo.yaml"}


@pytest.mark.parametrize("file", PRETRAIN, ids=lambda file: file.name)
def test_each_pretrain_config_loads(file: Path) -> None:
    load_config(PretrainConfig, [file], environment={})


@pytest.mark.parametrize("file", PREPARE, ids=lambda file: file.name)
def test_each_prepare_config_loads(file: Path) -> None:
    load_config(PrepareConfig, [file], environment={})


@pytest.mark.parametrize("file", CLUSTER, ids=lambda file: file.name)
def test_each_cluster_config_goes_with_a_pretrain_config(file: Path) -> None:
    load_config(PretrainConfig, [CONFIGS / "pretrain/vit_base_in1k.yaml", file], environment={})


@pytest.mark.parametrize("file", [*PRETRAIN, *PREPARE], ids=lambda file: file.name)
def test_each_config_says_its_command(file: Path) -> None:
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert comments
    if file.name != "demo.yaml" or file.parent.name != "pretrain":
        assert any(line.startswith("#   mae ") for line in comments)
