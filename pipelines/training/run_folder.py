"""Read and write the folder of a run: what the run is, how far it got, and how it ended.

run.json          what the run is, which MLflow run records it, and the start that owns the folder
checkpoints/      see pipelines/training/checkpoints.py
shards/           the index of shards that came without a manifest
reconstruction.png  what the model fills in, at the last picture
evaluation.json   the measurements at the end, and a name of all that they were computed from
health.json       of a pretraining: its health at each step that was measured, and such a name
bad_samples.jsonl   a line for each sample that was left out: epoch, shard, key, kind, reason
arms/             of a downstream run, a folder an arm: metrics.json (last), pictures, tables
features/         the Parquet files of an embed run
parts/            what is done of files that an embed run has not finished
models/           the tuned model of each arm, as a checkpoint without optimizer
failed.json       why trying again is pointless, while that is so
result.json       written last: the run is done
"""

import io
import json
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field
from typing_extensions import TypedDict

from infra import storage
from infra.own_files import DamagedFileError, parse_own, read_or_none, read_own
from mae_core.checkpoint_manifest import CorruptCheckpointError
from mae_core.config import StrictConfig
from mae_core.data.samples import DataError
from mae_core.training_error import NonFiniteLossError
from pipelines.outcome import ConfigError, StageResult, lasting_error

logger = logging.getLogger(__name__)

# Errors that would happen again at the same step, so restarting the workers would not help.
LASTING_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        CorruptCheckpointError,
        DataError,
        NonFiniteLossError,
        storage.NoShardsError,
        storage.StorageError,
    )
}


class SupersededError(storage.StorageError):
    """A later start of the same run has taken over its folder."""


