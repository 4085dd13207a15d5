"""Which parts of a source file count for the cache, and which do not."""

import ast
from pathlib import Path

import pytest

from pipelines.chain.code import code_digests, source_digest
from pipelines.chain.kinds import KINDS

SOURCE = '''
"""What it does."""
import math

def area(r: float) -> float:
    """Of a disc."""
    return math.pi * r**2  # in pixels
'''


def digest(text: str) -> str:
    return source_digest(ast.parse(text))


@pytest.mark.parametrize(
    "same",
    [
        SOURCE.replace("  # in pixels", ""),
        SOURCE.replace("# in pixels", "# in square pixels"),
        SOURCE.replace("Of a disc.", "Area of a disc."),
        SOURCE.replace("What it does.", "Areas."),
        SOURCE.replace("\n\n", "\n\n\n\n"),
        SOURCE.replace("math.pi * r**2", "(math.pi\n        * r ** 2)"),
    ],
)
def test_comments_layout_and_docstrings_do_not_count(same: str) -> None:
    assert same != SOURCE
    assert digest(same) == digest(SOURCE)


@pytest.mark.parametrize(
    "other",
    [
        SOURCE.replace("r**2", "r**3"),
        SOURCE.replace("area", "surface"),
        SOURCE.replace("import math", "import cmath as math"),
        SOURCE.replace("r: float", "r: float = 1.0"),
    ],
)
def test_what_is_computed_counts(other: str) -> None:
    assert digest(other) != digest(SOURCE)


def test_a_docstring_that_was_added_does_not_count() -> None:
    bare = "def f():\n    return 1\n\nclass A:\n    x = 1\n"
    told = "'A.'\ndef f():\n    'B.'\n    return 1\n\nclass A:\n    'C.'\n    x = 1\n"
    assert digest(told) == digest(bare)


def test_a_docstring_alone_still_is_a_body() -> None:
    assert digest("class A:\n    '''Text.'''\n") == digest("class A:\n    pass\n")


def test_what_is_imported_of_the_core_comes_along() -> None:
    found = code_digests(["pipelines.training.pretrain_run"])
    assert {
        "pipelines.training.pretrain_run",
        "mae_core.masking",
        "mae_core.data.decode",
    } <= found.keys()
    # Imported only by another module of the core.
    assert {"mae_core.config", "mae_core.data.samples"} <= found.keys()
    others = {name for name in found if not name.startswith("mae_core.")}
    assert {"pipelines.reading.shards", "pipelines.reading.manifests"} <= others
    others = {name for name in others if not name.startswith("pipelines.reading.")}
    assert others == {"pipelines.training.pretrain_run"}, "what starts and stores does not count"


def test_a_file_of_ones_own_brings_the_core_along(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("from mae_core import masking\nimport numpy\n")
    before = code_digests([file])
    assert set(before) >= {"mine.py", "mae_core.masking"}
    file.write_text("from mae_core import masking\nimport numpy as np\n")
    assert code_digests([file])["mine.py"] != before["mine.py"]


@pytest.mark.parametrize("name", KINDS)
def test_each_stage_names_its_own_module(name: str) -> None:
    assert f"pipelines.{name}" in KINDS[name].modules
    assert len(code_digests(KINDS[name].modules)) > len(KINDS[name].modules)
