"""Describe weights in words, for `mae checkpoint show`."""

from pathlib import Path

import torch

from infra import storage
from infra.scratch import scratch_folder
from mae_core.checkpoint_manifest import WEIGHTS_FILE, CorruptCheckpointError
from mae_core.config import CONV_ENCODERS, ModelConfig
from pipelines.training.init_from import Place, run_of
from pipelines.training.weights import Weights, read_checkpoint, read_foreign


def read_place(place: Place, workspace: Path) -> Weights:
    """Read weights wherever they come from; a value that is not finite raises an error.

    Raises:
        ConfigError: They are of another kind of model.
        CorruptCheckpointError: They are damaged, hold code, or have a NaN.
    """
    if place.files is not None:
        return read_foreign(place.uri, place.files, workspace)
    weights = read_checkpoint(place.uri, workspace)
    for key, tensor in weights.state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CorruptCheckpointError(f"{place.uri}: {key}: has a NaN or infinite value")
    return weights


def describe_place(place: Place) -> dict[str, str]:
    """Describe the weights at a place: a value for each property, by the property's name."""
    with scratch_folder() as workspace:
        return describe_weights(place, read_place(place, workspace))


def describe_weights(place: Place, weights: Weights) -> dict[str, str]:
    record, origin, model = weights.record, weights.record.origin, weights.record.model
    fields = {
        "weights": storage.absolute(place.uri),
        "format": origin.format if origin and not weights.manifest else "checkpoint of ours",
        "encoder": _encoder(model),
        "patch size": str(model.patch_size),
        "image size": f"{model.img_size[0]}x{model.img_size[1]}, {model.in_chans} channels",
        "positions": _positions(weights),
        "decoder": _decoder(weights),
        "target": _target(weights),
        "parameters": _count(weights),
        "channel mean": " ".join(f"{x:.4g}" for x in record.channel_mean),
        "channel std": " ".join(f"{x:.4g}" for x in record.channel_std),
    }
    return {**fields, **_history(place, weights)}


def _encoder(model: ModelConfig) -> str:
    if model.is_convolutional:
        widths = ", ".join(map(str, CONV_ENCODERS[model.encoder]))
        return f"{model.encoder}: convolutional, stages of {widths} channels"
    shape = model.encoder_shape
    tokens = f", {model.class_tokens} class tokens" if model.class_tokens > 1 else ""
    parts = f"{shape.embed_dim} wide, {shape.depth} deep, {shape.num_heads} heads"
    return f"{model.encoder}: {parts}{tokens}"


def _positions(weights: Weights) -> str:
    if weights.record.model.is_convolutional:
        return "none"
    rows, columns = weights.record.model.grid_size
    kind = "trained" if "encoder.positions" in weights.state else "fixed"
    return f"{kind}, for {rows}x{columns} patches"


def _has_decoder(weights: Weights) -> bool:
    return any(name.startswith("decoder.") for name in weights.state)


def _decoder(weights: Weights) -> str:
    decoder = weights.record.model.decoder
    if not _has_decoder(weights):
        return "none"
    if decoder.kind == "deconvolution":
        return f"deconvolution, {decoder.dim} wide, {decoder.depth} convolutions at each scale"
    shape = f"{decoder.dim} wide, {decoder.depth} deep, {decoder.num_heads} heads"
    return f"cross-attention, {shape}" if decoder.kind == "cross_attention" else shape


def _target(weights: Weights) -> str:
    record = weights.record
    norm_pix = record.loss.norm_pix if record.origin is None else record.origin.norm_pix
    if norm_pix is None:
        return "the file does not say"
    return "norm_pix: each patch normalized" if norm_pix else "raw pixels"


def _count(weights: Weights) -> str:
    counts = {"encoder": 0, "decoder": 0, "head": 0}
    for name, tensor in weights.state.items():
        half = name.partition(".")[0]
        if not name.endswith(".positions") and tensor.is_floating_point():
            counts[half if half in counts else "head"] += tensor.numel()
    parts = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    return f"{sum(counts.values()):,} ({parts})"


def _history(place: Place, weights: Weights) -> dict[str, str]:
    """Say how the weights were made, as far as that is known."""
    record, manifest = weights.record, weights.manifest
    fields: dict[str, str] = {}
    if record.origin is not None:
        if manifest is not None:
            fields["taken over from"] = f"{record.origin.file} ({record.origin.format})"
        fields["sha256"] = record.origin.sha256
        for number, note in enumerate(record.origin.notes, start=1):
            fields[f"note {number}"] = note
        return fields
    assert manifest is not None
    fields["sha256"] = manifest.files[WEIGHTS_FILE].sha256
    fields["trained for"] = f"{record.stage}, step {record.step} of {record.total_steps}"
    fields["seed"] = str(record.seed)
    fields["data digest"] = record.data_digest
    if record.classes:
        fields["classes"] = f"{len(record.classes)}: {', '.join(record.classes[:8])}"
    run = run_of(place.uri)
    if run is not None:
        fields["run"] = run.uri
        fields["MLflow run"] = run.record.run_id or "none"
        fields["started from"] = str(run.record.config.get("init_from") or "fresh weights")
    return fields
