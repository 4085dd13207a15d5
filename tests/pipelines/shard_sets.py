"""A folder of one shard with a manifest, for what only looks at both."""

import json
from pathlib import Path
from typing import Any


def shard_set(folder: Path, **fields: Any) -> Path:
    folder.mkdir()
    (folder / "s.tar").write_bytes(b"x" * 10)
    shard = {"path": "s.tar", "index": "i", "num_samples": 1, "num_bytes": 10, "sha256": "ff"}
    manifest = {"version": 1, "shards": [shard], **fields}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
