"""Find the manifest of shards that a config names: from `mae prepare`, or by indexing the tars."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from infra import storage
from infra.shard_spec import as_entries
from mae_core.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    SampleIndex,
    ShardInfo,
    index_to_bytes,
    merge_manifests,
    parse_manifest,
)
from mae_core.data.samples import IMAGE_EXTENSIONS, ShardIndex, index_shard, some_extensions
from pipelines.reading.fingerprints import shard_facts

logger = logging.getLogger(__name__)

_INDEX_THREADS = 8
_IMAGE_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
_FOLDERS_LOOKED_AT = 5


def hint_to_pack(spec: str | tuple[str, ...]) -> str:
    """Suggest `mae prepare` if an entry is a folder of images, or of folders with images."""
    for entry in as_entries(spec):
        names = storage.list_files(entry)
        names += [
            name
            for folder in storage.list_folders(entry)[:_FOLDERS_LOOKED_AT]
            for name in storage.list_files(storage.join(entry, folder))
        ]
        if any(name.lower().endswith(_IMAGE_ENDINGS) for name in names):
            return (
                f". These are images; pack them into shards first: mae prepare {entry} OUT, and "
                "give OUT"
            )
        if entry.lower().endswith((*_IMAGE_ENDINGS, ".txt", ".csv")):
            return f". Pack the images into shards first: mae prepare {entry} OUT, and give OUT"
    return ""


def read_manifests(shards: list[str], cache_uri: str) -> Manifest:
    """Return the manifest of all shards: each folder's own, or the result of indexing."""
    by_folder: dict[str, list[str]] = {}
    for shard in shards:
        by_folder.setdefault(shard.rpartition("/")[0], []).append(shard)
    prepared = {folder: _prepared_manifest(folder, ours) for folder, ours in by_folder.items()}
    foreign = [
        shard for folder, ours in by_folder.items() if prepared[folder] is None for shard in ours
    ]
    if len(foreign) == len(shards):
        return _indexed_manifest(shards, cache_uri)
    found = [manifest for manifest in prepared.values() if manifest is not None]
    if foreign:
        found.append(_indexed_manifest(foreign, cache_uri))
    return found[0] if len(found) == 1 else merge_manifests(found)


def _prepared_manifest(folder: str, shards: list[str]) -> Manifest | None:
    """Return the manifest that `mae prepare` wrote into the folder, if it covers these shards."""
    uri = storage.join(folder, MANIFEST_NAME)
    if not storage.exists(uri):
        return None
    manifest = parse_manifest(storage.read_bytes(uri), uri)
    resolved = tuple(
        shard.model_copy(
            update={
                "path": storage.join(folder, shard.path),
                "index": storage.join(folder, shard.index),
            }
        )
        for shard in manifest.shards
    )
    wanted = set(shards)
    chosen = tuple(shard for shard in resolved if shard.path in wanted)
    if len(chosen) != len(shards):
        logger.warning("%s does not list all of the shards; indexing them", uri)
        return None
    damaged = {storage.join(folder, path): why for path, why in manifest.damaged.items()}
    return manifest.model_copy(
        update={
            "shards": chosen,
            "damaged": {path: why for path, why in damaged.items() if path in wanted},
        }
    )


def _indexed_manifest(shards: list[str], cache_uri: str) -> Manifest:
    facts = shard_facts(shards)
    cached = storage.join(cache_uri, MANIFEST_NAME)
    if storage.exists(cached):
        manifest = parse_manifest(storage.read_bytes(cached), cached)
        known = [(s.path, (s.num_bytes, s.changed_at_ns)) for s in manifest.shards]
        # A damaged tar may have been replaced by one of equal size and, by rounding, equal time.
        if known == list(zip(shards, facts, strict=True)) and not manifest.damaged:
            return manifest
    logger.info("indexing %d tars without a manifest", len(shards))
    indexed = _in_threads(partial(_index_one, cache_uri=cache_uri), list(enumerate(shards)))
    infos = tuple(
        ShardInfo(path=path, index=uri, num_samples=found.num_samples, **fact._asdict())
        for path, fact, (uri, found) in zip(shards, facts, indexed, strict=True)
    )
    manifest = Manifest(
        shards=infos,
        left_out=sum((found.left_out for _, found in indexed), Counter()),
        unused_extensions=some_extensions(found for _, found in indexed),
        damaged={
            path: str(found.damage)
            for path, (_, found) in zip(shards, indexed, strict=True)
            if found.damage is not None
        },
    )
    storage.write_bytes(cached, manifest.model_dump_json(indent=1).encode())
    return manifest


def _index_one(numbered: tuple[int, str], cache_uri: str) -> tuple[str, ShardIndex]:
    number, shard = numbered
    opener = storage.open_stream if storage.is_remote(shard) else storage.open_random
    with storage.storage_errors("read", shard), opener(shard) as stream:
        found = index_shard(stream, shard, lenient=True)
    uri = storage.join(cache_uri, f"{number:06d}.index.npy")
    storage.write_bytes(uri, index_to_bytes(SampleIndex(found.offsets, None)))
    return uri, found


def _in_threads(function: Any, items: list[Any]) -> list[Any]:
    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        return list(pool.map(function, items))
