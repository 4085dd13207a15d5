"""What lies at a place, in a few characters: changes when the data does, not when it is moved.

Shards with a manifest count by its checksums, a checkpoint by its own manifest. All else counts
by name, size and time of change, for reading it all would take as long as using it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from infra import storage
from infra.shard_spec import expand_shards
from mae_core.data.manifest import Manifest, parse_manifest
from mae_core.data.samples import DataError
from pipelines.config import ConfigError

MANIFEST_NAME = "manifest.json"
LISTS = (".txt", ".csv", ".tsv")


def fingerprint(spec: str | Sequence[str], *, by_time: bool = False) -> str:
    """Of what a config's field names: shards, a checkpoint, a folder, a file, or a list of these.

    Args:
        spec: as in the config.
        by_time: shards count by name, size and time, whatever a manifest says of them.

    Raises:
        ConfigError: nothing is there.
        StorageError: the store cannot be used.
    """
    hasher = hashlib.sha256()
    for entry in [spec] if isinstance(spec, str) else spec:
        for line in _facts(entry, by_time):
            hasher.update(f"{line}\n".encode())
    return hasher.hexdigest()[:16]


def _facts(entry: str, by_time: bool) -> Iterator[str]:
    try:
        shards = expand_shards(entry)
    except storage.NoShardsError as error:
        if "{" in entry or "*" in entry or entry.endswith(".tar"):
            raise ConfigError(str(error)) from error
        shards = []
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if shards:
        yield from _shard_facts(shards, by_time)
        return
    manifest = _read(storage.join(entry, MANIFEST_NAME))
    if manifest is not None and _is_checkpoint(manifest):
        yield f"checkpoint {hashlib.sha256(manifest).hexdigest()}"
        return
    if entry.endswith(LISTS):
        yield from _listed_facts(entry)
    found = storage.list_tree(entry)
    if not found and not storage.exists(entry):
        raise ConfigError(f"{storage.absolute(entry)}: there is nothing")
    for name, info in sorted(found.items()):
        yield f"{name} {info.num_bytes} {info.changed_at_ns}"


def _is_checkpoint(manifest: bytes) -> bool:
    try:
        fields = json.loads(manifest)
    except ValueError:
        return False
    return isinstance(fields, dict) and {"model", "step", "files"} <= fields.keys()


def _listed_facts(entry: str) -> Iterator[str]:
    """Of each image that a list names, as `mae prepare` takes one."""
    folder = Path(storage.absolute(entry)).parent
    for line in (_read(entry) or b"").decode(errors="replace").splitlines():
        file = folder / re.split(r"[\t,]", line.strip())[0]
        if file.is_file():
            yield f"{line} {file.stat().st_size} {file.stat().st_mtime_ns}"


def _shard_facts(shards: Sequence[str], by_time: bool) -> Iterator[str]:
    """Of each shard its checksum where a manifest beside it has one of a file of this size."""
    for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards):
        listed = storage.list_tree(folder, deep=False)
        known = {} if by_time else _checksums(folder)
        for name in [s.rpartition("/")[2] for s in shards if s.rpartition("/")[0] == folder]:
            info = listed[name]
            num_bytes, sha256 = known.get(name, (-1, None))
            checked = sha256 if num_bytes == info.num_bytes else None
            yield f"{name} {info.num_bytes} {checked or info.changed_at_ns}"
        if not by_time:
            yield _said_of_all(folder)
        companions = [n for n in listed if n in ("classes.json", "categories.json")]
        for name in companions:
            yield f"{name} {hashlib.sha256(storage.read_bytes(f'{folder}/{name}')).hexdigest()}"


def _said_of_all(folder: str) -> str:
    """What else a manifest says that training uses."""
    text = _read(storage.join(folder, MANIFEST_NAME))
    manifest = None if text is None else read_manifest(text, folder)
    return "" if manifest is None else f"{manifest.classes} {manifest.channel_stats}"


def _checksums(folder: str) -> dict[str, tuple[int, str | None]]:
    text = _read(storage.join(folder, MANIFEST_NAME))
    if text is None:
        return {}
    manifest = read_manifest(text, folder)
    return {shard.path: (shard.num_bytes, shard.sha256) for shard in manifest.shards}


def read_manifest(text: bytes, folder: str) -> Manifest:
    """Raises: ConfigError: it is damaged."""
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
    """Of shards whose manifests say it; None where one does not."""
    total = 0
    for entry in [spec] if isinstance(spec, str) else spec:
        try:
            shards = expand_shards(entry)
        except (storage.NoShardsError, storage.StorageError, ValueError):
            return None
        for folder in dict.fromkeys(shard.rpartition("/")[0] for shard in shards):
            text = _read(storage.join(folder, MANIFEST_NAME))
            try:
                manifest = None if text is None else read_manifest(text, folder)
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
