"""Which parts of a source file count for the cache, and which do not."""

import ast
import hashlib
import json
import os
from pathlib import Path

import pytest

from pipelines.chain import code
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


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has parsed."""
    monkeypatch.setattr(code, "_parsed", {})
    monkeypatch.setattr(code, "_num_kept", {})


def forbid_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, filename: str) -> None:
        raise AssertionError(f"{filename} was parsed again")

    monkeypatch.setattr(code, "_parsed", {})
    monkeypatch.setattr(code.ast, "parse", parse)


@pytest.mark.usefixtures("new_process")
def test_what_was_parsed_once_is_not_parsed_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "code.json")
    found = code_digests(["mae_core.masking", "mae_core.data.order"])
    code.remember(uri)
    forbid_parsing(monkeypatch)
    code.recall(uri)
    assert code_digests(["mae_core.masking", "mae_core.data.order"]) == found


@pytest.mark.usefixtures("new_process")
def test_a_source_that_changed_is_parsed_again_whatever_its_time_and_size_say(
    tmp_path: Path,
) -> None:
    file, uri = tmp_path / "mine.py", str(tmp_path / "code.json")
    file.write_text("x = 1\n")
    times = file.stat()
    before = code_digests([file])
    code.remember(uri)
    file.write_text("x = 2\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    code.recall(uri)
    after = code_digests([file])
    assert after != before
    code.remember(uri)  # both sources are kept: a change that is taken back costs nothing
    assert len(json.loads(Path(uri).read_text())[1]) == 2


@pytest.mark.usefixtures("new_process")
def test_a_module_that_was_added_later_is_found_by_an_import_that_was_parsed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code, "ROOT", tmp_path)
    package = tmp_path / "mae_core"
    package.mkdir()
    (package / "__init__.py").write_text("cut = 1\n")
    (package / "first.py").write_text("from mae_core import cut\n")
    assert code_digests(["mae_core.first"]).keys() == {"mae_core", "mae_core.first"}
    (package / "cut.py").write_text("depth = 1\n")
    assert code_digests(["mae_core.first"]).keys() == {"mae_core.cut", "mae_core.first"}


@pytest.mark.usefixtures("new_process")
@pytest.mark.parametrize("kept", ["{", '["other rules", {"KEY": ["0", []]}]'])
def test_a_file_that_is_damaged_or_of_other_rules_is_passed_over(tmp_path: Path, kept: str) -> None:
    mine, file = tmp_path / "mine.py", tmp_path / "code.json"
    mine.write_text("x = 1\n")
    file.write_text(kept.replace("KEY", hashlib.sha256(b"x = 1\n").hexdigest()))
    code.recall(str(file))
    assert code_digests([mine]) == {"mine.py": digest("x = 1\n")}
    code.remember(str(file))
    assert json.loads(file.read_text())[0] == code._rules()


@pytest.mark.usefixtures("new_process")
def test_nothing_is_written_if_nothing_new_was_parsed(tmp_path: Path) -> None:
    file = tmp_path / "code.json"
    code_digests(["mae_core.masking"])
    code.remember(str(file))
    times = file.stat()
    code.recall(str(file))
    code_digests(["mae_core.masking"])
    code.remember(str(file))
    assert file.stat() == times
