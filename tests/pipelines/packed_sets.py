"""Helpers that pack pictures and read back what was packed."""

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_core.data.manifest import Manifest, parse_manifest
from mae_core.data.samples import iter_samples
from pipelines import prepare
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import StageResult

ROOT = Path(__file__).parents[2]
# A black and a white pixel: 1x1 grey PNG files as some program wrote them.
BLACK = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
WHITE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAsTj2FAAAAABJRU5ErkJggg=="
)


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def pack(source: Path | None, output: Path, *, fresh: bool = False, **options: Any) -> StageResult:
    fields = {"workers": 1, "samples_per_shard": 7, **options}
    origin = {"synthetic": "shapes"} if source is None else {"source": str(source)}
    config = PrepareConfig.model_validate({**origin, "output": str(output), **fields})
    return prepare.run(config, fresh=fresh)


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """Return values that change if a file is rewritten, even with the same bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in files
    }


def read_manifest(folder: Path) -> Manifest:
    return parse_manifest((folder / "manifest.json").read_bytes(), str(folder))


def read_all(folder: Path) -> dict[str, dict[str, bytes]]:
    samples = {}
    for tar in sorted(folder.glob("*.tar")):
        with tar.open("rb") as stream:
            samples |= {sample.key: sample.parts for sample in iter_samples(stream, tar.name)}
    return samples


def run_script(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines/prepare.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
