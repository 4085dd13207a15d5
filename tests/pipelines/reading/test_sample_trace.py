"""The trace of samples: what was trained on, and in which attempt."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.reading.sample_trace import SampleTrace

ROWS = pa.table({"epoch": [0, 0, 1], "shard": ["a", "a", "b"], "key": ["x", "y", "z"]})


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_for_each_sample_that_came(tmp_path: Path) -> None:
    with SampleTrace(str(tmp_path / "trace"), rank=1) as trace:
        trace.write(ROWS, [True, False, True], step=7)
    assert lines(tmp_path / "trace/rank-1.jsonl") == [
        {"epoch": 0, "step": 7, "shard": "a", "key": "x", "attempt": 1},
        {"epoch": 1, "step": 7, "shard": "b", "key": "z", "attempt": 1},
    ]


def test_each_start_is_another_attempt_even_after_a_cut_line(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with SampleTrace(str(tmp_path), rank=0) as trace:
            trace.write(ROWS, [True, True, True], step=attempt)
        with (tmp_path / "rank-0.jsonl").open("a") as file:
            file.write('{"epoch": 5, "st\n')  # as a killed process leaves it
    whole = [x for x in (tmp_path / "rank-0.jsonl").read_text().splitlines() if x.endswith("}")]
    assert [json.loads(line)["attempt"] for line in whole] == [1, 1, 1, 2, 2, 2]


def test_the_attempt_is_that_after_the_last_of_any_rank(tmp_path: Path) -> None:
    (tmp_path / "rank-3.jsonl").write_text('{"attempt": 4}\n')
    with SampleTrace(str(tmp_path), rank=0) as trace:
        trace.write(ROWS, [True, False, False], step=1)
    assert lines(tmp_path / "rank-0.jsonl")[0]["attempt"] == 5


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    with SampleTrace(None, rank=0) as trace:
        trace.write(ROWS, [True, True, True], step=1)
    assert list(tmp_path.iterdir()) == []
