"""Measure the data throughput and what limits it: `make bench-data`, or

    python benchmarks/data.py [SHARDS ...]      # tars of JPEGs, local or s3://; else drawn ones

Compares by ratios, both sides in one run. Prints Markdown tables.
"""

import gc
import io
import logging
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import ray.data
import torch
import webdataset as wds
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from infra import machine, storage
from mae_core.config import MaskingConfig
from mae_core.data.decode import encode_jpeg
from mae_core.data.manifest import Manifest, ShardInfo, parse_manifest
from mae_core.data.order import RunOrder
from mae_core.data.randomness import sample_generator
from mae_core.data.transforms import Pixels, random_crop
from mae_core.data.views import ViewSpec, training_view
from pipelines import prepare
from pipelines.config.prepare import PrepareConfig
from pipelines.config.sections import ScalingConfig
from pipelines.reading.batches import BatchDecoder
from pipelines.reading.sequence import (
    SequencePlan,
    configure_ray_data,
    micro_batches,
    passes_per_block,
    read_window,
    sequence_dataset,
)
from pipelines.reading.shards import open_shards, read_rows
from pipelines.training import launch

SIZE = (224, 224)
SCALE = (0.2, 1.0)
SPEC = ViewSpec(seed=0, in_chans=3, size=SIZE, crop_scale=SCALE, flip=True)
MICRO, WINDOW = 64, 1024
ROUNDS = 3
WARM_BATCHES = 16


def classic(data: bytes, key: str = "") -> Pixels:
    """Decode with Pillow and torchvision, antialiased bicubic, at the crop that ours draws."""
    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    generator = sample_generator(0, 0, key)
    crop = random_crop(generator, image.height, image.width, scale=SCALE)
    box = [int(x) for x in crop]
    image = TF.resized_crop(image, *box, list(SIZE), InterpolationMode.BICUBIC)
    if generator.random() < 0.5:
        image = TF.hflip(image)
    return np.asarray(image)


def ours(data: bytes, key: str = "") -> Pixels:
    return training_view(data, 0, key, SPEC)


def images_of(manifest: Manifest, limit: int = 1024) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for shard in manifest.shards:
        found += [(s.key, s.image) for s in read_rows(shard, 0, shard.num_samples)]
        if len(found) >= limit:
            break
    return found[:limit]


def table(title: str, header: str, rows: Iterable[str]) -> None:
    print(f"\n{title}\n\n| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for row in rows:
        print(f"| {row} |", flush=True)


def cpu_rate(function: Callable[[bytes, str], object], images: list[tuple[str, bytes]]) -> float:
    """Return images per second of CPU time, which other programs on the machine do not affect."""
    since = time.process_time()
    for key, data in images:
        function(data, key)
    return len(images) / (time.process_time() - since)


def spread(rates: list[float]) -> str:
    return f"{np.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"


def bench_decode(images: list[tuple[str, bytes]]) -> None:
    rates: dict[str, list[float]] = {"classic": [], "ours": []}
    for _ in range(ROUNDS):
        rates["classic"].append(cpu_rate(classic, images))
        rates["ours"].append(cpu_rate(ours, images))
    ratio = np.median(rates["ours"]) / np.median(rates["classic"])
    errors = []
    for key, data in images:
        difference = classic(data, key).astype(float) - ours(data, key)
        errors.append(10 * np.log10(255**2 / max(np.square(difference).mean(), 1e-9)))
    rows = [
        f"Pillow + torchvision, bicubic, antialiased | {spread(rates['classic'])} | 1.00 | |",
        f"ours | {spread(rates['ours'])} | {ratio:.2f} | "
        f"median {np.median(errors):.1f}, worst {min(errors):.1f}",
    ]
    title = f"Decode, random crop to {SIZE[0]}, flip: {len(images)} images, one core"
    table(
        title,
        "chain | images/s (range) | ratio | PSNR to the first, dB",
        [r.rstrip("|") for r in rows],
    )


def bench_threads(images: list[tuple[str, bytes]]) -> None:
    rows = []
    base = 0.0
    for threads in (1, 2):
        rates = []
        for _ in range(ROUNDS):
            with ThreadPoolExecutor(threads) as pool:
                since = time.monotonic()
                list(pool.map(lambda pair: ours(pair[1], pair[0]), images))
                rates.append(len(images) / (time.monotonic() - since))
        base = base or float(np.median(rates))
        rows.append(f"{threads} | {spread(rates)} | {np.median(rates) / base:.2f}")
    table("Decoding threads in one process", "threads | images/s (range) | ratio", rows)


def make_plan(manifest: Manifest, num_images: int) -> SequencePlan:
    order = RunOrder(manifest.counts, seed=0, window=WINDOW, num_samples=num_images)
    plan = SequencePlan(manifest.shards, order, 0, MICRO)
    size = manifest.num_bytes / manifest.num_samples
    return replace(plan, passes_per_block=passes_per_block(plan, size))


def decoder() -> BatchDecoder:
    return BatchDecoder(SPEC, MaskingConfig(), (14, 14), machine.count_cpus())


def bare_loop(manifest: Manifest, num_images: int) -> Iterator[int]:
    """Read and decode the same windows in this process, without Ray."""
    plan = make_plan(manifest, num_images)
    blocks = (block for w in range(plan.order.num_windows) for block in read_window(plan, w))
    for batch in decoder().batches(blocks, 2):
        yield len(batch.pixels)


def ray_blocks(manifest: Manifest, num_images: int) -> Iterator[pa.Table]:
    (split,) = sequence_dataset(make_plan(manifest, num_images)).streaming_split(1, equal=True)
    rows = split.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2)
    yield from micro_batches(rows)


