#!/usr/bin/env python
"""Pack images into WebDataset shards with a manifest.

    mae prepare photos shards/photos
    mae prepare list.txt s3://bucket/photos
    mae prepare --synthetic shapes data/shapes
    mae prepare index s3://bucket/tars      # tars that lie there: manifest and index beside them
    mae prepare stats s3://bucket/tars      # and the channel statistics of all their images
    python pipelines/prepare.py configs/prepare/demo.yaml num_train=10000

A folder of folders is a class each, in the order of their names; a flat folder has no labels. Files
beside x.jpg that are named x.json, x.txt or x.seg.png go with it. The same input and config give
the same bytes, whatever the number of workers. The same command goes on where it was stopped.

The image's own bytes are kept. What can't be decoded is left out and listed in skipped.jsonl.
How images are found and keyed: mae_core/data/image_files.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files beside this one
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
from mae_core.data.manifest import MANIFEST_NAME, Manifest, parse_manifest, sum_pixels
from mae_core.data.randomness import named_generator
from mae_core.data.samples import DataError
from mae_core.data.synthetic import SHAPE_CLASSES, draw_scene, encode_scene
from pipelines import existing_shards
from pipelines.config import ConfigError, PrepareConfig, StageResult
from pipelines.packing import (
    CATEGORIES_NAME,
    STATE_FOLDER,
    Item,
    SceneItem,
    ShardPlan,
    ShardRecord,
    SkippedImage,
    Transcode,
    json_bytes,
    pack_shard,
)
from pipelines.process_pool import process_pool

log = logging.getLogger(__name__)

SKIPPED_NAME = "skipped.jsonl"
PLAN_NAME = "plan.json"
PROGRESS_EVERY_S = 5.0
# Validation scenes are far away from any training scene, so neither count moves the other's.
FIRST_VAL_SCENE = 1 << 32


class SetPlan(NamedTuple):
    """All that decides the bytes of one folder of shards."""

    output: str
    shards: tuple[ShardPlan, ...]
    classes: tuple[str, ...] | None
    in_chans: int
    transcode: Transcode | None
    facts: dict[str, int | str]  # what a person would compare, and the digest of everything
    categories: tuple[tuple[int, str], ...] = ()  # of the boxes: category_id and name

    @property
    def num_items(self) -> int:
        return sum(len(shard.items) for shard in self.shards)

    @property
    def source_bytes(self) -> int:
        items = (item for shard in self.shards for item in shard.items)
        return sum(item.packed_bytes for item in items if isinstance(item, ImageFile))

    @property
    def digest(self) -> str:
        return str(self.facts["digest"])


def run(config: PrepareConfig, *, fresh: bool) -> StageResult:
    """Pack what `config` names; go on where an earlier run was stopped, or start over if `fresh`.

    Raises:
        DataError: there is no image, or too many are broken.
        ConfigError: the output holds something else.
    """
    if config.existing is not None:
        return existing_shards.run(config, fresh=fresh)
    plans = _plan(config)
    for plan in plans:
        _claim_output(plan, fresh=fresh)
    found = [_finished_manifest(plan) for plan in plans]
    reused = None not in found
    if reused:
        log.info("output=%s is already packed; nothing to do", config.output)
    manifests = [old or _pack_set(plan, config) for plan, old in zip(plans, found, strict=True)]
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
    """Say which image goes where, before any pixel is read."""
    if config.source is not None:
        files, classes = find_images(Path(config.source).expanduser())
        categories: dict[int, str] = {}
        if config.annotations is not None:
            found = read_annotations(Path(config.annotations).expanduser())
            files, categories = _with_boxes(config, files, found), found.categories
        listed = tuple(categories.items())
        return [_plan_set(config, config.output, config.split, files, classes, listed)]
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


def _with_boxes(
    config: PrepareConfig, files: Sequence[ImageFile], found: Annotations
) -> list[ImageFile]:
    """Each image with its boxes.

    Raises:
        DataError: an image has a .json of its own too, or none of the images has boxes.
    """
    boxed = []
    taken: dict[str, str] = {}  # entry to the image that it is of
    for file in files:
        entry = found.name_of(file.source)
        if entry is None:
            boxed.append(file)
            continue
        if any(name == "json" for name, *_ in file.companions):
            raise DataError(f"{file.source} has a .json beside it, and boxes in annotations, too")
        if entry in taken:
            raise DataError(
                f"annotations={config.annotations}: {entry} may be {taken[entry]} or "
                f"{file.source}; name the folders in it, or pack them one by one"
            )
        taken[entry] = file.source
        boxed.append(file._replace(boxes=found.by_image[entry]))
    without = [file.source for file in boxed if file.boxes is None]
    if len(without) == len(boxed):
        raise DataError(
            f"annotations={config.annotations}: knows none of the images, such as {without[0]}; it "
            f"has {next(iter(found.by_image), 'nothing')}"
        )
    if without:
        log.warning(
            "annotations=%s: nothing on %d images, packed without boxes: %s",
            config.annotations,
            len(without),
            ", ".join(without[:5]),
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
    """Changes when the code that draws or encodes changes: half of a set must not be of each."""
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


def _claim_output(plan: SetPlan, *, fresh: bool) -> None:
    """Write the plan's facts into the output, or find them there from an earlier run."""
    place = storage.join(plan.output, STATE_FOLDER, PLAN_NAME)
    if fresh:
        _clear_output(plan.output)
    if storage.exists(place):
        try:
            old = json.loads(storage.read_bytes(place))
        except ValueError:
            raise ConfigError(f"{place} is damaged; start over with --fresh") from None
        if old == plan.facts:
            return
        changed = [name for name in plan.facts if old.get(name) != plan.facts[name]]
        shown = [f"{name}: {old.get(name)} -> {plan.facts[name]}" for name in changed[:-1]]
        raise ConfigError(
            f"output={plan.output} was packed from other images or with another config "
            f"({', '.join(shown) or 'the files differ'}); choose another output, or replace it "
            "with --fresh"
        )
    names = storage.list_files(plan.output)
    alien = [name for name in names if name.endswith(".tar") or name == MANIFEST_NAME]
    if alien:
        raise ConfigError(
            f"output={plan.output} holds shards of another origin, such as {alien[0]}; "
            "choose another output"
        )
    storage.write_bytes(place, json_bytes(plan.facts))


