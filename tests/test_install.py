"""What `make install` installs works on the oldest Python that the project promises."""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
OLDEST_PYTHON = "3.11.0"  # Debian 12 has 3.11.2


def locked() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    return [Requirement(line) for line in lines if re.match(r"\w", line)]


def test_the_project_promises_the_oldest_python() -> None:
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()


def test_every_locked_package_installs_on_the_oldest_python() -> None:
    names = [requirement.name for requirement in locked()]
    assert len(names) > 200
    wanted = {name: metadata.metadata(name).get("Requires-Python") or "" for name in names}
    too_new = {
        name: versions
        for name, versions in wanted.items()
        if OLDEST_PYTHON not in SpecifierSet(versions)
    }
    assert too_new == {}