def through_ray(manifest: Manifest, num_images: int) -> Iterator[int]:
    for batch in decoder().batches(ray_blocks(manifest, num_images), 2):
        yield len(batch.pixels)


def webdataset_loader(manifest: Manifest, num_images: int) -> Iterator[int]:
    urls = [shard.path for shard in manifest.shards]
    transform = RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC)

    def view(data: bytes) -> torch.Tensor:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return TF.pil_to_tensor(transform(image))

    stages = wds.WebDataset(urls, shardshuffle=False, resampled=True).to_tuple("jpg")
    dataset = stages.map_tuple(view).batched(MICRO).with_epoch(num_images // MICRO)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=machine.count_cpus())
    for number, (batch,) in enumerate(loader):
        if number * MICRO >= num_images:
            return
        yield len(batch)


def ray_webdataset(manifest: Manifest, num_images: int) -> Iterator[int]:
    paths = [shard.path for shard in manifest.shards]
    epochs = -(-num_images // manifest.num_samples)

    def view(batch: pa.Table) -> dict[str, Any]:
        return {"pixels": np.stack([classic(data) for data in batch["jpg"].to_pylist()])}

    filesystem, _ = storage.open_filesystem(paths[0])
    names = [storage.open_filesystem(path)[1] for path in paths]
    dataset = ray.data.read_webdataset(names * epochs, filesystem=filesystem, decoder=None)
    dataset = dataset.select_columns(["jpg"]).map_batches(
        view, batch_size=MICRO, batch_format="pyarrow"
    )
    for batch in dataset.iter_batches(batch_size=MICRO):
        yield len(batch["pixels"])


def steady_rate(batches: Iterator[int]) -> float:
    """Return the rate without the first batches, during which processes start."""
    for _ in range(WARM_BATCHES):
        next(batches)
    since, images = time.monotonic(), 0
    for count in batches:
        images += count
    return images / (time.monotonic() - since)


def bench_stream(manifest: Manifest, num_images: int) -> None:
    ways: dict[str, Callable[[Manifest, int], Iterator[int]]] = {
        "bare loop, same reading and decoding, no Ray": bare_loop,
        "ours: Ray Data, ordered, to decoded batches": through_ray,
        "torch DataLoader + webdataset + classic transforms": webdataset_loader,
        "Ray read_webdataset + classic transforms": ray_webdataset,
    }
    if any(storage.is_remote(shard.path) for shard in manifest.shards):
        del ways["torch DataLoader + webdataset + classic transforms"]  # it has no S3 client
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):  # in turn, because the machine's speed changes from minute to minute
        for name, way in ways.items():
            rates[name].append(steady_rate(way(manifest, num_images)))
    base = float(np.median(next(iter(rates.values()))))
    rows = [f"{name} | {spread(r)} | {np.median(r) / base:.2f}" for name, r in rates.items()]
    table(
        f"Shards to batches: {num_images} images, {machine.count_cpus()} cores",
        "way | images/s (range) | share of the bare loop",
        rows,
    )


def bytes_only(dataset: ray.data.Dataset) -> float:
    rows, since = 0, 0.0
    blocks = dataset.iter_batches(batch_size=1, batch_format="pyarrow")
    for number, batch in enumerate(micro_batches(blocks)):
        if number == 0:
            since = time.monotonic()
            continue
        rows += len(batch)
    return rows / (time.monotonic() - since)


def bench_order(manifest: Manifest, num_images: int) -> None:
    context = ray.data.DataContext.get_current()
    rates: dict[str, list[float]] = {"in order": [], "as blocks come": []}
    for _ in range(ROUNDS):
        for name, ordered in (("in order", True), ("as blocks come", False)):
            context.execution_options.preserve_order = ordered
            rates[name].append(bytes_only(sequence_dataset(make_plan(manifest, num_images))))
    context.execution_options.preserve_order = True
    base = float(np.median(rates["as blocks come"]))
    rows = [f"{name} | {spread(r)} | {np.median(r) / base:.2f}" for name, r in rates.items()]
    table(
        "What the order costs: encoded images through Ray Data",
        "reading | images/s (range) | ratio",
        rows,
    )


def peak_mib(number_of_images: int, manifest: Manifest) -> dict[str, float]:
    """Track the peak memory of this process, of Ray's processes and of the object store."""
    me = psutil.Process()
    peaks = {"driver": 0.0, "Ray's processes": 0.0, "object store": 0.0}
    for number, _ in enumerate(ray_blocks(manifest, number_of_images)):
        if number % 8:
            continue
        children = [c for c in me.children(recursive=True) if "ray::" in " ".join(c.cmdline())]
        shared = me.memory_info().shared
        used = ray.cluster_resources().get(
            "object_store_memory", 0
        ) - ray.available_resources().get("object_store_memory", 0)
        now = {
            "driver": me.memory_info().rss - shared,
            "Ray's processes": sum(c.memory_info().rss - c.memory_info().shared for c in children),
            "object store": used,
        }
        peaks = {name: max(peaks[name], now[name] / 2**20) for name in peaks}
    return peaks


def bench_memory(manifest: Manifest, num_images: int) -> None:
    peak_mib(
        num_images, manifest
    )  # a first run, until blocks that are read ahead fill their share of the store
    once, ten = peak_mib(num_images, manifest), peak_mib(10 * num_images, manifest)
    rows = [f"{name} | {once[name]:.0f} | {ten[name]:.0f}" for name in once]
    table(
        "Peak memory of reading encoded images, MiB (private)",
        f"where | {num_images} images | {10 * num_images} images",
        rows,
    )


def bench_scale() -> None:
    """Time a manifest of 100,000 shards and a billion samples, from text to the first window."""
    gc.collect()
    shards = tuple(
        ShardInfo(
            path=f"train-{i:06d}.tar",
            index=f"train-{i:06d}.index.npy",
            num_samples=10_000,
            num_bytes=10**9,
            sha256="0" * 64,
        )
        for i in range(100_000)
    )
    text = Manifest(shards=shards).model_dump_json().encode()
    del shards
    gc.collect()
    before = psutil.Process().memory_info().rss
    since = time.monotonic()
    manifest = parse_manifest(text, "manifest.json")
    digest = manifest.digest
    order = RunOrder(manifest.counts, seed=0, window=8192, num_samples=800 * manifest.num_samples)
    segments = order.window_segments(order.num_windows // 2)
    seconds = time.monotonic() - since
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    table(
        "A manifest of 100,000 shards and 1,000,000,000 samples, 800 epochs",
        "what | value",
        [
            f"text of the manifest, MB | {len(text) / 1e6:.0f}",
            f"parse, digest ({digest[:6]}), order, a window in the middle "
            f"({len(segments)} pieces), s | {seconds:.1f}",
            f"memory, MiB | {grown:.0f}",
        ],
    )


def drawn_photographs(folder: Path, count: int = 512) -> list[str]:
    """Draw smooth noise of several scales at 500 x 375, whose JPEGs have a photograph's size."""
    for i in range(count):
        generator = np.random.default_rng(i)
        layers = [
            np.asarray(
                Image.fromarray(
                    generator.integers(0, 256, (375 // s + 2, 500 // s + 2, 3), dtype=np.uint8)
                ).resize((500, 375), Image.Resampling.BICUBIC),
                np.float32,
            )
            for s in (4, 16, 64)
        ]
        pixels = np.clip(layers[0] * 0.25 + layers[1] * 0.25 + layers[2] * 0.5, 0, 255)
        (folder / f"{i:05d}.jpg").write_bytes(encode_jpeg(pixels.astype(np.uint8), 92))
    return [str(folder)]


def main(specs: list[str]) -> None:
    logging.basicConfig(level=logging.WARNING)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as workspace:
        if not specs:
            source = Path(workspace) / "photographs"
            source.mkdir()
            drawn_photographs(source)
            specs = [f"{workspace}/shards"]
            prepare.run(
                PrepareConfig(source=str(source), output=specs[0], samples_per_shard=64),
                fresh=False,
            )
        manifest = open_shards(tuple(specs), f"{workspace}/index")
        images = images_of(manifest)
        size = manifest.num_bytes / manifest.num_samples / 1e3
        print(f"{manifest.num_samples} images, {size:.0f} kB each")
        bench_decode(images)
        bench_threads(images)
        bench_scale()
        num_images = 12288  # far more than what is read ahead before timing starts
        with launch.running_ray(ScalingConfig()):
            configure_ray_data()
            bench_stream(manifest, num_images)
            bench_order(manifest, num_images)
            bench_memory(manifest, num_images)


if __name__ == "__main__":
    main(sys.argv[1:])
