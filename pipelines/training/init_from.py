"""Find the weights that `init_from` refers to.

    a checkpoint of ours                  taken as it is
    a run's folder                        its newest checkpoint
    run:latest, run:NAME                  the newest finished pretraining run under storage.root
    weights from elsewhere                taken over into a checkpoint, ROOT/imported/DIGEST

The digest names contents and what the run asks of them, so a run's identity follows the weights and
not their place. Taking over is done once; this module then imports no torch.
"""

import hashlib
import json
import logging
import re
from typing import Any, NamedTuple, TypeVar

from infra import storage, transfers
from infra.own_files import DamagedFileError
from infra.scratch import scratch_folder
from mae_core.checkpoint_manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    CheckpointManifest,
    CheckpointRecord,
)
from mae_core.config import StrictConfig
from pipelines.config.downstream import DownstreamConfig
from pipelines.config.embed import EmbedConfig
from pipelines.config.pretrain import PretrainConfig
from pipelines.config.roles import identity_digest
from pipelines.outcome import ConfigError
from pipelines.reading.weight_places import RUN_PREFIX, content_digest, weight_files
from pipelines.training.checkpoints import (
    MAX_NAMED,
    at_newest_checkpoint,
    checkpoint_uri,
    fetch_manifest,
    find_checkpoint,
    is_whole,
    newest_step,
)
from pipelines.training.run_folder import RunFolder, RunRecord

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=PretrainConfig | DownstreamConfig | EmbedConfig)

ModelT = TypeVar("ModelT", bound=StrictConfig)
# What a run asks of the weights: channels, mean and deviation; None: those of the weights.
Asked = tuple[int | None, tuple[float, ...] | None, tuple[float, ...] | None]

LATEST = "latest"
IMPORTED = "imported"
# Part of the digest; increase it when the same weights would be imported differently.
VERSION = 1


class Place(NamedTuple):
    """Where weights lie."""

    uri: str
    files: dict[str, int] | None  # of weights from elsewhere; None for a checkpoint of ours


def with_weights(config: ConfigT) -> ConfigT:
    """Return the config with `init_from` replaced by the checkpoint that it refers to.

    Raises:
        ConfigError: There are no weights there, or of another kind of model.
        CorruptCheckpointError: They are damaged, or hold code.
    """
    given = config.init_from
    if given is None:
        return config
    place = locate(given, config.storage.root, config)
    wanted = _wanted(config)
    if place.files is None:
        manifest = fetch_manifest(place.uri)
        if _fits(manifest, wanted):
            _tell(given, place.uri, manifest)
            return _starting_from(config, place.uri)
        digest = manifest.files[WEIGHTS_FILE].sha256
    else:
        digest = content_digest(place.uri, place.files)
    uri = _imported_uri(config.storage.root, digest, wanted)
    if not is_whole(storage.absolute(uri)):
        _take_over(place, digest, wanted, uri)
    _tell(given, uri, fetch_manifest(uri))
    return _starting_from(config, uri)


def _starting_from(config: ModelT, uri: str) -> ModelT:
    return config.model_copy(update={"init_from": uri})


def locate(given: str, root: str, config: StrictConfig | None = None) -> Place:
    """Find the weights that a user names.

    Args:
        given: As in `init_from`.
        root: storage.root, where runs lie.
        config: The config of the run that asks, which is no starting point for itself.

    Raises:
        ConfigError: There are none.
    """
    if given.startswith(RUN_PREFIX):
        return Place(_finished_run(given, root, config), None)
    try:
        place = storage.absolute(given)
    except ValueError as error:
        raise ConfigError(f"init_from: {error}") from error
    folder, _, name = place.rpartition("/")
    if name == WEIGHTS_FILE and storage.exists(storage.join(folder, MANIFEST_FILE)):
        return Place(given.rstrip("/").rpartition("/")[0], None)
    if not storage.exists(storage.join(place, MANIFEST_FILE)):
        files = weight_files(given)
        if files is not None:
            return Place(given, files)
    return Place(at_newest_checkpoint(given), None)


def _wanted(config: PretrainConfig | DownstreamConfig | EmbedConfig) -> Asked:
    """Return the channels, mean and deviation that the run asks for; None: those of the weights."""
    if isinstance(config, PretrainConfig):  # a pretraining run takes the statistics from its data
        return config.model.in_chans, None, None
    return config.in_chans, config.channel_mean, config.channel_std


def _fits(manifest: CheckpointRecord, asked: Asked) -> bool:
    in_chans, mean, std = asked
    return (
        in_chans in (None, manifest.model.in_chans)
        and mean in (None, manifest.channel_mean)
        and std in (None, manifest.channel_std)
    )


def _imported_uri(root: str, digest: str, wanted: Asked) -> str:
    name = hashlib.sha256(json.dumps([VERSION, digest, *wanted]).encode()).hexdigest()[:16]
    return storage.join(root, IMPORTED, name)