def _clear_output(output: str) -> None:
    """Delete what an earlier run packed, and nothing else."""
    names, folders = storage.list_files(output), storage.list_folders(output)
    packed = STATE_FOLDER in folders
    alien = [n for n in names if not n.startswith(".") and not (packed and _is_ours(n))]
    alien += [name for name in folders if name != STATE_FOLDER]
    if alien:
        raise ConfigError(
            f"--fresh: output={output} holds what `mae prepare` did not make, such as {alien[0]}; "
            "move it away, or choose another output"
        )
    if packed:
        storage.delete_folder(output)


def _is_ours(name: str) -> bool:
    return name.endswith((".tar", ".index.npy")) or name in {
        MANIFEST_NAME,
        SKIPPED_NAME,
        CATEGORIES_NAME,
    }


def _finished_manifest(plan: SetPlan) -> Manifest | None:
    """The manifest of a finished earlier run whose shards are all still there."""
    place = storage.join(plan.output, MANIFEST_NAME)
    names = set(storage.list_files(plan.output))
    if MANIFEST_NAME not in names:
        return None
    manifest = parse_manifest(storage.read_bytes(place), place)
    for shard in manifest.shards:
        if not {shard.path, shard.index} <= names:
            return None
        if storage.file_size(storage.join(plan.output, shard.path)) != shard.num_bytes:
            return None
    return manifest


def _pack_set(plan: SetPlan, config: PrepareConfig) -> Manifest:
    """Pack the shards that are not there yet; the manifest comes last."""
    started_at_s = time.monotonic()
    log.info("output=%s shards=%d images=%d", plan.output, len(plan.shards), plan.num_items)
    records: dict[str, ShardRecord] = {}
    skipped: list[SkippedImage] = []
    num_images = 0
    logged_at_s = started_at_s
    for name, record in _pack_shards(plan, min(config.workers, len(plan.shards))):
        records[name] = record
        skipped += record.skipped
        num_images += record.shard.num_samples
        if len(skipped) > config.max_bad_ratio * plan.num_items:
            _refuse(plan, skipped, config.max_bad_ratio)
        now_s = time.monotonic()
        if now_s - logged_at_s >= PROGRESS_EVERY_S or len(records) == len(plan.shards):
            logged_at_s = now_s
            rate = num_images / max(now_s - started_at_s, 1e-9)
            shown = f"shards={len(records)}/{len(plan.shards)} images={num_images}"
            log.info("output=%s %s images_per_s=%.0f", plan.output, shown, rate)
    ordered = [records[shard.name] for shard in plan.shards]
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
    return manifest


def _refuse(plan: SetPlan, skipped: Sequence[SkippedImage], max_bad_ratio: float) -> None:
    place = _write_skipped(plan, skipped)
    raise DataError(
        f"{len(skipped)} of {plan.num_items} images can't be used, more than "
        f"max_bad_ratio={max_bad_ratio}: {_reasons(skipped)}; the first is {skipped[0].source}; "
        f"see {place}"
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
                "which would not fit the smaller image any more; pack this set as it is"
            )


def _pack_shards(plan: SetPlan, workers: int) -> Iterator[tuple[str, ShardRecord]]:
    """Pack in any order, and give each shard's record when it is done."""
    arguments = plan.output, plan.digest, plan.in_chans, plan.transcode
    if workers == 1:
        for shard in plan.shards:
            yield shard.name, pack_shard(shard, *arguments)
        return
    with process_pool(workers) as pool:
        waiting = iter(plan.shards)
        running: dict[Future[ShardRecord], str] = {}
        while True:
            # Few at a time: a plan of millions of images is not copied at once.
            for shard in islice(waiting, 2 * workers - len(running)):
                task = pool.submit(pack_shard, shard, *arguments)
                running[task] = shard.name
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for task in done:
                yield running.pop(task), task.result()
