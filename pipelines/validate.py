#!/usr/bin/env python
"""Check shards before training on them: a gate that exits with code 3 if it refuses.

mae validate data=data/shapes/train labels=class num_classes=10
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files in this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["validate", *sys.argv[1:]]))

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from infra import storage
from infra.own_files import read_own
from infra.shard_spec import as_entries
from mae_core.data.boxes import parse_boxes
from mae_core.data.class_labels import read_labels
from mae_core.data.decode import decode_image
from mae_core.data.label_maps import check_same_size, decode_indices
from mae_core.data.manifest import ChannelStats, PixelSums, ShardInfo, sum_pixels
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.samples import DataError, Sample
from pipelines import driver
from pipelines.config.validate import ValidateConfig
from pipelines.outcome import RefusedError, StageResult
from pipelines.reading.class_names import (
    folder_of,
    folders_of,
    read_category_names,
    read_class_names,
)
from pipelines.reading.shards import BrokenSample, open_shards, read_samples
from pipelines.terminal import progress

logger = logging.getLogger(__name__)

STAGE = "validate"
ROWS_PER_READ = 256
MAX_EXAMPLES = 3
MAX_NAMED = 10


class Look(NamedTuple):
    """The findings about one sample."""

    where: str
    digest: str  # of the image's bytes
    pixels: PixelSums | None  # None if it can't be decoded
    decode_error: str
    label_error: str
    classes: tuple[int, ...]
    folder: str = ""  # folder of its shard
    has_ignored: bool = False  # whether its mask has pixels that are not counted


class Check(NamedTuple):
    """A row of the table."""

    name: str
    found: float
    limit: str
    is_ok: bool
    examples: tuple[str, ...] = ()


class Profile(NamedTuple):
    """Statistics of a set, to measure drift between sets."""

    mean: list[float]
    std: list[float]
    classes: dict[str, float]  # share of each class by its number
    names: dict[str, float] | None = None  # share of each class by its name, if the set has names


def run(config: ValidateConfig, *, fresh: bool) -> StageResult:
    """Check the shards and write the table; `fresh` has nothing to delete.

    Raises:
        RefusedError: A check failed; the message is the table.
        ConfigError, NoShardsError, DataError, StorageError: The shards can't be read.
    """
    del fresh
    uris = as_entries(config.data)
    driver.check_paths([*(("data", uri) for uri in uris), ("storage.root", config.storage.root)])
    place = storage.join(storage.absolute(config.storage.root), STAGE, config.run_name)
    shards, left_out = _open(config, place)
    looks: list[Look] = []
    total = sum(_num_looked_at(config, shards))

    def reached() -> progress.Progress:
        return progress.Progress("checking images", len(looks), total)

    with progress.doing("checking images", reached):
        looks.extend(_look_at(config, shards))
    profile = _profile(looks, _names(config, shards))
    checks = [
        *_checks(config, shards, left_out, looks),
        *_drift(config, profile),
    ]
    table = checks_table(config.name, checks)
    output = storage.join(place, "validation.json")
    fields = {"checks": [check._asdict() for check in checks], "profile": profile._asdict()}
    storage.write_bytes(output, json.dumps(fields, indent=1).encode())
    if not all(check.is_ok for check in checks):
        raise RefusedError(table)
    logger.info("%s", table)
    if config.reference is not None:
        storage.write_bytes(config.reference, json.dumps(profile._asdict()).encode())
    metrics = {check.name.replace(" ", "_"): check.found for check in checks}
    return StageResult(STAGE, "done", None, output, metrics)


def _open(config: ValidateConfig, place: str) -> tuple[list[ShardInfo], Counter[str]]:
    manifest = open_shards(
        config.data, storage.join(place, "shards"), max_bad_ratio=config.max_bad_ratio
    )
    left_out = Counter(manifest.left_out)
    left_out["damaged_shard"] += len(manifest.damaged)
    return list(manifest.shards), +left_out


def _num_looked_at(config: ValidateConfig, shards: list[ShardInfo]) -> list[int]:
    """Return how many samples to check in each shard."""
    share = min(1.0, config.max_images / sum(shard.num_samples for shard in shards))
    return [int(np.ceil(share * shard.num_samples)) for shard in shards]


def _look_at(config: ValidateConfig, shards: list[ShardInfo]) -> Iterator[Look]:
    """Check about `max_images` samples, from the start of each shard in proportion to its size."""
    pieces = [
        (shard, start, min(start + ROWS_PER_READ, stop))
        for shard, stop in zip(shards, _num_looked_at(config, shards), strict=True)
        for start in range(0, stop, ROWS_PER_READ)
    ]

    def read(piece: tuple[ShardInfo, int, int]) -> list[Look]:
        shard, start, stop = piece
        return [_look(config, shard.path, row) for row in read_samples(shard, start, stop)]

    with ThreadPoolExecutor(config.workers) as pool:
        for looks in pool.map(read, pieces):
            yield from looks


def _look(config: ValidateConfig, shard: str, row: Sample | BrokenSample) -> Look:
    where = f"{shard}: {row.key}"
    if isinstance(row, BrokenSample):
        return Look(where, where, None, row.error, "", ())
    digest = hashlib.sha256(row.image).hexdigest()
    pixels, decode_error = None, ""
    decoded: Pixels | None = None
    try:
        decoded = decode_image(row.image, config.in_chans)
        pixels = PixelSums.of(decoded)
    except CorruptSampleError as error:
        decode_error = str(error)
    found: tuple[int, ...] = ()
    label_error = ""
    try:
        found = _classes(config, row, where, decoded)
    except DataError as error:
        label_error = str(error).removeprefix(f"{where}: ").removeprefix(f"{where} ")
    has_ignored = config.labels == "mask" and config.ignore_value in found
    classes = tuple(n for n in found if not (has_ignored and n == config.ignore_value))
    folder = folder_of(shard)
    return Look(where, digest, pixels, decode_error, label_error, classes, folder, has_ignored)


def _classes(
    config: ValidateConfig, row: Sample, where: str, pixels: Pixels | None
) -> tuple[int, ...]:
    """Return the class numbers in a sample's label, including the ignored one.

    `pixels` are the image's, or None if it can't be decoded.

    Raises:
        DataError: The label is missing, unreadable, or out of range.
    """
    if config.labels == "none":
        return ()
    if config.labels == "class":
        found = [int(label) for label in read_labels(row.parts.get("cls"), where, key=None)]
        allowed = range(config.num_classes or 2**31)
    elif config.labels == "boxes":
        data = row.parts.get("json")
        parse_boxes(data, where, None, picture=None if pixels is None else pixels.shape)
        found = [int(item["category_id"]) for item in _box_items(data)]
        allowed = range(1, config.num_classes + 1) if config.num_classes else range(2**31)
    else:
        indices = decode_indices(row.parts.get("seg.png"), where)
        if pixels is not None:
            check_same_size(pixels, indices, where)
        found = [int(index) for index in np.unique(indices)]
        allowed = range(config.num_classes or 2**31)
    ignored = config.ignore_value if config.labels == "mask" else None
    if outside := [x for x in found if x not in allowed and x != ignored]:
        last = allowed[-1]
        raise DataError(f"{where}: class {outside[0]} is not in {allowed[0]} to {last}")
    return tuple(found)


def _box_items(data: bytes | None) -> list[dict[str, int]]:
    raw = json.loads(data or b"{}")
    items = raw.get("annotations", raw.get("objects", []))
    return [item for item in items if "category_id" in item]


def _names(config: ValidateConfig, shards: list[ShardInfo]) -> dict[str, dict[int, str]]:
    """Return the names of the class numbers by folder, for folders that name any."""
    if config.labels == "boxes":
        named = {folder: read_category_names(folder) for folder in folders_of(shards)}
    elif config.labels == "class":
        found = read_class_names(shards)
        named = {folder: dict(enumerate(names or ())) for folder, names in found.items()}
    else:
        named = {}
    return {folder: names for folder, names in named.items() if names}


def _profile(looks: list[Look], named: dict[str, dict[int, str]]) -> Profile:
    pixels = [look.pixels for look in looks if look.pixels is not None]
    stats: ChannelStats | None = sum_pixels(pixels).channel_stats() if pixels else None
    numbers = Counter(number for look in looks for number in look.classes)
    names: Counter[str] = Counter()
    if all(look.folder in named for look in looks if look.classes):
        names.update(
            named[look.folder].get(number, str(number)) for look in looks for number in look.classes
        )
    return Profile(
        list(stats.mean) if stats else [],
        list(stats.std) if stats else [],
        {str(number): count / numbers.total() for number, count in sorted(numbers.items())},
        {name: count / names.total() for name, count in sorted(names.items())},
    )


def _class_checks(config: ValidateConfig, looks: list[Look]) -> Iterator[Check]:
    """Report classes that never occur; refuse masks that contain a single class."""
    found = {number for look in looks for number in look.classes}
    first = 1 if config.labels == "boxes" else 0
    wanted = range(first, first + (config.num_classes or 0))
    if absent := [str(number) for number in wanted if number not in found]:
        logger.warning(
            "%s: class %s of num_classes=%d is in none of the %d samples that were checked",
            config.name,
            ", ".join(absent[:MAX_NAMED]),
            config.num_classes,
            len(looks),
        )
    if config.labels == "mask" and config.num_classes != 1:
        only = f"the masks contain {f'only class {min(found)}' if found else 'no class'}"
        num_ignored = sum(look.has_ignored for look in looks)
        if num_ignored:
            value = config.ignore_value
            only += (
                f", and {value} (ignored) in {num_ignored} of {len(looks)}: are these masks of 0 "
                f"and {value}? ignore_value=null counts it as a class"
            )
        yield Check("classes in masks", len(found), "at least 2", len(found) > 1, (only,))


def _checks(
    config: ValidateConfig, shards: list[ShardInfo], left_out: Counter[str], looks: list[Look]
) -> Iterator[Check]:
    total = sum(shard.num_samples for shard in shards)
    yield Check("num samples", total, f"at least {config.min_samples}", total >= config.min_samples)
    reasons = tuple(f"{count} x {reason}" for reason, count in left_out.most_common(MAX_EXAMPLES))
    lost = sum(left_out.values()) / max(total + sum(left_out.values()), 1)
    yield _share("left out ratio", lost, config.max_bad_ratio, reasons)
    bad = [f"{look.where}: {look.decode_error}" for look in looks if look.decode_error]
    yield _share("bad ratio", len(bad) / len(looks), config.max_bad_ratio, bad)
    wrong = [f"{look.where}: {look.label_error}" for look in looks if look.label_error]
    if config.labels != "none":
        yield _share("label error ratio", len(wrong) / len(looks), config.max_label_errors, wrong)
        yield from _class_checks(config, looks)
    twins = list(_duplicates(looks))
    yield _share("duplicate ratio", len(twins) / len(looks), config.max_duplicates, twins)


def _share(name: str, found: float, limit: float, examples: object) -> Check:
    assert isinstance(examples, list | tuple)
    return Check(name, found, f"at most {limit:g}", found <= limit, tuple(examples[:MAX_EXAMPLES]))


def _duplicates(looks: list[Look]) -> Iterator[str]:
    first: dict[str, str] = {}
    for look in looks:
        known = first.setdefault(look.digest, look.where)
        if known != look.where:
            yield f"{look.where} is the image of {known}"


def _drift(config: ValidateConfig, now: Profile) -> Iterator[Check]:
    if config.reference is None:
        return
    before = read_own(
        config.reference,
        Profile,
        "reference=... names the file of an earlier check; delete it to begin with this set",
    )
    if before is None:
        return
    if len(before.mean) != len(now.mean):
        counts = f"{len(before.mean)} -> {len(now.mean)}"
        yield Check("drift channels", float("inf"), "as many", False, (counts,))
        return
    means = [abs(a - b) / s for a, b, s in zip(now.mean, before.mean, before.std, strict=True)]
    spreads = [abs(a / b - 1) for a, b in zip(now.std, before.std, strict=True)]
    # By name if both sets have names, because a number may mean another class by now.
    by_name = bool(before.names and now.names)
    old, new = ((p.names or {}) if by_name else p.classes for p in (before, now))
    classes = sum(abs(new.get(n, 0) - old.get(n, 0)) for n in {*old, *new}) / 2
    shown = f"{np.round(before.mean, 3).tolist()} -> {np.round(now.mean, 3).tolist()}"
    yield _share("drift mean", max(means, default=0.0), config.max_drift, [shown])
    yield _share("drift spread", max(spreads, default=0.0), config.max_drift, [])
    yield _share("drift classes", classes, config.max_drift, [])


def checks_table(name: str, checks: list[Check]) -> str:
    """Format a table for a terminal: a line per check, with examples of failures."""
    width = max(len(check.name) for check in checks)
    lines = [f"{name}:"]
    for check in checks:
        verdict = "ok" if check.is_ok else "REFUSED"
        lines.append(f"  {check.name:{width}}  {check.found:>10.5g}  {check.limit:16}  {verdict}")
        if not check.is_ok:
            lines += [f"    {example}" for example in check.examples]
    return "\n".join(lines)
