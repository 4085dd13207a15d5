"""Read weights of any origin into one form: a checkpoint's record, and tensors with our names.

This module imports torch; `pipelines.training.init_from` finds out without torch whether it is
needed.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from infra import storage, transfers
from infra.file_names import UnsafeNameError
from mae_core.checkpoint import read_weights
from mae_core.checkpoint_manifest import (
    CheckpointManifest,
    CheckpointRecord,
    CorruptCheckpointError,
    WeightsOrigin,
)
from mae_core.config import LossConfig, MaskingConfig
from mae_core.data.manifest import IMAGENET_STATS
from mae_core.interchange.channels import adapt_convolution, adapt_statistics
from mae_core.interchange.declared import Declared, read_declared
from mae_core.interchange.foreign import ForeignWeights, import_weights
from mae_core.interchange.weight_files import RefusedWeightsError, WeightsFile, read_weights_file
from pipelines.outcome import ConfigError
from pipelines.reading.weight_places import INDEX_FILE, JSON_FILES, content_digest
from pipelines.training.checkpoints import fetch_checkpoint

logger = logging.getLogger(__name__)

# Of a ViT, a ResNet and a ConvNeXt.
FIRST_CONVOLUTIONS = (
    "encoder.patch_embed.proj.weight",
    "encoder.net.conv1.weight",
    "encoder.net.stem.0.weight",
)


class Wanted(NamedTuple):
    """What a run asks of the weights; None means unchanged."""

    in_chans: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Weights(NamedTuple):
    record: CheckpointRecord
    state: dict[str, Tensor]
    manifest: CheckpointManifest | None  # None for weights from elsewhere


def read_checkpoint(uri: str, workspace: Path) -> Weights:
    """Read the weights of one of our checkpoints, which must be complete.

    Raises:
        CorruptCheckpointError: It is not.
    """
    found = fetch_checkpoint(storage.absolute(uri), workspace / "checkpoint")
    state, manifest = read_weights(found.folder)
    fields = {name: getattr(manifest, name) for name in CheckpointRecord.model_fields}
    return Weights(CheckpointRecord(**fields), state, manifest)


def read_foreign(
    uri: str, files: Mapping[str, int], workspace: Path, digest: str | None = None
) -> Weights:
    """Read weights from elsewhere.

    Args:
        uri: As the user gave it.
        files: The files that belong to them, see `weight_files`.
        workspace: An empty local folder, for files of a store.
        digest: Their sha256 where it is known.

    Raises:
        ConfigError: They are of another kind of model.
        CorruptCheckpointError: They are damaged, or hold code.
    """
    place = storage.absolute(uri)
    is_folder = list(files) != [place.rpartition("/")[2]]
    folder = _local(place, files, workspace, is_folder=is_folder)
    try:
        declared = read_declared(folder, uri) if is_folder else Declared()
        about = (*JSON_FILES, INDEX_FILE) if is_folder else ()
        names = [name for name in files if name not in about]
        read = [
            read_weights_file(folder / name, f"{uri}/{name}" if is_folder else uri)
            for name in names
        ]
        found = import_weights(_joined(read), declared, uri)
        return _described(uri, found, digest or content_digest(place, files))
    except RefusedWeightsError as error:
        raise ConfigError(str(error)) from error


def _local(place: str, files: Mapping[str, int], workspace: Path, *, is_folder: bool) -> Path:
    """Return a local folder that holds the files."""
    source = place if is_folder else place.rpartition("/")[0]
    if not storage.is_remote(place):
        return Path(source or "/")
    try:
        transfers.download_files(source, files, workspace)
    except (FileNotFoundError, UnsafeNameError, transfers.WrongSizeError) as error:
        raise CorruptCheckpointError(f"{place}: {error}") from error
    return workspace


def _joined(files: list[WeightsFile]) -> WeightsFile:
    tensors = {key: tensor for file in files for key, tensor in file.tensors.items()}
    return files[0]._replace(tensors=tensors)


def _described(uri: str, found: ForeignWeights, digest: str) -> Weights:
    notes = list(found.notes)
    mean, std = found.mean, found.std
    if mean is None or std is None:
        mean, std = IMAGENET_STATS.mean, IMAGENET_STATS.std
        notes.append(
            "The file does not say which mean and deviation its images were normalized with: "
            "ImageNet's are used (channel_mean and channel_std set others)."
        )
    in_chans = found.model.in_chans
    if min(std) <= 0 or len(mean) != len(std):
        raise RefusedWeightsError(f"{uri}: mean {mean} and deviation {std} can't be used")
    origin = WeightsOrigin(
        file=storage.absolute(uri).rpartition("/")[2],
        format=found.format,
        sha256=digest,
        norm_pix=found.norm_pix,
        notes=tuple(notes),
    )
    record = CheckpointRecord(
        step=0,
        samples_seen=0,
        epoch=0,
        total_steps=1,
        seed=0,
        data_digest="",
        channel_mean=adapt_statistics(mean, in_chans),
        channel_std=adapt_statistics(std, in_chans),
        model=found.model,
        masking=MaskingConfig(),
        # The authors add 1e-6 to the variance.
        loss=LossConfig(norm_pix=found.norm_pix is not False, norm_pix_floor=1e-6),
        origin=origin,
    )
    return Weights(record, found.state, None)


def adapted(weights: Weights, wanted: Wanted, uri: str, digest: str) -> Weights:
    """Adapt weights to another number of channels, and set the statistics that the run asks for.

    Raises:
        ConfigError: The channels can't be fitted.
    """
    record, state, _ = weights
    own, in_chans = record.model.in_chans, wanted.in_chans or record.model.in_chans
    notes: list[str] = []
    state = dict(state)
    if in_chans != own:
        try:
            first = next(key for key in FIRST_CONVOLUTIONS if key in state)
            state[first] = adapt_convolution(state[first], in_chans)
        except ValueError as error:
            raise ConfigError(f"init_from={uri}: in_chans={in_chans}: {error}") from error
        how = "summed" if in_chans == 1 else f"repeated and scaled by {own}/{in_chans}"
        notes.append(f"The first convolution takes {own} channels: it is {how} for {in_chans}.")
        if any(name.startswith("decoder.") for name in state):
            state = {name: x for name, x in state.items() if not name.startswith("decoder.")}
            notes.append("The decoder predicts other channels: it is left out.")
    mean = wanted.mean or adapt_statistics(record.channel_mean, in_chans)
    std = wanted.std or adapt_statistics(record.channel_std, in_chans)
    if len(mean) != in_chans:
        raise ConfigError(
            f"channel_mean has {len(mean)} values; init_from={uri} takes {in_chans} channels"
        )
    if wanted.mean is not None:
        notes.append("Mean and deviation are those that the config gives.")
    before = record.origin
    origin = WeightsOrigin(
        file=before.file if before else uri.rstrip("/").rpartition("/")[2],
        format=before.format if before else "checkpoint of ours",
        sha256=before.sha256 if before else digest,
        norm_pix=before.norm_pix if before else record.loss.norm_pix,
        notes=(*(before.notes if before else ()), *notes),
    )
    model = record.model.model_copy(update={"in_chans": in_chans})
    changes = {"model": model, "channel_mean": mean, "channel_std": std, "origin": origin}
    return Weights(record.model_copy(update=changes), state, weights.manifest)
