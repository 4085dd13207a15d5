"""Run `mae` in the test's own process, and keep what it tells."""

import json
from pathlib import Path

import pytest

from pipelines import cli


class Told:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


def run_mae(capsys: pytest.CaptureFixture[str], *words: str) -> Told:
    try:
        code = cli.main(list(words))
    except SystemExit as error:  # argparse
        code = int(error.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err, err
    return Told(code, without_failure(code, out), err)


def without_failure(code: int, out: str) -> str:
    """Return what a failed command wrote besides its JSON object for programs."""
    *lines, last = out.splitlines() or [""]
    if code == 0 or not last.startswith("{"):
        return out
    failed = json.loads(last)
    assert failed["status"] == ("stopped" if code in (130, 143) else "failed")
    assert failed["can_pass"] in (True, False)
    return "\n".join(lines)


def pretrain_words(folder: Path, train: Path | str, *more: str) -> list[str]:
    return [
        "pretrain",
        f"data.train={train}",
        f"storage.root={folder}/runs",
        f"tracking.uri=sqlite:///{folder}/mlflow.db",
        "optim.global_batch_size=8",
        "optim.micro_batch_size=8",
        *more,
    ]
