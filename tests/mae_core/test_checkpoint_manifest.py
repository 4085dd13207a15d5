"""A checkpoint can be described and checked without torch; test_checkpoint.py damages its files."""

import subprocess
import sys
from pathlib import Path

import pytest

from mae_core.checkpoint_manifest import CorruptCheckpointError, digest_of, verify_checkpoint


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: No such file"):
        verify_checkpoint(tmp_path)


def test_a_digest_holds_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    found = digest_of(tmp_path / "file")
    assert (found.bytes, found.sha256[:8]) == (3, "ba7816bf")


def test_describing_a_checkpoint_and_its_errors_loads_no_torch() -> None:
    code = (
        "import sys, mae_core.checkpoint_manifest, mae_core.training_error\n"
        "print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr
