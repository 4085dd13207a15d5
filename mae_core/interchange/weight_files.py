"""Read the tensors of a weights file that anybody may have written, without running its code.

Reads safetensors, torch's zip files and torch's files from before version 1.6. A pickle may build
tensors, containers and an `argparse.Namespace`, and nothing else: `torch.load(weights_only=True)`.
No tensor may be larger than the bytes that the file holds for it, so a small file cannot claim a
lot of memory.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from mae_core.checkpoint_manifest import CorruptCheckpointError

# Where the weights lie in files that hold more than weights, the first that is there.
WRAPPERS = ("model", "state_dict", "model_state", "module", "teacher", "net")
MAX_TENSORS = 20_000
_ZIP_START = b"PK\x03\x04"
_LEGACY_START = b"\x80"  # a pickle's first byte; torch's old files are pickles


class WeightsFile(NamedTuple):
    tensors: dict[str, Tensor]
    container: str  # safetensors or torch
    wrapper: str | None  # key below which the weights were found


class RefusedWeightsError(ValueError):
    """These weights are readable, but cannot be used here; the message says why."""


def read_weights_file(path: Path, name: str) -> WeightsFile:
    """Read the named tensors of a file.

    Args:
        path: A local file.
        name: What the user calls the file, for messages.

    Raises:
        CorruptCheckpointError: The file is damaged, is no weights file, or holds code.
        RefusedWeightsError: It holds no named tensors, or tensors of an unusual kind.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise CorruptCheckpointError(f"{name}: {error.strerror}") from error
    if not start:
        raise CorruptCheckpointError(f"{name}: is empty")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= num_bytes - 8:
        return WeightsFile(_read_safetensors(path, name), "safetensors", None)
    if start.startswith(_ZIP_START):
        _check_zip(path, name, num_bytes)
        loaded = _load_pickled(path, name, is_zip=True)
    elif start.startswith(_LEGACY_START):
        loaded = _load_pickled(path, name, is_zip=False)
    else:
        raise CorruptCheckpointError(
            f"{name}: is neither a safetensors file nor one of torch, or it is cut off"
        )
    return _unwrapped(loaded, name, num_bytes)


def _read_safetensors(path: Path, name: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            _check_count(len(file.keys()), name)
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CorruptCheckpointError(f"{name}: {error}") from error
    for key, tensor in tensors.items():
        _check_kind(tensor, f"{name}: {key}")
    return tensors


def _check_zip(path: Path, name: str, num_bytes: int) -> None:
    """Check that the entries are stored as they are, and claim no more than the file holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_entries(entries, name, num_bytes)
            damaged = archive.testzip()  # torch itself compares no checksums
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, RefusedWeightsError):
            raise
        raise CorruptCheckpointError(f"{name}: damaged or cut off: {error}") from error
    if damaged is not None:
        raise CorruptCheckpointError(f"{name}: {damaged}: does not match its checksum")


def _check_entries(entries: list[zipfile.ZipInfo], name: str, num_bytes: int) -> None:
    if any("/code/" in entry.filename for entry in entries):
        raise RefusedWeightsError(f"{name}: is a TorchScript program, not a file of weights")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CorruptCheckpointError(
                f"{name}: {entry.filename} is compressed, which torch never does"
            )
    claimed = sum(entry.file_size for entry in entries)
    if claimed > num_bytes:
        raise CorruptCheckpointError(
            f"{name}: its entries claim {claimed} bytes, the file has {num_bytes}"
        )


def _load_pickled(path: Path, name: str, *, is_zip: bool) -> Any:
    try:
        # Training scripts store their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CorruptCheckpointError(f"{name}: {_why_refused(str(error))}") from error
    except MemoryError as error:
        raise CorruptCheckpointError(f"{name}: claims more memory than there is") from error
    except Exception as error:  # torch raises whatever a damaged pickle leads to
        first = (str(error).splitlines() or [""])[0]
        why = first or type(error).__name__
        raise CorruptCheckpointError(f"{name}: damaged, or no weights file: {why}") from error


def _why_refused(message: str) -> str:
    """Say why torch did not load a pickle, without its advice to load it with its code."""
    found = re.search(
        r"GLOBAL ([\w.]+)|(?:global|class|type|function)[: ]+`?([\w.]+\.\w+)", message
    )
    if found is None:
        return "is no weights file, or holds something else than weights; it was not loaded"
    code = found[1] or found[2]
    return (
        f"holds Python code or objects ({code}), which could run when they are loaded; it was not "
        "loaded. Save the weights alone: torch.save(model.state_dict(), FILE)"
    )


def _unwrapped(loaded: Any, name: str, num_bytes: int) -> WeightsFile:
    """Find the named tensors in what a file held."""
    if isinstance(loaded, Tensor):
        raise RefusedWeightsError(f"{name}: is a single tensor, not the weights of a model")
    if not isinstance(loaded, Mapping):
        raise RefusedWeightsError(f"{name}: holds a {type(loaded).__name__}, not named weights")
    wrapper = next((key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)), None)
    inner = loaded if wrapper is None else loaded[wrapper]
    _check_count(len(inner), name)
    tensors = {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        keys = ", ".join(str(key)[:40] for key in list(loaded)[:8])
        raise RefusedWeightsError(f"{name}: holds no named tensors; its keys are: {keys}")
    storages: dict[int, int] = {}
    for key, tensor in tensors.items():
        _check_kind(tensor, f"{name}: {key}")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise CorruptCheckpointError(
                f"{name}: {key}: claims {tuple(tensor.shape)}, more than the file holds for it"
            )
        storages[storage.data_ptr()] = storage.nbytes()
    if sum(storages.values()) > num_bytes:
        raise CorruptCheckpointError(f"{name}: its tensors claim more bytes than the file has")
    return WeightsFile(tensors, "torch", wrapper)


def _check_count(count: int, name: str) -> None:
    if count > MAX_TENSORS:
        raise RefusedWeightsError(f"{name}: has {count} entries, more than {MAX_TENSORS}")


def _check_kind(tensor: Tensor, where: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = tensor.device if tensor.device.type != "cpu" else tensor.layout
        raise RefusedWeightsError(f"{where}: is a tensor of kind {kind}, not a plain one")
    if tensor.is_complex():
        raise RefusedWeightsError(f"{where}: has complex numbers")
