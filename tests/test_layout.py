"""Every module has a test file of its name, or a line here says which tests cover it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Modules of pipelines that do nothing without their neighbours, which these tests run.
COVERED_BY = {
    "commands/arguments": "tests/pipelines/test_cli.py",
    "config/downstream": "tests/pipelines/downstream/test_run.py",
    "doctor/services": "tests/pipelines/doctor/test_command.py",
    "downstream/arms": "tests/pipelines/downstream/test_run.py",
    "downstream/features": "tests/pipelines/test_embed.py",
    "downstream/targets": "tests/pipelines/downstream/test_label_studies.py",
    "downstream/task": "tests/pipelines/downstream/test_tuning.py",
    "packing/classes": "tests/pipelines/packing/test_prepare_sources.py",
    "packing/process_pool": "tests/pipelines/packing/test_prepare_resume.py",
    "packing/shard": "tests/pipelines/test_prepare.py",
    "schedule/passes": "tests/pipelines/schedule/test_command.py",
    "training/description": "tests/pipelines/commands/test_checkpoint.py",
    "training/start": "tests/pipelines/training/test_run.py",
    "training/protocol": "tests/pipelines/training/test_run.py",
    "training/weights": "tests/pipelines/training/test_conversion.py",
}


@pytest.mark.parametrize("package", ["infra", "mae_core"])
def test_every_module_has_a_test_file_of_its_name(package: str) -> None:
    modules = {path.stem for path in (ROOT / package).rglob("*.py")} - {"__init__"}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / package).rglob("*.py")}
    assert len(modules) > 20
    assert modules - tests == set()


PACKAGES = sorted(path.parent.name for path in (ROOT / "pipelines").glob("*/__init__.py"))


def test_the_packages_of_pipelines_are_found() -> None:
    assert {"chain", "config", "downstream", "terminal", "training"} < set(PACKAGES)


@pytest.mark.parametrize("package", [*PACKAGES, ""])
def test_a_module_of_pipelines_has_one_or_says_which_tests_cover_it(package: str) -> None:
    modules = {path.stem for path in (ROOT / "pipelines" / package).glob("*.py")} - {"__init__"}
    folder = ROOT / "tests/pipelines" / package
    tested = {name for name in modules if (folder / f"test_{name}.py").is_file()}
    covered = {
        name for place, _, name in (key.rpartition("/") for key in COVERED_BY) if place == package
    }
    assert modules - tested == covered


def test_the_tests_that_cover_a_module_are_there() -> None:
    assert [file for file in COVERED_BY.values() if not (ROOT / file).is_file()] == []
