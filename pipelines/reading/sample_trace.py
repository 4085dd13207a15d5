"""`debug.sample_trace`: a record by which anybody can check the order of the samples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pyarrow as pa
import torch.distributed


class SampleTrace:
    """Writes `rank-R.jsonl`, a line for each sample trained on."""

    def __init__(self, folder: str | None, rank: int) -> None:
        self._folder = None if folder is None else Path(folder)
        self._rank = rank
        self._attempt = 0
        self._file: TextIO | None = None

    def __enter__(self) -> "SampleTrace":
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._attempt = self._next_attempt(self._folder)
            self._file = (self._folder / f"rank-{self._rank}.jsonl").open("a")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _next_attempt(self, folder: Path) -> int:
        """Return one more than the highest number in any rank's file, so that all ranks agree."""
        attempts = [0]
        if self._rank == 0:
            for file in folder.glob("rank-*.jsonl"):
                lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
                attempts += [json.loads(line)["attempt"] for line in lines[-1:]]
        shared = [max(attempts) + 1]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(shared)
        return shared[0]

    def write(self, rows: pa.Table, came: Sequence[bool], step: int) -> None:
        """Write the rows of a micro batch for which `came` is True; the others are holes."""
        if self._file is None:
            return
        for row, is_there in zip(
            rows.select(["epoch", "shard", "key"]).to_pylist(), came, strict=True
        ):
            if is_there:
                line = {
                    "epoch": row["epoch"],
                    "step": step,
                    "shard": row["shard"],
                    "key": row["key"],
                    "attempt": self._attempt,
                }
                self._file.write(json.dumps(line) + "\n")
        self._file.flush()
