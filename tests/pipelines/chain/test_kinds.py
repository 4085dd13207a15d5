"""What the graph says of each kind of stage agrees with the stage's code and config."""

import importlib.util

import pytest

from mae_core.config import StrictConfig
from pipelines.chain.kinds import KINDS


def field_of(config_type: type[StrictConfig], key: str) -> object:
    """Return the annotation of a dotted key; KeyError without such a field."""
    annotation: object = config_type
    for name in key.split("."):
        assert isinstance(annotation, type)
        assert issubclass(annotation, StrictConfig)
        annotation = annotation.model_fields[name].annotation
    return annotation


@pytest.mark.parametrize("name", KINDS)
def test_modules_that_count_are_there_and_one_is_the_stage_itself(name: str) -> None:
    modules = KINDS[name].modules
    assert f"pipelines.{name}" in modules
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


@pytest.mark.parametrize("name", KINDS)
def test_fields_that_name_data_are_fields_of_the_config(name: str) -> None:
    for key in KINDS[name].data_keys:
        field_of(KINDS[name].config_type, key)


def test_kinds_with_a_config_of_their_own_are_all_there() -> None:
    assert sorted(KINDS) == [
        "classify",
        "detect",
        "embed",
        "prepare",
        "pretrain",
        "segment",
        "validate",
    ]


def test_a_table_of_stages_shows_the_metrics_that_stages_have() -> None:
    assert {name: kind.headline for name, kind in KINDS.items() if kind.headline} == {
        "pretrain": ("linear/top1", "linear/top1_untrained", "linear/top1_pixels"),
        "classify": ("/top1", "/auroc"),
        "detect": ("/ap", "/ap50"),
        "embed": ("num_images",),
        "segment": ("/miou",),
    }
