"""Blocks become batches: holes are named, randomness depends on the sample, errors are raised."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from mae_core.config import MaskingConfig
from mae_core.data.views import ViewSpec
from pipelines.config.pretrain import PretrainConfig
from pipelines.reading.batches import (
    BadSample,
    BatchDecoder,
    DecodedBatch,
    ahead,
    decode_block,
    too_many_bad,
    view_spec,
)
from pipelines.reading.sequence import SCHEMA

SPEC = ViewSpec(seed=3, in_chans=3, size=(16, 16), crop_scale=(0.2, 1.0), flip=True)


def make_block(
    images: dict[str, bytes],
    *,
    epoch: int = 0,
    first: int = 0,
    errors: list[str | None] | None = None,
) -> pa.Table:
    count = len(images)
    return pa.table(
        [
            list(range(first, first + count)),
            pa.array([epoch] * count, pa.int32()),
            ["s.tar"] * count,
            list(images),
            pa.array(list(images.values()), pa.large_binary()),
            [False] * count,
            pa.array(errors or [None] * count, pa.string()),
            pa.array([None] * count, pa.large_binary()),
        ],
        schema=SCHEMA,
    )


def decode(block: pa.Table, *, threads: int = 1, seed: int = 3) -> DecodedBatch:
    decoder = BatchDecoder(SPEC._replace(seed=seed), MaskingConfig(), (4, 4), threads)
    return decoder(block)


@pytest.fixture
def images(make_png: Callable[[int], bytes]) -> dict[str, bytes]:
    return {f"k{i}": make_png(i) for i in range(6)}


def test_a_batch_has_pixels_noise_and_weights(images: dict[str, bytes]) -> None:
    batch = decode(make_block(images, first=40))
    assert batch.pixels.shape == (6, 16, 16, 3)
    assert batch.pixels.dtype == torch.uint8
    assert batch.noise.shape == (6, 16)
    assert batch.noise.dtype == torch.float32
    assert batch.weights.tolist() == [1.0] * 6
    assert batch.bad == []
    assert batch.rows["position"][0].as_py() == 40
    assert "image" not in batch.rows.column_names


def test_a_sample_that_can_not_be_decoded_is_a_named_hole(images: dict[str, bytes]) -> None:
    whole = decode(make_block(images))
    holed = decode(make_block({**images, "k2": b"no image"}))
    assert holed.weights.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert holed.pixels[2].count_nonzero() == 0
    assert holed.bad == [
        BadSample(0, "s.tar", "k2", "not_an_image", "not an image of a known format")
    ]
    others = [0, 1, 3, 4, 5]
    assert torch.equal(holed.pixels[others], whole.pixels[others])
    assert torch.equal(holed.noise, whole.noise)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sample_is_the_same_in_any_batch(images: dict[str, bytes], threads: int) -> None:
    together = decode(make_block(images), threads=threads)
    backwards = decode(make_block(dict(reversed(images.items())), first=100))
    assert torch.equal(together.pixels, backwards.pixels.flip(0))
    assert torch.equal(together.noise, backwards.noise.flip(0))
    alone = decode(make_block({"k4": images["k4"]}))
    assert torch.equal(together.pixels[4], alone.pixels[0])
    assert torch.equal(together.noise[4], alone.noise[0])


def test_what_could_not_be_read_is_a_hole_with_its_reason(images: dict[str, bytes]) -> None:
    errors = [None, "checksum: the bytes are others", *[None] * 4]
    block = make_block({**images, "k1": b""}, errors=errors)
    for table in (block, decode_block(block, SPEC)):
        batch = decode(table)
        assert batch.weights.tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
        assert batch.bad == [
            BadSample(0, "s.tar", "k1", "checksum", "checksum: the bytes are others")
        ]


def test_views_of_a_sample_follow_one_another_and_differ(images: dict[str, bytes]) -> None:
    one = decode(make_block(images))
    block = make_block({**images, "k2": b"no image"})
    decoder = BatchDecoder(SPEC, MaskingConfig(), (4, 4), 2, num_views=3)
    for table in (block, decode_block(block, SPEC, 3)):
        batch = decoder(table)
        assert batch.pixels.shape == (18, 16, 16, 3)
        assert len(batch.rows) == 6
        assert batch.weights.view(6, 3).tolist() == [[float(i != 2)] * 3 for i in range(6)]
        assert len(batch.bad) == 1
        views, noise = batch.pixels.view(6, 3, -1), batch.noise.view(6, 3, -1)
        # The first view is the one that a run with one crop an image would have.
        assert torch.equal(batch.noise[::3], one.noise)
        assert torch.equal(views[[0, 1, 3, 4, 5], 0], one.pixels[[0, 1, 3, 4, 5]].flatten(1))
        assert len(torch.unique(views[0], dim=0)) == 3
        assert len(torch.unique(noise[0], dim=0)) == 3


def test_sixteen_bits_stay_and_eight_join_them() -> None:
    grey = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    deep, shallow = io.BytesIO(), io.BytesIO()
    Image.fromarray(grey).save(deep, "PNG")
    Image.fromarray(np.full((16, 16), 200, np.uint8)).save(shallow, "PNG")
    spec = SPEC._replace(in_chans=1, crop_scale=(1.0, 1.0), flip=False)
    block = make_block({"a": deep.getvalue(), "b": shallow.getvalue()})
    decoder = BatchDecoder(spec, MaskingConfig(), (4, 4), 1)
    for table in (block, decode_block(block, spec)):
        batch = decoder(table)
        assert batch.pixels.dtype == torch.uint16
        assert (batch.pixels[0, ..., 0].numpy() == grey).all()
        assert (batch.pixels[1].numpy() == 200 * 257).all()


def test_seed_epoch_and_key_each_change_view_and_noise(images: dict[str, bytes]) -> None:
    image = images["k0"]
    base = decode(make_block({"k0": image}))
    for other in (
        decode(make_block({"k0": image}, epoch=1)),
        decode(make_block({"other": image})),
        decode(make_block({"k0": image}), seed=4),
    ):
        assert not torch.equal(base.pixels, other.pixels)
        assert not torch.equal(base.noise, other.noise)


def test_what_the_cluster_decoded_is_what_the_worker_would(images: dict[str, bytes]) -> None:
    block = make_block({**images, "k2": b"no image"})
    early = decode(decode_block(block, SPEC))
    late = decode(block)
    assert decode_block(block, SPEC)["decoded"].to_pylist() == [True, True, False] + [True] * 3
    assert torch.equal(early.pixels, late.pixels)
    assert torch.equal(early.noise, late.noise)
    assert torch.equal(early.weights, late.weights)
    assert early.bad == late.bad


def test_the_view_follows_the_config() -> None:
    config = PretrainConfig.model_validate(
        {
            "seed": 5,
            "data": {"train": "/d", "crop_scale": [0.5, 0.75], "flip": False},
            "model": {"img_size": [32, 48], "patch_size": 8, "in_chans": 1},
        }
    )
    assert view_spec(config) == ViewSpec(5, 1, (32, 48), (0.5, 0.75), False)


def test_results_come_in_order() -> None:
    assert list(ahead(range(50), lambda x: x * x, 3)) == [x * x for x in range(50)]
    assert list(ahead([], str, 2)) == []


def test_results_are_computed_ahead_but_no_further() -> None:
    done: list[int] = []
    results = ahead(range(10), done.append, 2)
    next(results)
    deadline = time.monotonic() + 10
    while len(done) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert done == [0, 1, 2]
    results.close()  # type: ignore[attr-defined]


def test_an_error_reaches_the_reader_after_what_came_before_it() -> None:
    def fail_at_three(x: int) -> int:
        if x == 3:
            raise ValueError("three")
        return x

    seen: list[int] = []
    with pytest.raises(ValueError, match="three"):
        seen.extend(ahead(range(9), fail_at_three, 2))
    assert seen == [0, 1, 2]


def test_an_error_of_the_source_reaches_the_reader() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    results = ahead(source(), str, 2)
    assert next(results) == "1"
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_closing_early_stops_the_thread() -> None:
    results = ahead(range(10**9), str, 2)
    next(results)
    results.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while any(t.name.startswith("ahead") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_broken_image_stays_encoded_for_the_worker(tmp_path: Path) -> None:
    block = decode_block(make_block({"x": b"no image"}), SPEC)
    assert block["image"].to_pylist() == [b"no image"]
    assert block["decoded"].to_pylist() == [False]


def test_batches_come_in_order_and_as_each_alone(images: dict[str, bytes]) -> None:
    blocks = [make_block(images, epoch=e, first=6 * e) for e in range(5)]
    decoder = BatchDecoder(SPEC, MaskingConfig(), (4, 4), 2)
    batches = list(decoder.batches(iter(blocks), 2))
    assert [batch.rows["position"][0].as_py() for batch in batches] == [0, 6, 12, 18, 24]
    for batch, block in zip(batches, blocks, strict=True):
        alone = decode(block)
        assert torch.equal(batch.pixels, alone.pixels)
        assert torch.equal(batch.noise, alone.noise)


def test_batches_are_decoded_ahead_but_no_further(images: dict[str, bytes]) -> None:
    taken = 0

    def blocks() -> Iterator[pa.Table]:
        nonlocal taken
        while True:
            taken += 1
            yield make_block(images)

    batches = BatchDecoder(SPEC, MaskingConfig(), (4, 4), 1).batches(blocks(), 2)
    next(batches)
    deadline = time.monotonic() + 10
    while taken < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert taken in (4, 5)  # one with the reader, one put together, two decoding and one to come
    batches.close()  # type: ignore[attr-defined]
    while any(t.name.startswith("ahead") for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("num_bad", "seen", "is_too_many"),
    [
        (10, 10, False),  # of a thousand at least: 1 %
        (11, 10, True),
        (20, 2000, False),
        (21, 2000, True),
    ],
)
def test_a_share_of_bad_samples_is_judged_against_a_thousand_at_least(
    num_bad: int, seen: int, is_too_many: bool
) -> None:
    assert too_many_bad(num_bad, seen, 0.01) == is_too_many


def test_a_mask_has_the_ratio_of_its_samples_place(images: dict[str, bytes]) -> None:
    """A block of removed patches ranks behind the kept ones, whose number the ratio gives."""
    decoder = BatchDecoder(
        SPEC,
        MaskingConfig(kind="block"),
        (4, 4),
        1,
        ratio_at=lambda place: min(0.25 + place / 8, 0.99),
    )
    batch = decoder(make_block(images, first=1))
    assert (batch.noise >= 1).sum(dim=1).tolist() == [6, 8, 10, 12, 14, 15]
