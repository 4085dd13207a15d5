"""Commit checkpoints of a run to storage, find the newest complete one, and delete old ones.

A checkpoint is a folder `checkpoints/step-00000100` of the run. Its manifest is written last and
holds the size and sha256 of every other file, so a folder whose writing was interrupted is not a
checkpoint. These folders, and not Ray's own bookkeeping, decide where a run resumes
(docs/adr/0005).
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from infra import storage, transfers
from infra.file_names import UnsafeNameError
from infra.scratch import scratch_folder
from mae_core.checkpoint_manifest import (
    MANIFEST_FILE,
    CheckpointManifest,
    CorruptCheckpointError,
    read_manifest,
    verify_checkpoint,
)
from pipelines.outcome import ConfigError

logger = logging.getLogger(__name__)

SET_ASIDE_FILE = "manifest.damaged.json"  # name that the manifest of a damaged checkpoint gets
MAX_NAMED = 8  # number of folders that a message names


class FoundCheckpoint(NamedTuple):
    uri: str
    folder: Path  # a verified local copy
    manifest: CheckpointManifest


def checkpoints_uri(run_uri: str) -> str:
    return storage.join(run_uri, "checkpoints")


def checkpoint_uri(run_uri: str, step: int) -> str:
    return storage.join(checkpoints_uri(run_uri), f"step-{step:08d}")


def commit_checkpoint(
    local: Path,
    run_uri: str,
    *,
    step: int,
    keep: int,
    spared: int | None = None,
    check: Callable[[], None],
) -> str:
    """Copy a checkpoint to the run's storage, then delete all but the `keep` newest and `spared`.

    Once this returns, a run that is killed resumes from this checkpoint. `check` raises an error if
    the run may not write any more; it is called first, and again before the manifest is written.
    """
    uri = checkpoint_uri(run_uri, step)
    check()
    transfers.upload_folder(local, uri, last=MANIFEST_FILE, before_last=check)
    older = [s for s in list_steps(run_uri) if s <= step]
    for old in older[:-keep]:
        if old != spared:
            storage.delete_folder(checkpoint_uri(run_uri, old))
    return uri


def list_steps(run_uri: str) -> list[int]:
    """List the steps that have a checkpoint folder, whole or not, oldest first."""
    names = storage.list_folders(checkpoints_uri(run_uri))
    return sorted(int(m.group(1)) for m in (re.fullmatch(r"step-(\d+)", n) for n in names) if m)


def newest_step(run_uri: str) -> int | None:
    """Return the step of the newest committed checkpoint, without reading its files."""
    for step in reversed(list_steps(run_uri)):
        uri = checkpoint_uri(run_uri, step)
        if storage.exists(storage.join(uri, MANIFEST_FILE)):
            return step
    return None


def find_checkpoint(run_uri: str) -> CheckpointManifest | None:
    """Return the manifest of the newest checkpoint whose files all exist with the right sizes.

    The contents of the files are not read. A checkpoint that is not complete is skipped with a
    warning.
    """
    for step in reversed(list_steps(run_uri)):
        uri = checkpoint_uri(run_uri, step)
        try:
            manifest = _read_manifest(uri)
            _check_sizes(uri, manifest)
        except (FileNotFoundError, CorruptCheckpointError) as error:
            logger.warning("checkpoint %s is not complete (%s); trying the one before", uri, error)
        else:
            return manifest
    return None


def is_whole(uri: str) -> bool:
    """Return whether a checkpoint has a manifest, and all of its files with the right sizes."""
    try:
        _check_sizes(uri, _read_manifest(uri))
    except (FileNotFoundError, CorruptCheckpointError):
        return False
    return True


def _check_sizes(uri: str, manifest: CheckpointManifest) -> None:
    there = storage.list_tree(uri, deep=False)
    for name, file in manifest.files.items():
        found = there[name].num_bytes if name in there else None
        if found != file.bytes:
            what = "is missing" if found is None else f"has {found} bytes"
            raise CorruptCheckpointError(
                f"{uri}/{name}: {what}, the manifest says {file.bytes} bytes"
            )


def _read_manifest(uri: str) -> CheckpointManifest:
    """Read a checkpoint's manifest.

    Raises:
        FileNotFoundError, CorruptCheckpointError: it is missing or damaged.
    """
    data = storage.read_bytes(storage.join(uri, MANIFEST_FILE))
    with scratch_folder() as workspace:
        (workspace / MANIFEST_FILE).write_bytes(data)
        return read_manifest(workspace)


class StartAgainError(RuntimeError):
    """The workers must start again, because the checkpoint that they started from is damaged."""


def fetch_found(run_uri: str, step: int, workspace: Path) -> FoundCheckpoint:
    """Download the checkpoint that `find_checkpoint` found, and verify its contents.

    If they do not match the manifest, the checkpoint is set aside: its manifest gets another name,
    so that the data and the workers restart from the checkpoint before it.

    Raises:
        StartAgainError: it was set aside.
    """
    uri = checkpoint_uri(run_uri, step)
    try:
        return fetch_checkpoint(uri, workspace / f"step-{step:08d}")
    except CorruptCheckpointError as error:
        place = storage.join(uri, MANIFEST_FILE)
        try:
            storage.write_bytes(storage.join(uri, SET_ASIDE_FILE), storage.read_bytes(place))
            storage.delete_file(place)
        except FileNotFoundError:
            logger.debug("%s is set aside already", uri)
        logger.warning(
            "checkpoint %s is not complete (%s); trying the one before. Its manifest is kept as %s",
            uri,
            error,
            SET_ASIDE_FILE,
        )
        raise StartAgainError(f"checkpoint {uri} is damaged: {error}") from error


def fetch_checkpoint(uri: str, folder: Path) -> FoundCheckpoint:
    """Copy exactly the files that the checkpoint's manifest lists, and verify them.

    Raises:
        CorruptCheckpointError: it is not whole.
    """
    folder.mkdir(parents=True)
    try:
        data = storage.read_bytes(storage.join(uri, MANIFEST_FILE))
        (folder / MANIFEST_FILE).write_bytes(data)
        sizes = {name: file.bytes for name, file in read_manifest(folder).files.items()}
        transfers.download_files(uri, sizes, folder)
        return FoundCheckpoint(uri, folder, verify_checkpoint(folder))
    except (FileNotFoundError, UnsafeNameError, transfers.WrongSizeError) as error:
        raise CorruptCheckpointError(f"{uri}: {error}") from error
    # The message names the local copy, which the user does not know.
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(str(error).replace(str(folder), uri)) from error


def at_newest_checkpoint(given: str) -> str:
    """Return a checkpoint's folder unchanged, and for a run's folder its newest checkpoint.

    A run that starts from it is then named by the checkpoint, and not by the folder that was given.

    Raises:
        ConfigError: there is none.
    """
    if storage.exists(storage.join(storage.absolute(given), MANIFEST_FILE)):
        return given
    for folder in (storage.join(given.rstrip("/"), "checkpoints"), given.rstrip("/")):
        for step in _steps_in(storage.absolute(folder)):
            uri = storage.join(folder, f"step-{step:08d}")
            if storage.exists(storage.join(storage.absolute(uri), MANIFEST_FILE)):
                logger.info("init_from=%s: takes its newest checkpoint, %s", given, uri)
                return uri
    there = storage.list_folders(storage.absolute(given))
    hint = f"; it holds {', '.join(sorted(there)[:MAX_NAMED])}" if there else ""
    raise ConfigError(
        f"init_from={given}: is neither a complete checkpoint, nor the folder of a run that has "
        f"one, nor weights from elsewhere{hint}"
    )


def _steps_in(uri: str) -> list[int]:
    """List the steps that have a folder at `uri`, newest first."""
    names = storage.list_folders(uri)
    found = (re.fullmatch(r"step-(\d+)", name) for name in names)
    return sorted((int(match[1]) for match in found if match), reverse=True)


def fetch_manifest(uri: str) -> CheckpointManifest:
    """Read the manifest of a checkpoint that the user names; its other files are not checked.

    Raises:
        ConfigError: there is none, or it can't be read.
    """
    try:
        return _read_manifest(storage.absolute(uri))
    except (FileNotFoundError, CorruptCheckpointError) as error:
        raise ConfigError(f"init_from={uri}: is not a complete checkpoint ({error})") from error


def resume_position(run_uri: str) -> int:
    """Return how many samples of the run's sequence the newest complete checkpoint has seen."""
    found = find_checkpoint(run_uri)
    return found.samples_seen if found else 0
