"""Find the files that make up weights from elsewhere, and name them by their contents.

Imports no torch, because a finished run is found without it.
"""

import errno
import hashlib
import json
from collections.abc import Iterable

from infra import storage
from infra.file_names import problem_of_name
from mae_core.checkpoint_manifest import CorruptCheckpointError

RUN_PREFIX = "run:"
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt")
CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
# Files that hold all weights of a folder; the first one that exists is used.
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")
JSON_FILES = (CONFIG_FILE, "preprocessor_config.json")
MAX_INDEX_BYTES = 1 << 20
READ_BYTES = 8 * 2**20


def weight_files(uri: str) -> dict[str, int] | None:
    """Return the size of each file that belongs to weights from elsewhere, by its name.

    Args:
        uri: A file, or a folder of Hugging Face or timm, which has a config.json.

    Returns:
        None where there are no such weights: a folder without them, or nothing at all.

    Raises:
        CorruptCheckpointError: A folder's index of its files is damaged, or a file is missing.
    """
    place = storage.absolute(uri)
    try:
        return {place.rpartition("/")[2]: storage.file_size(place)}
    except FileNotFoundError:
        there = storage.list_tree(place, deep=False)
    if CONFIG_FILE not in there:
        return None
    whole = next((name for name in WHOLE_FILES if name in there), None)
    if whole is not None:
        names: Iterable[str] = (whole,)
    elif INDEX_FILE in there:
        names = (INDEX_FILE, *_indexed(storage.join(place, INDEX_FILE), there[INDEX_FILE]))
    else:
        return None
    for name in names:
        if name not in there:
            raise CorruptCheckpointError(f"{place}/{name}: is missing, {INDEX_FILE} names it")
    return {name: there[name].num_bytes for name in (*JSON_FILES, *names) if name in there}


def _indexed(uri: str, facts: storage.FileFacts) -> list[str]:
    """List the files that a folder's index says its weights are spread over."""
    if facts.num_bytes > MAX_INDEX_BYTES:
        raise CorruptCheckpointError(f"{uri}: is larger than {MAX_INDEX_BYTES} bytes")
    try:
        names = sorted(set(json.loads(storage.read_bytes(uri))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{uri}: weight_map is missing or damaged") from error
    for name in names:
        problem = "is not text" if not isinstance(name, str) else problem_of_name(name)
        if problem is not None or "/" in name:
            raise CorruptCheckpointError(
                f"{uri}: weight_map: the file name {name!r} {problem or 'has a slash'}"
            )
    return names


def content_digest(uri: str, files: Iterable[str]) -> str:
    """Return the sha256 of the named files' contents; of one file, its own sha256."""
    place = storage.absolute(uri)
    digests = {}
    for name in files:
        whole = place if place.rpartition("/")[2] == name else storage.join(place, name)
        hasher = hashlib.sha256()
        with storage.storage_errors("read", whole), storage.open_stream(whole) as stream:
            while chunk := stream.read(READ_BYTES):
                hasher.update(chunk)
        digests[name] = hasher.hexdigest()
    if not digests:
        raise FileNotFoundError(errno.ENOENT, f"{place}: has no files")
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
