"""The check for machines with a GPU runs through on the CPU, so that it is ready for one."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_check.py"


def test_every_part_of_the_gpu_check_finishes_in_a_rehearsal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rehearse"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All parts finished." in done.stdout
    rows = [line.split(" | ")[:2] for line in done.stdout.splitlines() if line.startswith("| vit")]
    assert [row[1] for row in rows][:2] == ["ours", "transformers"]
    assert "6 passed, 1 deselected" in done.stdout
    assert "| simplejpeg, crop, resize | 2 |" in done.stdout
    assert list(tmp_path.iterdir()) == []
