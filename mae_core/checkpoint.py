"""Save a training run's checkpoint to a local folder, and detect damage when reading it.

    model.safetensors            every weight and persistent buffer, named as in the module; fp32
    training_state.safetensors   the optimizer's tensors, `exp_avg/<parameter>`, `step/<parameter>`
    manifest.json                the run's facts, and the size and sha256 of the other files

The manifest is written last and carries a sha256 of itself. An interrupted save leaves either no
manifest or one that does not match its files; reading both raises `CorruptCheckpointError`.
Loading never unpickles anything. Saving the same state twice gives the same bytes. Learning rate
and weight decay are not stored because they follow from the config and the step.

Safetensors: https://github.com/huggingface/safetensors.
"""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mae_core.checkpoint_manifest import (
    MANIFEST_FILE,
    SELF_DIGEST,
    TRAINING_STATE_FILE,
    WEIGHTS_FILE,
    CheckpointManifest,
    CheckpointRecord,
    CorruptCheckpointError,
    digest_of,
    fields_sha256,
    read_manifest,
    verify_file,
)
from mae_core.model.decoder import PixelDecoder
from mae_core.model.encoder import MaskedEncoder
from mae_core.model.family import Encoder, build_encoder
from mae_core.model.mae import MaskedAutoencoder, build_mae

_NO_STATE = "none"


def save_checkpoint(
    folder: Path,
    record: CheckpointRecord,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
) -> CheckpointManifest:
    """Write the checkpoint into `folder`, replacing an older one if it is there.

    Args:
        folder: Created if it does not exist.
        record: The facts that the run provides.
        model: The bare module, not its DDP or compiled wrapper.
        optimizer: None leaves out the training state; such a checkpoint cannot be resumed.
    """
    weights = {name: _stored_weight(tensor) for name, tensor in model.state_dict().items()}
    for name in weights:
        if name.startswith(("module.", "_orig_mod.")):
            raise ValueError(f"{name}: save the bare module, not its DDP or compiled wrapper")
    contents = {WEIGHTS_FILE: weights}
    if optimizer is not None:
        contents[TRAINING_STATE_FILE] = _flat_state(model, optimizer)
    return _save(folder, record, contents)


def save_weights(
    folder: Path, record: CheckpointRecord, weights: Mapping[str, Tensor]
) -> CheckpointManifest:
    """Write a checkpoint of tensors that are named as a model's, without training state."""
    return _save(folder, record, {WEIGHTS_FILE: {n: _stored_weight(x) for n, x in weights.items()}})


def _save(
    folder: Path, record: CheckpointRecord, contents: dict[str, dict[str, Tensor]]
) -> CheckpointManifest:
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest is deleted first: from here to the end, an interrupted save leaves none.
    for stale in (MANIFEST_FILE, WEIGHTS_FILE, TRAINING_STATE_FILE):
        (folder / stale).unlink(missing_ok=True)
    for file_name, tensors in contents.items():
        _save_tensors(tensors, folder / file_name)
    manifest = CheckpointManifest(
        **dict(record),
        format_version=1,
        decoder_present=any(name.startswith("decoder.") for name in contents[WEIGHTS_FILE]),
        versions=_versions(),
        files={file_name: digest_of(folder / file_name) for file_name in contents},
    )
    fields = manifest.model_dump(mode="json")
    sealed = {**fields, SELF_DIGEST: fields_sha256(fields)}
    (folder / MANIFEST_FILE).write_text(json.dumps(sealed, indent=2) + "\n")
    return manifest


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        # One key only: safetensors keeps metadata in a hash map, whose order is not fixed.
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The system's error number is only in the message text, such as "(os error 28)".
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error


def _stored_weight(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype).contiguous()


def _flat_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, parameter in _optimized(model, optimizer):
        # A parameter that never had a gradient has no state, and that has to be saved too.
        state = optimizer.state.get(parameter) or {_NO_STATE: torch.empty(0)}
        for kind, value in state.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{kind} of {name} is {value!r}: only tensors can be saved")
            flat[f"{kind}/{name}"] = value.detach().cpu().contiguous()
    return flat


