"""Where the real images are."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    folder = Path(os.environ.get("REAL_DATA", Path(__file__).parents[4] / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"REAL_DATA={folder}: no such folder")
    return folder