class RunRecord(StrictConfig):
    start: str = ""
    """Identifies the start that owns the folder; earlier starts may not write any more."""
    data_digest: str
    """Digest of the training data."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """What the result is computed from: a fingerprint by the config key that names the input.

    Empty in records of versions before this field existed.
    """
    run_id: str | None
    """Id of the run in MLflow."""
    config: dict[str, Any]
    """The config as it was resolved at the last start."""


class _Result(TypedDict):
    """A StageResult whose counts stay integers."""

    stage: str
    status: Literal["done", "reused", "evaluated"]
    run_id: str | None
    output: str
    metrics: dict[str, int | float]


class _Evaluation(StrictConfig):
    key: str
    metrics: dict[str, float]


class _Health(StrictConfig):
    key: str
    points: dict[int, dict[str, float]]


class _Failed(StrictConfig):
    kind: str
    message: str


@dataclass(frozen=True)
class RunFolder:
    """The folder at `uri`, as one start of the command uses it.

    The workers of a driver that was killed continue to train for a while. Once a later start has
    written its record, their writes are refused. If `start` is None, the folder is only read or
    taken over.
    """

    uri: str
    start: str | None = None

    def _file(self, name: str) -> str:
        return storage.join(self.uri, name)

    def _read(self, name: str) -> bytes | None:
        try:
            return storage.read_bytes(self._file(name))
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        self.check_start()
        storage.write_bytes(self._file(name), data)

    def is_superseded(self) -> bool:
        """Return whether a later start took over the folder; False if the storage can't tell."""
        if self.start is None:
            return False
        try:
            record = self.read_record()
        except (storage.StorageError, DamagedFileError):
            return False
        return record is None or record.start != self.start

    def check_start(self) -> None:
        """Check that the folder is still ours.

        Raises:
            SupersededError: a later start has taken it over.
        """
        if self.is_superseded():
            raise SupersededError(f"{self.uri}: a later start of this run has taken it over")

    @property
    def index_uri(self) -> str:
        return self._file("shards")

    def clear(self) -> None:
        """Delete everything but the index of the shards, which `--fresh` has just rebuilt."""
        for name in storage.list_folders(self.uri):
            if self._file(name) != self.index_uri:
                storage.delete_folder(self._file(name))
        for name in storage.list_files(self.uri):
            storage.delete_file(self._file(name))

    def read_record(self) -> RunRecord | None:
        way_out = "bring it back, or start over with --fresh: it says what the run began with"
        return read_own(self._file("run.json"), RunRecord, way_out)

    def write_record(self, record: RunRecord) -> None:
        """Take the folder over for `record.start`."""
        storage.write_bytes(self._file("run.json"), record.model_dump_json(indent=1).encode())

    def read_result(self) -> StageResult | None:
        anew = "the result is computed again from the files that exist"
        found = read_or_none(self._file("result.json"), _Result, anew)
        return None if found is None else StageResult(**found)

    def read_whole_result(self) -> StageResult | None:
        """Read the result if its output exists; if that was deleted, warn and return None."""
        done = self.read_result()
        if done is None or storage.exists(done.output):
            return done
        logger.warning("%s is missing: it is made again", done.output)
        return None

    def write_result(self, result: StageResult) -> None:
        self._write("result.json", json.dumps(result._asdict()).encode())

    @property
    def picture_uri(self) -> str:
        return self._file("reconstruction.png")

    def write_picture(self, png: bytes) -> None:
        self._write("reconstruction.png", png)

    @property
    def features_uri(self) -> str:
        """Folder of the Parquet files of an embed run."""
        return self._file("features")

    @property
    def parts_uri(self) -> str:
        """Folder of unfinished Parquet files of an embed run."""
        return self._file("parts")

    def model_uri(self, label: str) -> str:
        """Return the folder of an arm's trained model."""
        return self._file(f"models/{label}")

    def has_arm(self, label: str) -> bool:
        return self._read_arm(label) is not None

    def read_arm(self, label: str) -> dict[str, float]:
        return self._read_arm(label) or {}

    def _read_arm(self, label: str) -> dict[str, float] | None:
        place = self._file(f"arms/{label}/metrics.json")
        return read_or_none(place, dict[str, float], "the arm is measured again")

    def write_arm(self, label: str, metrics: str) -> None:
        """Write an arm's metrics. They are written last and mark the arm as done."""
        storage.delete_file(self._file(f"arms/{label}/failed.txt"))
        self._write(f"arms/{label}/metrics.json", metrics.encode())

    def read_arm_failure(self, label: str) -> str | None:
        """Return why an arm could not be measured; None if that is not known."""
        text = self._read(f"arms/{label}/failed.txt")
        return None if text is None else text.decode()

    def write_arm_failure(self, label: str, why: str) -> None:
        self._write(f"arms/{label}/failed.txt", why.encode())

    def write_arm_file(self, label: str, name: str, data: bytes) -> None:
        self._write(f"arms/{label}/{name}", data)

    def read_arm_files(self, label: str) -> dict[str, bytes]:
        """Return an arm's pictures and tables by name."""
        folder = self._file(f"arms/{label}")
        return {n: storage.read_bytes(storage.join(folder, n)) for n in storage.list_files(folder)}

    def write_arm_picture(self, label: str, name: str, picture: npt.NDArray[np.uint8]) -> None:
        self.write_picture_file(f"arms/{label}/{name}", picture)

    def write_picture_file(self, name: str, picture: npt.NDArray[np.uint8]) -> str:
        """Write an (H, W, 3) picture of the whole run as NAME.png; return its URI."""
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        return self.write_file(f"{name}.png", buffer.getvalue())

    def write_file(self, name: str, data: bytes) -> str:
        """Write a file of the whole run; return its URI."""
        self._write(name, data)
        return self._file(name)

    def read_evaluation(self, key: str) -> dict[str, float] | None:
        """Return the metrics of the evaluation `key`: {} for "", None if there is none."""
        if not key:
            return {}
        place = self._file("evaluation.json")
        found = read_or_none(place, _Evaluation, "the model is measured again")
        return found.metrics if found is not None and found.key == key else None

    def write_evaluation(self, key: str, metrics: dict[str, float]) -> None:
        """Store metrics together with the key of everything that they were computed from."""
        fields = {"key": key, "metrics": metrics}
        self._write("evaluation.json", json.dumps(fields).encode())

    def read_health(self, key: str) -> dict[int, dict[str, float]]:
        """Read the metrics of each step that was measured under `key`, in order."""
        place = self._file("health.json")
        found = read_or_none(place, _Health, "the curve begins again")
        return dict(sorted(found.points.items())) if found and found.key == key else {}

    def write_health(self, key: str, points: Mapping[int, Mapping[str, float]]) -> None:
        fields = {"key": key, "points": {str(step): points[step] for step in sorted(points)}}
        self._write("health.json", json.dumps(fields).encode())

    @property
    def bad_samples_uri(self) -> str:
        return self._file("bad_samples.jsonl")

    def read_bad_samples(self) -> list[dict[str, Any]]:
        """Read all undamaged lines; a warning counts the others."""
        return self._bad_samples()[0]

    def _bad_samples(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        """Return the samples, and the damaged lines unchanged."""
        samples, damaged = [], []
        for line in (self._read("bad_samples.jsonl") or b"").splitlines():
            try:
                samples.append(parse_own(line, self.bad_samples_uri, dict[str, Any], ""))
            except DamagedFileError:
                damaged.append(line)
        if damaged:
            logger.warning(
                "%s: %d lines are damaged and not counted", self.bad_samples_uri, len(damaged)
            )
        return [line for line in samples if {"shard", "key"} <= line.keys()], damaged

    def add_bad_samples(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Add samples, each of them once, however often it was met."""
        there, damaged = self._bad_samples()
        known = {(line["shard"], line["key"]): line for line in there}
        for sample in samples:
            known.setdefault((sample["shard"], sample["key"]), dict(sample))
        lines = [json.dumps(line).encode() for line in known.values()]
        self._write("bad_samples.jsonl", b"".join(line + b"\n" for line in [*lines, *damaged]))

    def forget_failure(self) -> None:
        """Delete the error of an earlier start, so that it does not stop this one."""
        storage.delete_file(self._file("failed.json"))

    def record_failure(self, error: BaseException) -> None:
        """Store an error that would happen again, so that the workers are not restarted in vain.

        If the storage accepts no files, this one is lost too; `check_writable` then meets the
        error.
        """
        lasting = lasting_error(error)
        if lasting is None or isinstance(lasting, SupersededError):
            return
        self.check_start()
        kind = next((x.__name__ for x in type(lasting).__mro__ if x.__name__ in LASTING_ERRORS), "")
        fields = {"kind": kind, "message": str(lasting)}
        with suppress(storage.StorageError):
            self._write("failed.json", json.dumps(fields).encode())

    def read_failure(self) -> Exception | None:
        """Read the lasting error of a worker; None if there was none."""
        failed = read_or_none(self._file("failed.json"), _Failed, "the workers are started again")
        if failed is None:
            return None
        kind = LASTING_ERRORS.get(failed.kind, DataError)
        if kind is storage.StorageError:
            return storage.StorageError(failed.message, is_lasting=True)
        return kind(failed.message)

    def raise_failure(self) -> None:
        """Raise the lasting error of a worker, if there was one."""
        if (failure := self.read_failure()) is not None:
            raise failure

    def check_writable(self) -> None:
        """Write a small file and delete it.

        This is done before the workers start, because each of them would otherwise meet a full or
        read-only disk, or a key without permission to write.

        Raises:
            StorageError: the store takes no file.
        """
        self._write(".writable", b"")
        storage.delete_file(self._file(".writable"))


class Taken(NamedTuple):
    """A run's folder that this start of the command has taken over."""

    folder: RunFolder
    run_id: str | None  # in MLflow

    @property
    def start(self) -> str:
        assert self.folder.start is not None
        return self.folder.start


def earlier_record(
    folder: RunFolder, digest: str, inputs: Mapping[str, str] = MappingProxyType({})
) -> RunRecord | None:
    """Read what an earlier start of the run recorded; None if there was none.

    Args:
        folder: of the run.
        digest: names the data, and the weights that the run starts from.
        inputs: a fingerprint of each thing that the result is computed from, by the key of the
            config that names it.

    Raises:
        DataError: the earlier start had other data or weights; names which.
    """
    record = folder.read_record()
    if record is None:
        return None
    changed = [key for key, now in inputs.items() if record.inputs.get(key, now) != now]
    if not changed and record.data_digest == digest:
        return record
    before, now = record.data_digest, digest
    if before == now:  # The digest leaves out inputs whose checksums no manifest holds.
        before, now = record.inputs[changed[0]], inputs[changed[0]]
    what = ", ".join(changed) or "the shards or their manifest"
    raise DataError(
        f"{folder.uri}: data (or the weights that it started from) changed since this run began "
        f"(digest {before}, now {now}): {what}. Bring the data back, or start over with --fresh"
    )
