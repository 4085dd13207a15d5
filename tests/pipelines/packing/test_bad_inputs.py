"""Pack every broken file that we have, together with good ones."""

import io
import json
import logging
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mae_core.config import MaskingConfig
from mae_core.data.order import RunOrder
from mae_core.data.views import ViewSpec
from pipelines.reading.batches import BatchDecoder
from pipelines.reading.sequence import SequencePlan, read_window
from pipelines.reading.shards import open_shards

SPEC = ViewSpec(seed=0, in_chans=3, size=(32, 32), crop_scale=(0.2, 1.0), flip=True)
# Where we know more than Pillow, whose answers the manifest has: tifffile reads the second whole,
# and finds the third to claim gigapixels; libjpeg warns that the last one's data ends too early.
UNLIKE_PILLOW = {
    "mode_other/rasterio_float_nan.tif": "unsupported",
    "mode_16bit/rasterio_RGBA.uint16.tif": None,
    "corrupt/libtiff_segfault.tif": "bomb",
    "corrupt/derived_bitflips.jpg": "truncated",
}


def expected_kind(item: dict[str, Any]) -> str | None:
    """Return the expected kind from the data set's own manifest; None for a valid picture."""
    told = str(item.get("pillow", "UnidentifiedImageError"))  # annotations have no such field
    if item["path"] in UNLIKE_PILLOW:
        return UNLIKE_PILLOW[item["path"]]
    if told == "loads":
        return None
    if item["bytes"] == 0:
        return "empty"
    if item["path"].startswith("lfs_pointer/"):
        return "lfs_pointer"
    if "DecompressionBomb" in told or "too large" in told:
        return "bomb"
    if "Unidentified" in told:
        return "not_an_image"
    return "truncated" if "truncated" in told else "corrupt"


@pytest.mark.realdata
def test_broken_ones_are_counted_by_kind_and_good_ones_all_arrive(
    real_data: Path,
    tmp_path: Path,
    make_png: Callable[[int], bytes],
    write_tar: Callable[..., Path],
) -> None:
    folder = real_data / "bad_inputs"
    items = json.loads((folder / "manifest.json").read_text())["items"]
    members: dict[str, bytes] = {}
    for i, item in enumerate(items):
        members[f"{i:03d}-good.png"] = make_png(i)
        # Under one extension: the bytes decide.
        members[f"{i:03d}-item.jpg"] = (folder / item["path"]).read_bytes()
    write_tar(tmp_path / "t/a.tar", members)
    manifest = open_shards(str(tmp_path / "t"), str(tmp_path / "index"))
    assert manifest.num_samples == 2 * len(items)
    order = RunOrder(manifest.counts, seed=0, window=32, num_samples=manifest.num_samples)
    plan = SequencePlan(manifest.shards, order, 0, 16)
    decoder = BatchDecoder(SPEC, MaskingConfig(), (2, 2), 2)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        blocks = [block for w in range(order.num_windows) for block in read_window(plan, w)]
        batches = [decoder(block) for block in blocks]
    expected = {f"{i:03d}-item": expected_kind(item) for i, item in enumerate(items)}
    found = {bad.key: bad.kind for batch in batches for bad in batch.bad}
    assert found == {key: kind for key, kind in expected.items() if kind is not None}
    assert Counter(found.values())["not_an_image"] == 5
    weights = [w for batch in batches for w in batch.weights.tolist()]
    assert sum(weights) == 2 * len(items) - len(found)


def test_links_and_devices_in_a_tar_are_no_samples_and_touch_nothing(
    tmp_path: Path, make_png: Callable[[int], bytes]
) -> None:
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t/a.tar", "w") as tar:
        for name, kind in [
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("null.jpg", tarfile.CHRTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("../../outside.png", "/root/absolute.png"):
            info = tarfile.TarInfo(name)
            data = make_png(0)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    manifest = open_shards(str(tmp_path / "t"), str(tmp_path / "index"))
    assert manifest.num_samples == 2
    assert not (tmp_path.parent / "outside.png").exists()
