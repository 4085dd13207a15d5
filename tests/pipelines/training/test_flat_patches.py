"""How many patches are flat is said before training, and what to do where most of them are."""

import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.data.manifest import ChannelStats, Manifest
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.shards import open_shards
from pipelines.training.flat_patches import measure_flat_patches

WriteTar = Callable[[Path, dict[str, bytes]], Path]
STATS = ChannelStats(mean=(0.5,) * 3, std=(0.25,) * 3, num_images=1)
WORDS = [
    "data.train=t",
    "data.crop_scale=[1, 1]",
    "model.encoder=vit_micro",
    "model.img_size=16",
    "model.patch_size=8",
]


def picture(num_flat: int) -> bytes:
    """Draw 2 x 2 patches of which `num_flat` have a noise of one grey level, the others much."""
    generator = np.random.default_rng(num_flat)
    pixels = generator.integers(0, 256, (16, 16, 3))
    for place in range(num_flat):
        row, column = divmod(place, 2)
        faint = generator.integers(100, 102, (8, 8, 3))
        pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = faint
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_set(folder: Path, write_tar: WriteTar, pictures: list[bytes]) -> Manifest:
    """Two tars that share the pictures out."""
    for number in range(2):
        members = {f"{i}.png": image for i, image in enumerate(pictures) if i % 2 == number}
        write_tar(folder / f"{number}.tar", members)
    return open_shards(str(folder), str(folder / "index"))


def measure(manifest: Manifest, *words: str) -> dict[str, float]:
    return measure_flat_patches(
        load_config(PretrainConfig, [], [*WORDS, *words], {}), manifest, STATS
    )


def test_the_share_is_of_images_of_all_shards(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    manifest = make_set(tmp_path, write_tar, [picture(1), picture(0)] * 20)
    assert measure(manifest) == {"data/flat_patches": 0.125}
    # The root of 0.001 in units of a deviation of 0.25 of full scale.
    assert "12% of the patches of 40 training views are flat" in caplog.text
    assert "less than 2.0 of 255 grey levels (loss.norm_pix_floor=0.001)" in caplog.text
    assert "teaches little" not in caplog.text


def test_a_large_share_costs_a_warning_with_advice(
    tmp_path: Path, write_tar: WriteTar, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_set(tmp_path, write_tar, [picture(3), b"no image", picture(3)])
    assert measure(manifest) == {"data/flat_patches": 0.75}
    assert "75% of the patches are flat" in caplog.text
    assert "loss.norm_pix=false" in caplog.text
    caplog.clear()
    assert measure(manifest, "loss.norm_pix_floor=1e-6") == {"data/flat_patches": 0.0}
    assert "loss.norm_pix=false" not in caplog.text


def test_raw_pixels_have_no_flat_patches_to_tell_of(tmp_path: Path, write_tar: WriteTar) -> None:
    manifest = make_set(tmp_path, write_tar, [picture(3), picture(3)])
    assert measure(manifest, "loss.norm_pix=false") == {}
