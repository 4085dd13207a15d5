"""Fingerprint the data at a location: changes when the data does, not when it is moved.

Shards with a manifest count by its checksums, unless they changed after it was written; a
checkpoint counts by its own manifest, weights from elsewhere by their contents. Everything else
counts by name, size and time of change, because reading all of it would take as long as using it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from infra import storage
from infra.shard_spec import as_entries, expand_shards
from mae_core.data.manifest import Manifest, parse_manifest
from mae_core.data.samples import DataError
from pipelines.outcome import ConfigError
from pipelines.reading.weight_places import RUN_PREFIX, SUFFIXES, content_digest, weight_files

MANIFEST_NAME = "manifest.json"
NAME_FILES = ("classes.json", "categories.json")
LISTS = (".txt", ".csv", ".tsv")


def fingerprint(
    spec: str | Sequence[str], *, by_time: bool = False, with_names: bool = True
) -> str:
    """Fingerprint what a config's field names: shards, checkpoint, folder, file, or a list.

    Args:
        spec: As in the config.
        by_time: Shards count by name, size and time, whatever a manifest says about them.
        with_names: The names of the classes, which lie beside the shards, count too.

    Raises:
        ConfigError: Nothing exists there.
        StorageError: The store cannot be used.
    """
    hasher = hashlib.sha256()
    for entry in as_entries(spec):
        for line in _facts(entry, by_time, with_names):
            hasher.update(f"{line}\n".encode())
    return hasher.hexdigest()[:16]


def _shards(entry: str) -> Sequence[str]:
    """List the shards that an entry names; none if it names something else."""
    if entry.startswith(RUN_PREFIX):
        raise ConfigError(
            f"{entry}: is looked for under storage.root, which is another one for each stage of a "
            "pipeline; name the stage, such as {pretrain}, or the run's folder"
        )
    try:
        return expand_shards(entry)
    except storage.NoShardsError as error:
        if "{" in entry or "*" in entry or entry.endswith(".tar"):
            raise ConfigError(str(error)) from error
        return []
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _weights_fact(entry: str) -> str | None:
    """Return a line for a checkpoint or for weights from elsewhere; None for anything else."""
    manifest = _read(storage.join(entry, MANIFEST_NAME))
    if manifest is not None and _is_checkpoint(manifest):
        return f"checkpoint {_checkpoint_digest(manifest)}"
    is_file = entry.endswith(SUFFIXES)
    files = weight_files(entry) if is_file or manifest is None else None
    # A file of any other kind may be large, and counts by its size and time of change.
    if files is None or (len(files) == 1 and not is_file):
        return None
    return f"weights {content_digest(entry, files)}"


def _facts(entry: str, by_time: bool, with_names: bool) -> Iterator[str]:
    if shards := _shards(entry):
        yield from _shard_facts(shards, by_time, with_names)
        return
    if (weights := _weights_fact(entry)) is not None:
        yield weights
        return
    if entry.endswith(LISTS):
        yield from _listed_facts(entry)
    found = storage.list_tree(entry)
    if not found and not storage.exists(entry):
        raise ConfigError(f"{storage.absolute(entry)}: does not exist")
    for name, info in sorted(found.items()):
        yield f"{name} {info.num_bytes} {info.changed_at_ns}"


def _is_checkpoint(manifest: bytes) -> bool:
    try:
        fields = json.loads(manifest)
    except ValueError:
        return False
    return isinstance(fields, dict) and {"model", "step", "files"} <= fields.keys()


def _checkpoint_digest(manifest: bytes) -> str:
    """Return a digest of a checkpoint's manifest.

    Weights from elsewhere are taken over again where their copy was deleted, perhaps by other
    versions of the libraries, which then do not count.
    """
    fields = json.loads(manifest)
    if fields.get("origin") is None:
        return hashlib.sha256(manifest).hexdigest()
    kept = {k: x for k, x in fields.items() if k not in ("versions", "manifest_sha256", "origin")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _listed_facts(entry: str) -> Iterator[str]:
    """Yield facts about each image that a list file names, as `mae prepare` reads it."""
    folder = Path(storage.absolute(entry)).parent
    for line in (_read(entry) or b"").decode(errors="replace").splitlines():
        file = folder / re.split(r"[\t,]", line.strip())[0]
        if file.is_file():
            yield f"{line} {file.stat().st_size} {file.stat().st_mtime_ns}"


def _shard_facts(shards: Sequence[str], by_time: bool, with_names: bool) -> Iterator[str]:
    """Yield for each shard its checksum, if a manifest beside it has one that is still valid."""
    for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards):
        listed = storage.list_tree(folder, deep=False)
        manifest = None if by_time else _manifest_of(folder)
        known = {} if manifest is None else {x.path: x for x in manifest.shards}
        for name in [s.rpartition("/")[2] for s in shards if s.rpartition("/")[0] == folder]:
            info, entry = listed[name], known.get(name)
            # The manifest is written last, so it does not cover a tar that changed afterwards.
            is_known = (
                entry is not None
                and entry.num_bytes == info.num_bytes
                and info.changed_at_ns <= listed[MANIFEST_NAME].changed_at_ns
            )
            checked = entry.sha256 if entry is not None and is_known else None
            yield f"{name} {info.num_bytes} {checked or info.changed_at_ns}"
        if manifest is not None:
            yield f"{manifest.classes if with_names else None} {manifest.channel_stats}"
        elif not by_time:
            yield ""
        if with_names:
            for name in (n for n in listed if n in NAME_FILES):
                content = storage.read_bytes(f"{folder}/{name}")
                yield f"{name} {hashlib.sha256(content).hexdigest()}"


def shard_facts(shards: Sequence[str]) -> list[storage.FileFacts]:
    """Return size and time of change of each shard, listing each folder once.

    Raises:
        NoShardsError: A shard is gone.
    """
    listed: dict[str, dict[str, storage.FileFacts]] = {}
    facts = []
    for folder, _, name in (shard.rpartition("/") for shard in shards):
        if folder not in listed:
            listed[folder] = storage.list_tree(folder, deep=False)
        if name not in listed[folder]:
            raise storage.NoShardsError(f"{folder}/{name} is gone")
        facts.append(listed[folder][name])
    return facts


def _manifest_of(folder: str) -> Manifest | None:
    text = _read(storage.join(folder, MANIFEST_NAME))
    return None if text is None else parse_folder_manifest(text, folder)


def parse_folder_manifest(text: bytes, folder: str) -> Manifest:
    """Parse a manifest, or raise a ConfigError if it is damaged."""
    try:
        return parse_manifest(text, storage.join(folder, MANIFEST_NAME))
    except DataError as error:
        raise ConfigError(str(error)) from error


def _read(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except storage.StorageError:
        if storage.is_remote(uri):
            raise
        return None  # the entry is a pattern, or a file


def num_samples(spec: str | Sequence[str]) -> int | None:
    """Return the number of samples that the shards' manifests state; None if one has none."""
    total = 0
    for entry in as_entries(spec):
        try:
            shards = expand_shards(entry)
        except (storage.NoShardsError, storage.StorageError, ValueError):
            return None
        for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards):
            try:
                manifest = _manifest_of(folder)
            except ConfigError:
                manifest = None
            if manifest is None:
                return None
            counts = {shard.path: shard.num_samples for shard in manifest.shards}
            names = [s.rpartition("/")[2] for s in shards if s.rpartition("/")[0] == folder]
            if any(name not in counts for name in names):
                return None
            total += sum(counts[name] for name in names)
    return total
