"""Every file in configs/ loads."""

from pathlib import Path

import pytest

from pipelines.config.downstream import (
    ClassifyConfig,
    DetectConfig,
    DownstreamConfig,
    SegmentConfig,
)
from pipelines.config.loading import load_config
from pipelines.config.prepare import PrepareConfig
from pipelines.config.pretrain import PretrainConfig

CONFIGS = Path(__file__).parents[2] / "configs"
PRETRAIN = sorted((CONFIGS / "pretrain").glob("*.yaml"))
PREPARE = sorted((CONFIGS / "prepare").glob("*.yaml"))
DOWNSTREAM: list[tuple[type[DownstreamConfig], Path]] = [
    (config_type, file)
    for config_type in (ClassifyConfig, DetectConfig, SegmentConfig)
    for file in sorted((CONFIGS / config_type.stage).glob("*.yaml"))
]
# kuberay.yaml is rendered, not passed to a stage: tests/infra/test_kuberay.py.
CLUSTER = sorted(set((CONFIGS / "cluster").glob("*.yaml")) - {CONFIGS / "cluster/kuberay.yaml"})


def test_there_are_configs() -> None:
    assert {file.name for file in PRETRAIN} >= {"demo.yaml", "vit_base_in1k.yaml"}
    assert {file.name for file in PREPARE} >= {"demo.yaml"}
    assert {config_type for config_type, _ in DOWNSTREAM} == {
        ClassifyConfig,
        DetectConfig,
        SegmentConfig,
    }


@pytest.mark.parametrize("file", PRETRAIN, ids=lambda file: file.name)
def test_each_pretrain_config_loads(file: Path) -> None:
    load_config(PretrainConfig, [file], environment={})


@pytest.mark.parametrize("file", PREPARE, ids=lambda file: file.name)
def test_each_prepare_config_loads(file: Path) -> None:
    load_config(PrepareConfig, [file], environment={})


@pytest.mark.parametrize(("config_type", "file"), DOWNSTREAM, ids=lambda x: getattr(x, "name", ""))
def test_each_downstream_config_loads(config_type: type[DownstreamConfig], file: Path) -> None:
    config = load_config(config_type, [file], ["init_from=checkpoint"], {})
    assert config.run_name.startswith(config.name)


@pytest.mark.parametrize("file", CLUSTER, ids=lambda file: file.name)
def test_each_cluster_config_goes_with_a_pretrain_config(file: Path) -> None:
    load_config(PretrainConfig, [CONFIGS / "pretrain/vit_base_in1k.yaml", file], environment={})


@pytest.mark.parametrize(
    "file", [*PRETRAIN, *PREPARE, *(file for _, file in DOWNSTREAM)], ids=lambda file: file.name
)
def test_each_config_says_its_command(file: Path) -> None:
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert comments
    if file.name != "demo.yaml" or file.parent.name != "pretrain":
        assert any(line.startswith("#   mae ") for line in comments)