def _take_over(place: Place, digest: str, wanted: Asked, uri: str) -> None:
    """Write weights from elsewhere as a checkpoint of ours."""
    # Imported here, because a finished run is found without torch.
    from mae_core.checkpoint import save_weights
    from pipelines.training import weights

    with scratch_folder() as folder:
        if place.files is None:
            found = weights.read_checkpoint(place.uri, folder)
        else:
            found = weights.read_foreign(place.uri, place.files, folder, digest)
        if not _fits(found.record, wanted):
            found = weights.adapted(found, weights.Wanted(*wanted), place.uri, digest)
        save_weights(folder / "taken", found.record, found.state)
        transfers.upload_folder(folder / "taken", storage.absolute(uri), last=MANIFEST_FILE)


def _tell(given: str, uri: str, manifest: CheckpointManifest) -> None:
    """Log what the run starts from."""
    origin, model = manifest.origin, manifest.model
    if origin is None:
        if given != uri:
            logger.info("init_from=%s: takes %s", given, uri)
        return
    logger.info(
        "init_from=%s: %s, %s in patches of %d, %d channels; taken over as %s",
        given,
        origin.format,
        model.encoder,
        model.patch_size,
        model.in_chans,
        uri,
    )
    for note in origin.notes:
        logger.info("init_from: %s", note)


def lineage_tags(uri: str, manifest: CheckpointManifest) -> dict[str, str]:
    """Return MLflow tags that say which weights a run started from."""
    tags = {
        "init_from": storage.absolute(uri),
        "pretrained.data_digest": manifest.data_digest,
        "pretrained.step": str(manifest.step),
        "pretrained.sha256": manifest.files[WEIGHTS_FILE].sha256,
    }
    if manifest.origin is not None:
        origin = manifest.origin
        tags |= {
            "pretrained.file": origin.file,
            "pretrained.format": origin.format,
            "pretrained.file_sha256": origin.sha256,
        }
    run = run_of(uri)
    if run is not None and run.record.run_id:
        tags["pretrained.run_id"] = run.record.run_id
    return tags


class MadeBy(NamedTuple):
    """The run that a checkpoint belongs to."""

    uri: str
    record: RunRecord


def run_of(uri: str) -> MadeBy | None:
    """Return the run that wrote the checkpoint or model at `uri`, if its folder says so."""
    parent = storage.absolute(uri).rpartition("/")[0]
    run_uri, _, kind = parent.rpartition("/")
    if kind not in ("checkpoints", "models"):
        return None
    try:
        record = RunFolder(run_uri).read_record()
    except DamagedFileError as error:
        logger.warning("%s: which run made it is not known (%s)", uri, error)
        return None
    return None if record is None else MadeBy(run_uri, record)


# Names that refer to a run


def _finished_run(given: str, root: str, config: StrictConfig | None) -> str:
    """Return the last checkpoint of the newest finished pretraining run with that name."""
    name = given.removeprefix(RUN_PREFIX)
    folder = storage.join(root, "pretrain")
    there = storage.list_folders(storage.absolute(folder))
    named = [x for x in there if _is_named(x, name)]
    found = [x for x in (_finished(folder, run, config) for run in named) if x is not None]
    if found:
        return max(found)[1]
    held = f"; there are {', '.join(there[:MAX_NAMED])}" if there else ""
    what = "pretraining run" if name == LATEST else f"pretraining run named {name!r}"
    raise ConfigError(
        f"init_from={given}: no finished {what} lies in {storage.absolute(folder)}{held}"
    )


def _is_named(folder: str, name: str) -> bool:
    """Return whether a run's folder, NAME-HASH, has this name, with or without the hash."""
    hashed = re.fullmatch(f"{re.escape(name)}-[0-9a-f]{{8}}", folder)
    return name in (LATEST, folder) or hashed is not None


def _finished(folder: str, name: str, config: StrictConfig | None) -> tuple[int, str] | None:
    """Return when a run finished and its last checkpoint, if the run can be a starting point."""
    run_uri = storage.join(folder, name)
    run = RunFolder(storage.absolute(run_uri))
    if run.read_result() is None:
        return None
    record = run.read_record()
    if config is not None and record is not None and _made_by(record.config, config, folder):
        return None
    step = newest_step(run.uri)
    if step is None or find_checkpoint(run.uri) is None:
        return None
    uri = checkpoint_uri(run_uri, step)
    listed = storage.list_tree(storage.absolute(uri), deep=False)
    return listed[MANIFEST_FILE].changed_at_ns, uri


def _made_by(recorded: dict[str, Any], config: StrictConfig, folder: str) -> bool:
    """Return whether this same command made the run from another run.

    The same command is the same run, which must not start from its own result.
    """
    start = recorded.get("init_from")
    if not isinstance(config, PretrainConfig) or start is None:
        return False
    if not storage.absolute(start).startswith(f"{storage.absolute(folder)}/"):
        return False
    now = config.model_dump(mode="json")
    return identity_digest("pretrain", {**recorded, "init_from": None}) == identity_digest(
        "pretrain", {**now, "init_from": None}
    )
