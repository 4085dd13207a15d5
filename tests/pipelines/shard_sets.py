"""Write a folder of one shard with a manifest, for code that only checks their presence."""

import json
from pathlib import Path
from typing import Any

from mae_core.data.manifest import Manifest
from mae_core.data.order import RunOrder
from pipelines.reading.sequence import SequencePlan


def shard_set(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "s.tar").write_bytes(b"x" * 10)
    shard = {"path": "s.tar", "index": "i", "num_samples": 1, "num_bytes": 10, "sha256": "ff"}
    manifest = {"version": 1, "shards": [shard], **fields}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def make_plan(
    manifest: Manifest, *, micro: int, start: int = 0, window: int = 16, num_samples: int = 48
) -> SequencePlan:
    order = RunOrder(manifest.counts, seed=3, window=window, num_samples=num_samples)
    return SequencePlan(manifest.shards, order, start, micro)
