"""Shards of smaller JPEGs instead of the images' own bytes."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_core.data.decode import decode_image
from pipelines import prepare
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import ConfigError
from tests.pipelines.packed_sets import pack, read_all, read_manifest, write_image


def test_transcoded_images_are_smaller_jpegs_with_their_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat/0.png", "dog/1.png"):
        small = generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True)
        Image.fromarray(small).resize((180, 120)).save(path)
    with caplog.at_level(logging.INFO):
        result = pack(tmp_path / "in", tmp_path / "out", transcode_short_side=40)
    samples = read_all(tmp_path / "out")
    assert {key: set(parts) for key, parts in samples.items()} == {
        "cat/0": {"cls", "jpg"},
        "dog/1": {"cls", "jpg"},
    }
    for parts in samples.values():
        with Image.open(io.BytesIO(parts["jpg"])) as image:
            assert (image.format, image.size) == ("JPEG", (60, 40))
    assert result.metrics["num_bytes"] < result.metrics["num_source_bytes"]
    assert "transcoded to a short side of 40 px, quality 90: " in caplog.text
    # Statistics are those of what was packed.
    stats = read_manifest(tmp_path / "out").channel_stats
    assert stats is not None
    shown = [decode_image(parts["jpg"], 3) for parts in samples.values()]
    assert stats.mean == pytest.approx(tuple(np.concatenate(shown).mean((0, 1)) / 255), abs=0.01)
    with pytest.raises(ConfigError, match=r"transcode: 40 px, quality 90 -> 30 px"):
        pack(tmp_path / "in", tmp_path / "out", transcode_short_side=30)


def test_what_has_boxes_or_a_mask_is_not_transcoded(tmp_path: Path) -> None:
    write_image(tmp_path / "in/a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "in/a.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"transcode_short_side: a\.png has boxes or a mask"):
        pack(tmp_path / "in", tmp_path / "out", transcode_short_side=4)
    with pytest.raises(ConfigError, match="has boxes or a mask"):
        prepare.run(
            PrepareConfig(synthetic="shapes", output=str(tmp_path / "s"), transcode_short_side=4),
            fresh=False,
        )