def _optimized(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> list[tuple[str, nn.Parameter]]:
    """Return the optimizer's parameters with their names, in the optimizer's order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p not in names for p in parameters):
        raise ValueError("the optimizer has a parameter that is not the model's")
    return [(names[p], p) for p in parameters]


def _versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "timm": _installed("timm"),
        "python": platform.python_version(),
        "mae-pipeline": _installed("mae-pipeline"),
    }


def _installed(package: str) -> str:
    # With `ray job submit --working-dir .` this package runs from its sources, not installed.
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def load_weights(
    folder: Path, model: nn.Module, *, strict: bool = True, is_verified: bool = False
) -> None:
    """Check the weights file against the manifest and load the weights into `model`.

    Args:
        folder: The checkpoint.
        model: The bare module.
        strict: False allows tensors that only one side has; the shapes of the others must match.
        is_verified: Whether `verify_checkpoint` has checked this folder already.

    Raises:
        CorruptCheckpointError: The weights or the manifest are damaged.
        ValueError: A tensor does not fit the model; names the first one.
    """
    manifest = read_manifest(folder)
    weights = _load_tensors(folder, WEIGHTS_FILE, manifest, is_verified)
    _load_named(model, weights, manifest.model.grid_size, strict=strict)


def load_starting_weights(folder: Path, mae: MaskedAutoencoder, *, is_verified: bool) -> None:
    """Load the encoder and, where the checkpoint has one, the decoder; leave out any head.

    Raises:
        CorruptCheckpointError: The weights or the manifest are damaged.
        ValueError: A tensor does not fit the model; names the first one.
    """
    manifest = read_manifest(folder)
    weights = _load_tensors(folder, WEIGHTS_FILE, manifest, is_verified)
    _load_halves(mae, weights, manifest.model.grid_size)


def _load_halves(
    mae: MaskedAutoencoder, weights: dict[str, Tensor], grid_size: tuple[int, int]
) -> None:
    for name, module in (("encoder", mae.encoder), ("decoder", mae.decoder)):
        own = _below(weights, f"{name}.")
        if own or name == "encoder":
            _load_named(module, own, grid_size, strict=True)


def build_from_weights(
    weights: Mapping[str, Tensor], record: CheckpointRecord
) -> MaskedAutoencoder:
    """Build the model that a checkpoint's record describes and load its tensors.

    Without a decoder among the tensors, the model's is a fresh one; a head is left out.

    Raises:
        ValueError: A tensor does not fit; names the first one.
    """
    mae = build_mae(record.model, record.masking, record.loss)
    _load_halves(mae, dict(weights), record.model.grid_size)
    return mae.eval()


def read_weights(folder: Path) -> tuple[dict[str, Tensor], CheckpointManifest]:
    """Check the weights file against the manifest; return its tensors and the manifest.

    Raises:
        CorruptCheckpointError: The weights or the manifest are damaged.
    """
    manifest = read_manifest(folder)
    return _load_tensors(folder, WEIGHTS_FILE, manifest, False), manifest


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix, without it."""
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def load_encoder(
    folder: Path, *, drop_path_rate: float = 0.0, is_verified: bool = False
) -> tuple[Encoder, CheckpointManifest]:
    """Build the encoder that the manifest describes and load its weights.

    Also accepts a fine-tuned model, whose head is left out. `is_verified` says whether
    `verify_checkpoint` has checked this folder already.

    Raises:
        CorruptCheckpointError: The weights or the manifest are damaged.
        ValueError: A tensor does not fit the encoder; names the first one.
    """
    manifest = read_manifest(folder)
    weights = _load_tensors(folder, WEIGHTS_FILE, manifest, is_verified)
    encoder = build_encoder(manifest.model, drop_path_rate=drop_path_rate)
    own = _below(weights, "encoder.")
    _load_named(encoder, own, manifest.model.grid_size, strict=True)
    return encoder, manifest


def _load_tensors(
    folder: Path, file_name: str, manifest: CheckpointManifest, is_verified: bool
) -> dict[str, Tensor]:
    if not is_verified:
        verify_file(folder, file_name, manifest)
    try:
        return load_file(folder / file_name)
    except SafetensorError as error:
        raise CorruptCheckpointError(f"{folder / file_name}: {error}") from error


def _load_named(
    model: nn.Module, weights: dict[str, Tensor], grid_size: tuple[int, int], *, strict: bool
) -> None:
    """Load tensors by name; `grid_size` is that of the checkpoint."""
    weights = _use_trained_positions(model, weights, grid_size)
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name in weights:
            _check_shape(name, weights[name], tensor)
        elif strict:
            raise ValueError(f"{name} is in the model but not in the checkpoint")
    for name in weights:
        if strict and name not in expected:
            raise ValueError(f"{name} is in the checkpoint but not in the model")
    if weights.keys().isdisjoint(expected):
        raise ValueError("the checkpoint and the model have no tensor in common")
    model.load_state_dict(weights, strict=strict)


def _use_trained_positions(
    model: nn.Module, weights: dict[str, Tensor], grid_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Give encoder and decoder their trained positions; return the weights at their grid."""
    fitted = dict(weights)
    for prefix, module in model.named_modules():
        name = f"{prefix}.positions".lstrip(".")
        if isinstance(module, MaskedEncoder | PixelDecoder) and name in weights:
            module.use_positions(weights[name], grid_size)
            fitted[name] = module.positions
    return fitted


def _check_shape(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise ValueError(
            f"{name}: {tuple(found.shape)} in the checkpoint, {tuple(expected.shape)} in the model"
        )


def load_training_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    is_verified: bool = False,
) -> None:
    """Give each parameter the optimizer state saved under its name.

    The order of the parameters and their groups may differ from the order when it was saved. Call
    this after `load_weights`. `is_verified` says whether `verify_checkpoint` has checked this
    folder already.

    Raises:
        CorruptCheckpointError: The training state or the manifest is damaged.
        ValueError: There is no training state, or a tensor does not fit; names the first one.
    """
    manifest = read_manifest(folder)
    if TRAINING_STATE_FILE not in manifest.files:
        raise ValueError(f"{folder} was saved without an optimizer and cannot be resumed")
    saved: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _load_tensors(folder, TRAINING_STATE_FILE, manifest, is_verified).items():
        kind, name = key.split("/", maxsplit=1)
        saved.setdefault(name, {})[kind] = tensor
    optimized = _optimized(model, optimizer)
    _check_state(saved, dict(optimized))

    # Going through torch's own format puts each tensor on its parameter's device; it numbers the
    # parameters in the optimizer's order.
    groups = optimizer.state_dict()["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    state = {
        number: saved[name]
        for number, (name, _) in zip(numbers, optimized, strict=True)
        if _NO_STATE not in saved[name]
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_state(saved: dict[str, dict[str, Tensor]], parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if name not in saved:
            raise ValueError(f"{name} is in the optimizer but not in the training state")
        for kind, tensor in saved[name].items():
            if kind not in ("step", _NO_STATE):
                _check_shape(f"{kind}/{name}", tensor, parameter)
    for name in saved:
        if name not in parameters:
            raise ValueError(f"{name} is in the training state but not in the optimizer")
