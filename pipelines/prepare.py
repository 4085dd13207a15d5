#!/usr/bin/env python
"""Pack images into WebDataset shards with a manifest.

    mae prepare photos shards/photos
    mae prepare list.txt s3://bucket/photos
    mae prepare --synthetic shapes data/shapes
    mae prepare index s3://bucket/tars      # existing tars: write manifest and indexes beside them
    mae prepare stats s3://bucket/tars      # also compute the channel statistics of all images
    python pipelines/prepare.py configs/prepare/demo.yaml num_train=10000

In a folder of folders each folder is a class, numbered by name; a flat folder has no labels. Files
next to x.jpg named x.json, x.cls, x.txt or x.seg.png are packed with it. The same input and config
give the same bytes, whatever the number of workers. The same command resumes after an interruption,
provided that no file has changed since.

The original bytes of each image are kept. Images that can't be decoded are left out and listed in
skipped.jsonl. mae_core/data/image_files.py describes how images are found and keyed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["prepare", *sys.argv[1:]]))

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import islice
from typing import NamedTuple

from infra import storage
from mae_core.data.annotations import Annotations, read_annotations
from mae_core.data.image_files import ImageFile, find_images
from mae_core.data.manifest import MANIFEST_NAME, Manifest, sum_pixels
from mae_core.data.randomness import named_generator
from mae_core.data.samples import DataError
from mae_core.data.synthetic import SHAPE_CLASSES, draw_scene, encode_scene
from pipelines.packing import existing as existing_shards
from pipelines.terminal import progress
from pipelines.config.prepare import PrepareConfig
from pipelines.outcome import ConfigError, StageResult
from pipelines.packing.shard import (
    CATEGORIES_NAME,
    Item,
    MaskSummary,
    PackedShard,
    SceneItem,
    ShardPlan,
    ShardRecord,
    SkippedImage,
    Transcode,
    json_bytes,
    pack_shard,
    sum_masks,
)
from pipelines.packing.output import SKIPPED_NAME, SetPlan, claim_output, finished_manifest
from pipelines.packing.classes import GivenNumbers, read_numbers
from pipelines.packing.summary import found_lines, mask_line, mask_warnings
from pipelines.packing.process_pool import process_pool

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 5.0
# Validation scenes are numbered far above training scenes, so the two counts are independent.
FIRST_VAL_SCENE = 1 << 32


def run(config: PrepareConfig, *, fresh: bool) -> StageResult:
    """Pack what `config` names, resuming an interrupted run, or start over if `fresh`.

    Raises:
        DataError: There is no image, or too many are broken.
        ConfigError: The output contains something else.
    """
    if config.existing is not None:
        return existing_shards.run(config, fresh=fresh)
    plans = _plan(config)
    for plan in plans:
        claim_output(plan, fresh=fresh)
    packed = [_pack_set(plan, config) for plan in plans]
    reused = not any(one.is_new for one in packed)
    if reused:
        log.info("output=%s is already packed, from the same files; nothing to do", config.output)
    manifests = [one.manifest for one in packed]
    num_samples = sum(manifest.num_samples for manifest in manifests)
    metrics: dict[str, float] = {
        "num_samples": num_samples,
        "num_shards": sum(len(manifest.shards) for manifest in manifests),
        "num_bytes": sum(manifest.num_bytes for manifest in manifests),
        "num_skipped": sum(plan.num_items for plan in plans) - num_samples,
    }
    if config.transcode_short_side is not None:
        before = sum(plan.source_bytes for plan in plans)
        metrics["num_source_bytes"] = before
        log.info(
            "transcoded to a short side of %d px, quality %d: %.1f MB instead of %.1f MB",
            config.transcode_short_side,
            config.transcode_quality,
            metrics["num_bytes"] / 1e6,
            before / 1e6,
        )
    output = storage.absolute(config.output)
    return StageResult("prepare", "reused" if reused else "done", None, output, metrics)


def _plan(config: PrepareConfig) -> list[SetPlan]:
    """Assign every image to a shard, before any pixel is read."""
    if config.source is not None:
        if "://" in config.source:
            raise ConfigError(
                f"source={config.source}: images are read from local folders only; fetch them "
                "first. The output may be s3://bucket/prefix"
            )
        return [_plan_source(config, Path(config.source).expanduser())]
    plans = []
    for split, first, count in (
        ("train", 0, config.num_train),
        ("val", FIRST_VAL_SCENE, config.num_val),
    ):
        scenes = [
            SceneItem(f"{split}-{i:06d}", config.seed, first + i, config.img_size)
            for i in range(count)
        ]
        output = storage.join(config.output, split)
        plans.append(_plan_set(config, output, split, scenes, SHAPE_CLASSES))
    return plans


def _plan_source(config: PrepareConfig, source: Path) -> SetPlan:
    given = GivenNumbers(None, {}) if config.classes is None else read_numbers(config.classes)
    with progress.doing(f"looking for images in {source}"):
        files, classes = find_images(source, given.classes)
    categories: dict[int, str] = {}
    if config.annotations is not None:
        found = read_annotations(Path(config.annotations).expanduser())
        if given.categories:
            found = found.renumbered(given.categories)
        files, categories = _with_boxes(config, files, found), found.categories
    for line in found_lines(files, classes, categories):
        log.info("source=%s: %s", config.source, line)
    listed = tuple(categories.items())
    return _plan_set(config, config.output, config.split, files, classes, listed)


def _with_boxes(
    config: PrepareConfig, files: Sequence[ImageFile], found: Annotations
) -> list[ImageFile]:
    """Add to each image its boxes.

    Raises:
        DataError: An image also has a .json of its own, or no image has boxes.
    """
    entries = found.names_of([file.source for file in files])
    boxed = []
    for file in files:
        entry = entries.get(file.source)
        if entry is None:
            boxed.append(file)
            continue
        if any(name == "json" for name, *_ in file.companions):
            raise DataError(f"{file.source} has a .json next to it and also boxes in annotations")
        boxed.append(file._replace(boxes=found.by_image[entry]))
    without = [file.source for file in boxed if file.boxes is None]
    if len(without) == len(boxed):
        raise DataError(
            f"annotations={config.annotations}: has none of the images, such as {without[0]}; it "
            f"has {next(iter(found.by_image), 'nothing')}"
        )
    if without:
        log.warning(
            "annotations=%s: nothing on %d images, packed without boxes: %s",
            config.annotations,
            len(without),
            ", ".join(without[:5]),
        )
    unused = sorted(set(found.by_image) - set(entries.values()))
    if unused:
        log.warning(
            "annotations=%s: has %d entries of images that are not in source, such as %s",
            config.annotations,
            len(unused),
            ", ".join(unused[:5]),
        )
    return boxed


def _plan_set(
    config: PrepareConfig,
    output: str,
    split: str,
    items: Sequence[Item],
    classes: tuple[str, ...] | None,
    categories: tuple[tuple[int, str], ...] = (),
) -> SetPlan:
    order = named_generator(config.seed, "prepare", split).permutation(len(items))
    limits = config.samples_per_shard, config.max_shard_bytes
    groups = list(_cut([items[i] for i in order], *limits))
    shards = tuple(ShardPlan(f"{split}-{i:06d}", tuple(g)) for i, g in enumerate(groups))
    facts: dict[str, int | str] = {
        "images": len(items),
        "split": split,
        "seed": config.seed,
        "samples_per_shard": config.samples_per_shard,
        "max_shard_bytes": config.max_shard_bytes,
        "in_chans": config.in_chans,
    }
    transcode = None
    if config.transcode_short_side is not None:
        transcode = Transcode(config.transcode_short_side, config.transcode_quality)
        _check_companions(items)
        facts["transcode"] = f"{transcode.short_side} px, quality {transcode.quality}"
    if config.synthetic is not None:
        facts |= {"img_size": config.img_size, "drawing": _drawing_digest(config.img_size)}
    if categories:
        facts["categories"] = ", ".join(f"{number} {name}" for number, name in categories)
    hasher = hashlib.sha256(json.dumps([facts, classes]).encode())
    for shard in shards:
        for item in shard.items:
            hasher.update(f"{shard.name} {item.identity}\n".encode())
    facts["digest"] = hasher.hexdigest()[:32]
    return SetPlan(
        storage.absolute(output), shards, classes, config.in_chans, transcode, facts, categories
    )


def _drawing_digest(size: int) -> str:
    """Return a digest of the code that draws and encodes: a set must not mix two versions."""
    drawn = [encode_scene(draw_scene(0, i, size)) for i in range(8)]
    return hashlib.sha256(repr(drawn).encode()).hexdigest()[:8]


def _cut(items: Sequence[Item], max_samples: int, max_bytes: int) -> Iterator[list[Item]]:
    group: list[Item] = []
    num_bytes = 0
    for item in items:
        size = item.packed_bytes if isinstance(item, ImageFile) else 0
        if group and (len(group) == max_samples or num_bytes + size > max_bytes):
            yield group
            group, num_bytes = [], 0
        group.append(item)
        num_bytes += size
    if group:
        yield group


class PackedSet(NamedTuple):
    manifest: Manifest
    is_new: bool  # False: everything was packed already


def _pack_set(plan: SetPlan, config: PrepareConfig) -> PackedSet:
    """Pack the shards that do not exist yet; the manifest is written last.

    Raises:
        ConfigError: An existing shard was packed from files that have changed since.
    """
    started_at_s = time.monotonic()
    finished = finished_manifest(plan)
    doing = "packing" if finished is None else "comparing with what was packed:"
    num_shards, num_items = plan.counts
    shards = "1 shard" if num_shards == 1 else f"{num_shards} shards"
    log.info("output=%s %s %d images in %s", plan.output, doing, num_items, shards)
    records: dict[str, ShardRecord] = {}
    skipped: list[SkippedImage] = []
    num_images = num_new = 0
    logged_at_s = started_at_s

    def reached() -> progress.Progress:
        detail = f"images={num_images}"
        return progress.Progress("packing shards", len(records), len(plan.shards), detail)

    with progress.doing("packing shards", reached):
        for name, (record, is_new) in _pack_shards(plan, min(config.workers, len(plan.shards))):
            records[name] = record
            num_new += is_new
            skipped += record.skipped
            num_images += record.shard.num_samples
            if finished is None and len(skipped) > config.max_bad_ratio * plan.num_items:
                _refuse(plan, skipped, config.max_bad_ratio)
            now_s = time.monotonic()
            is_due = now_s - logged_at_s >= PROGRESS_EVERY_S and not progress.shows_bar()
            if is_due or len(records) == len(plan.shards):
                logged_at_s = now_s
                rate = num_images / max(now_s - started_at_s, 1e-9)
                shown = f"shards={len(records)}/{len(plan.shards)} images={num_images}"
                log.info("output=%s %s images_per_s=%.0f", plan.output, shown, rate)
    ordered = [records[shard.name] for shard in plan.shards]
    _tell_masks(plan, sum_masks(record.masks for record in ordered))
    if finished is not None and not num_new:
        return PackedSet(finished, is_new=False)
    place = _write_skipped(plan, [image for record in ordered for image in record.skipped])
    if skipped:
        shown = f"{len(skipped)} of {plan.num_items} images: {_reasons(skipped)}"
        log.warning("left out %s; see %s", shown, place)
    manifest = Manifest(
        shards=tuple(record.shard for record in ordered),
        classes=plan.classes,
        channel_stats=sum_pixels(record.pixels for record in ordered).channel_stats(),
    )
    if plan.categories:
        listed = [{"id": number, "name": name} for number, name in plan.categories]
        storage.write_bytes(storage.join(plan.output, CATEGORIES_NAME), json_bytes(listed))
    text = manifest.model_dump_json(indent=2) + "\n"
    storage.write_bytes(storage.join(plan.output, MANIFEST_NAME), text.encode())
    return PackedSet(manifest, is_new=True)


def _tell_masks(plan: SetPlan, masks: MaskSummary) -> None:
    line = mask_line(masks)
    if line is not None:
        log.info("output=%s %s", plan.output, line)
    for warning in mask_warnings(masks):
        log.warning("output=%s %s", plan.output, warning)


def _refuse(plan: SetPlan, skipped: Sequence[SkippedImage], max_bad_ratio: float) -> None:
    place = _write_skipped(plan, skipped)
    raise DataError(
        f"{len(skipped)} of {plan.num_items} images can't be used, more than "
        f"max_bad_ratio={max_bad_ratio}: {_reasons(skipped)}; the first is {skipped[0].source}: "
        f"{skipped[0].reason}; see {place}"
    )


def _write_skipped(plan: SetPlan, skipped: Iterable[SkippedImage]) -> str:
    place = storage.join(plan.output, SKIPPED_NAME)
    lines = [json.dumps(image.model_dump()) + "\n" for image in skipped]
    storage.write_bytes(place, "".join(lines).encode())
    return place


def _reasons(skipped: Iterable[SkippedImage]) -> str:
    counts = Counter(image.reason.partition(" (")[0] for image in skipped)
    return ", ".join(f"{count} x {reason}" for reason, count in counts.most_common(5))


def _check_companions(items: Sequence[Item]) -> None:
    for item in items:
        names = [name for name, *_ in item.companions] if isinstance(item, ImageFile) else []
        has_boxes = isinstance(item, SceneItem) or item.boxes is not None
        if has_boxes or not {"json", "seg.png"}.isdisjoint(names):
            raise ConfigError(
                f"transcode_short_side: {item.source} has boxes or a mask in pixels beside it, "
                "which would not fit the smaller image; pack this set as it is"
            )


def _pack_shards(plan: SetPlan, workers: int) -> Iterator[tuple[str, PackedShard]]:
    """Pack in parallel, and yield each shard's record when it is finished."""
    arguments = plan.output, plan.digest, plan.in_chans, plan.transcode
    if workers == 1:
        for shard in plan.shards:
            yield shard.name, pack_shard(shard, *arguments)
        return
    with process_pool(workers) as pool:
        waiting = iter(plan.shards)
        running: dict[Future[PackedShard], str] = {}
        while True:
            # A few at a time, so that a plan of millions of images is not copied at once.
            for shard in islice(waiting, 2 * workers - len(running)):
                task = pool.submit(pack_shard, shard, *arguments)
                running[task] = shard.name
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for task in done:
                yield running.pop(task), task.result()
