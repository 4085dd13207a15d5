"""`mae prepare` packs images, draws them, or reads tars: one of these at a time."""

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.config.prepare import PrepareConfig


@pytest.mark.parametrize(
    "values",
    [{}, {"source": "/a", "synthetic": "shapes"}, {"existing": "index", "source": "/a"}],
)
def test_there_is_one_origin_of_the_images(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give one of source=FOLDER, synthetic=shapes"):
        PrepareConfig.model_validate({"output": "/o", **values})


@pytest.mark.parametrize("key", ["annotations", "classes"])
def test_labels_of_drawn_images_are_not_taken_from_elsewhere(key: str) -> None:
    with pytest.raises(ValidationError, match=f"{key} needs source: the folder of the images"):
        PrepareConfig.model_validate({"output": "/o", "synthetic": "shapes", key: "/x"})


@pytest.mark.parametrize("split", ["a/b", "..", "", "-x"])
def test_a_split_is_part_of_a_file_name(split: str) -> None:
    with pytest.raises(ValidationError, match="split"):
        PrepareConfig.model_validate({"output": "/o", "source": "/a", "split": split})
