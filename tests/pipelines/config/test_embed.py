"""What names a run of `mae embed`."""

from typing import Any

import pytest

from pipelines.config.embed import EmbedConfig


def name_of(**values: Any) -> str:
    return EmbedConfig.model_validate({"init_from": "/c", "data": "/d", **values}).run_name


@pytest.mark.parametrize(
    "values", [{"features": "cls"}, {"img_size": [32, 32]}, {"rows_per_file": 7}, {"data": "/e"}]
)
def test_what_changes_the_files_is_another_run(values: dict[str, Any]) -> None:
    assert name_of(**values) != name_of()


@pytest.mark.parametrize(
    "values", [{"query": "/q.jpg"}, {"num_neighbours": 3}, {"scaling": {"num_workers": 2}}]
)
def test_a_search_uses_the_files_that_are_there(values: dict[str, Any]) -> None:
    assert name_of(**values) == name_of()


def test_one_number_is_a_square() -> None:
    config = EmbedConfig.model_validate({"init_from": "/c", "data": "/d", "img_size": 48})
    assert config.img_size == (48, 48)
