from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", ["infra", "mae_core"])
def test_every_module_has_a_test_file_of_its_name(package: str) -> None:
    modules = {path.stem for path in (ROOT / package).rglob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / package).rglob("*.py")}
    assert len(modules) > 20
    assert modules - tests == set()
