"""Find the shards of a specification: a folder, a tar, a pattern, or a list of these."""

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from braceexpand import braceexpand

from infra import storage

SHARD_SUFFIX = ".tar"


def as_entries(spec: str | Sequence[str]) -> tuple[str, ...]:
    """Return the entries of a specification, which may be one or several."""
    return (spec,) if isinstance(spec, str) else tuple(spec)


def expand_shards(spec: str | Sequence[str]) -> list[str]:
    """Return the absolute URIs of the shards that `spec` names, all of which must exist.

    An entry is a folder or s3:// prefix (its *.tar, without those in subfolders), one .tar, a
    brace pattern such as train-{000000..000099}.tar, a pattern with * or ? in its last part, or
    a list of these. Entries keep their order; names within an entry are sorted.

    Raises:
        NoShardsError: An entry matches nothing, or a named shard does not exist.
        ValueError: A shard is named twice.
    """
    shards = [shard for entry in as_entries(spec) for shard in _expand_entry(entry)]
    if not shards:
        raise storage.NoShardsError("the list of shards is empty")
    twice = [shard for shard, count in Counter(shards).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} shards are named twice, the first is {twice[0]}")
    return shards


def _expand_entry(entry: str) -> list[str]:
    if "{" in entry:
        return _named_shards(entry, [storage.absolute(uri) for uri in braceexpand(entry)])
    place = storage.absolute(entry)
    folder, name = _parent(place), place.rsplit("/", 1)[1]
    if "*" in name or "?" in name:
        names = [file for file in storage.list_files(folder) if fnmatchcase(file, name)]
        shards = [storage.join(folder, file) for file in names]
    elif name.endswith(SHARD_SUFFIX):
        return _named_shards(entry, [place])
    else:
        folder, names = place, storage.list_files(place)
        shards = [storage.join(place, file) for file in names if _is_shard(file)]
    if not shards:
        raise storage.NoShardsError(
            f"no *{SHARD_SUFFIX} file matches {place}: {_what_is_near(folder)}"
        )
    return shards


def _is_shard(name: str) -> bool:
    return name.endswith(SHARD_SUFFIX) and not name.startswith(".")


def _named_shards(entry: str, shards: list[str]) -> list[str]:
    # One listing per folder instead of one request per shard.
    folders = {_parent(shard) for shard in shards}
    present = {
        storage.join(folder, name) for folder in folders for name in storage.list_files(folder)
    }
    missing = [shard for shard in shards if shard not in present]
    if missing:
        raise storage.NoShardsError(
            f"{len(missing)} of {len(shards)} shards that {entry!r} names do not exist,"
            f" the first is {missing[0]}: {_what_is_near(_parent(missing[0]))}"
        )
    return shards


def _parent(place: str) -> str:
    return place.rsplit("/", 1)[0] or "/"


def _what_is_near(folder: str) -> str:
    """Describe the nearest existing folder and its contents, for the error."""
    nearest = folder
    while nearest.count("/") > (2 if storage.is_remote(nearest) else 0) and not storage.exists(
        nearest
    ):
        nearest = _parent(nearest)
    if nearest == folder and storage.is_file(nearest):
        return f"{nearest} is a file, and not a tar"
    names = [f"{name}/" for name in storage.list_folders(nearest)] + storage.list_files(nearest)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    missing = "" if nearest == folder else f"there is no {folder}; "
    return f"{missing}{nearest} holds {shown or 'nothing'}"
