"""Fixtures: small tars as another program writes them, and pictures to pack."""

import io
import logging
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.pipelines.cli_in_process import Told, run_mae
from tests.pipelines.packed_sets import write_image

WriteTar = Callable[[Path, dict[str, bytes]], Path]


def png(number: int, size: tuple[int, int] = (20, 24)) -> bytes:
    """Draw a picture of noise, different for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def make_png() -> Callable[[int], bytes]:
    return png


@pytest.fixture
def write_tar() -> WriteTar:
    def write(path: Path, members: dict[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write


@pytest.fixture
def foreign(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Write a folder of three tars with 5, 3 and 8 labelled images, without a manifest."""
    number = 0
    for shard, count in enumerate([5, 3, 8]):
        members = {}
        for _ in range(count):
            members[f"{number:03d}.png"] = png(number)
            members[f"{number:03d}.cls"] = str(number % 4).encode()
            number += 1
        write_tar(tmp_path / f"foreign/part-{shard}.tar", members)
    return tmp_path / "foreign"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write thirty small images of three classes."""
    generator = np.random.default_rng(0)
    for i in range(30):
        pixels = generator.integers(0, 256, size=(6 + i % 3, 8, 3), dtype=np.uint8)
        name = ["cat", "dog", "owl"][i % 3] + f"/{i:03d}." + ["png", "JPG", "jpeg"][i % 3]
        write_image(tmp_path / "photos" / name, pixels)
    return tmp_path / "photos"


@pytest.fixture
def as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Restore logging and the environment, which the command changes permanently."""
    for name in list(os.environ):
        if name.startswith(("MAE__", "RAY_ADDRESS")):
            monkeypatch.delenv(name)
    before = dict(os.environ)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.chdir(tmp_path)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    root.handlers, root.level = handlers, level


@pytest.fixture
def mae(
    capsys: pytest.CaptureFixture[str], as_it_was: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Told]:
    """Run the command in this process, which starts no Ray: it ends before it needs one."""
    monkeypatch.setattr("pipelines.training.local_ray.running", lambda *_: nullcontext())
    monkeypatch.setattr("pipelines.terminal.worker_logging.set_up", lambda: None)
    return partial(run_mae, capsys)
