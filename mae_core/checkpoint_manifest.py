"""What a checkpoint is: its manifest, and whether its files are what the manifest says.

Read without torch, so that a run that is done is found at once; `mae_core.checkpoint` saves and
loads the weights, and says what the files hold.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from mae_core.config import LossConfig, MaskingConfig, ModelConfig, StrictConfig

MANIFEST_FILE = "manifest.json"
WEIGHTS_FILE = "model.safetensors"
TRAINING_STATE_FILE = "training_state.safetensors"
SELF_DIGEST = "manifest_sha256"
AUTHORS_FORMAT = "MAE authors' file"  # a `WeightsOrigin.format`
AUTHORS_FLOOR = 1e-6  # of a patch's variance, in the code of He et al. 2021


class CorruptCheckpointError(RuntimeError):
    """A checkpoint file is missing, truncated, changed or unreadable; the message names it."""


class FileDigest(StrictConfig):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class UnreportedLoss(StrictConfig):
    """Sums over the steps since the loss was last reported, over all workers."""

    loss: float = 0.0
    """Sum of the steps' losses."""
    num_samples: float = Field(default=0.0, ge=0)
    """Images that were read."""
    num_steps: int = Field(default=0, ge=0)


class WeightsOrigin(StrictConfig):
    """Where the weights of a checkpoint were taken from, if no training of ours made them."""

    file: str
    """Name of the file or folder, without its path."""
    format: str
    """In words: "MAE authors' file", "timm", "Hugging Face", "checkpoint of ours"."""
    sha256: str
    """Of the contents."""
    norm_pix: bool | None
    """Whether the decoder's target was normalized per patch; None if the file does not say."""
    notes: tuple[str, ...]
    """What was left out, changed or assumed, in sentences."""


class CheckpointRecord(StrictConfig):
    """The facts that the run provides; the rest of the manifest is computed from the files."""

    step: int = Field(ge=0)
    """Number of optimizer steps completed."""
    samples_seen: int = Field(ge=0)
    """Position in the run's sequence of samples."""
    epoch: float = Field(ge=0)
    """Number of passes over the data completed."""
    total_steps: int = Field(gt=0)
    """Number of optimizer steps in the whole run, which the learning rate schedule spans."""
    seed: int
    """Seed of the run's sample order, augmentation and masking noise."""
    data_digest: str
    """Identifies the training data: continuing on other data makes it a different run."""
    channel_mean: tuple[float, ...]
    """Subtracted from each channel, in units of 0..1 pixels."""
    channel_std: tuple[float, ...]
    """Divides each channel, in units of 0..1 pixels."""
    model: ModelConfig
    masking: MaskingConfig
    loss: LossConfig
    unreported: UnreportedLoss = UnreportedLoss()
    """With it, the report after a resumption is what it would have been without a stop."""
    stage: str = "pretrain"
    """The task that the weights were trained for: pretrain, classify, detect or segment."""
    classes: tuple[str, ...] = ()
    """Names of the classes that a fine-tuned model predicts."""
    category_ids: tuple[int, ...] = ()
    """The category_id of each class, where the labels have one."""
    origin: WeightsOrigin | None = None
    """Where the weights come from, if they were taken over from elsewhere and not trained here."""

    @model_validator(mode="after")
    def _statistics_fit_the_channels(self) -> Self:
        for name in ("channel_mean", "channel_std"):
            if len(getattr(self, name)) != self.model.in_chans:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values for "
                    f"in_chans={self.model.in_chans}"
                )
        return self


class CheckpointManifest(CheckpointRecord):
    """A record and the files it belongs to."""

    format_version: Literal[1]
    decoder_present: bool
    """Whether the weights include a decoder, which further pretraining and pictures need."""
    versions: dict[str, str]
    """Versions of torch, timm, Python and this package at the time of saving."""
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], FileDigest]
    """Every file except the manifest."""

    @model_validator(mode="before")
    @classmethod
    def _an_older_run_had_the_authors_floor(cls, raw: object) -> object:
        """Complete a manifest that was written before `loss.norm_pix_floor` existed."""
        if isinstance(raw, dict) and isinstance(raw.get("loss"), dict):
            return {**raw, "loss": {"norm_pix_floor": AUTHORS_FLOOR, **raw["loss"]}}
        return raw

    @model_validator(mode="after")
    def _weights_are_listed(self) -> Self:
        if WEIGHTS_FILE not in self.files:
            raise ValueError(f"files does not list {WEIGHTS_FILE}")
        return self


def digest_of(path: Path) -> FileDigest:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(bytes=path.stat().st_size, sha256=sha256)


def fields_sha256(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_json_object(path: Path, name: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: Of the file.
        name: What messages call it.

    Raises:
        CorruptCheckpointError: The file can't be read, or holds something else.
    """
    try:
        fields = from_json(path.read_bytes())
    except OSError as error:
        raise CorruptCheckpointError(f"{name}: {error.strerror}") from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{name}: not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise CorruptCheckpointError(f"{name}: not a JSON object")
    return fields


def read_manifest(folder: Path) -> CheckpointManifest:
    """Read the manifest without checking the files that it lists.

    Raises:
        CorruptCheckpointError: The manifest is missing, unreadable, changed, or of another format
            version.
    """
    path = folder / MANIFEST_FILE
    fields = read_json_object(path, str(path))
    if fields.get("format_version") != 1:
        version = fields.get("format_version")
        raise CorruptCheckpointError(f"{path}: format_version={version!r}, this code reads 1")
    if fields.pop(SELF_DIGEST, None) != fields_sha256(fields):
        raise CorruptCheckpointError(f"{path}: changed since it was written ({SELF_DIGEST})")
    try:
        return CheckpointManifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CorruptCheckpointError(f"{path}: {where}: {first['msg']}") from error


def verify_checkpoint(folder: Path) -> CheckpointManifest:
    """Compare every file with the manifest.

    Raises:
        CorruptCheckpointError: A file is missing, truncated or changed; names the first one.
    """
    manifest = read_manifest(folder)
    for file_name in manifest.files:
        verify_file(folder, file_name, manifest)
    return manifest


def verify_file(folder: Path, file_name: str, manifest: CheckpointManifest) -> None:
    path, expected = folder / file_name, manifest.files[file_name]
    try:
        found_bytes = path.stat().st_size
        if found_bytes != expected.bytes:
            raise CorruptCheckpointError(
                f"{path}: has {found_bytes} bytes, the manifest says {expected.bytes}"
            )
        found = digest_of(path)
    except OSError as error:
        raise CorruptCheckpointError(f"{path}: {error.strerror}") from error
    if found.sha256 != expected.sha256:
        raise CorruptCheckpointError(
            f"{path}: sha256 is {found.sha256}, the manifest says {expected.sha256}"
        )
