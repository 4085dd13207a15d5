"""The folder of a run in storage: what it is, how far it came, how it ended.

run.json          what the run is, and which MLflow run records it
checkpoints/      see pipelines/checkpoints.py
shards/           the index of shards that came without a manifest
reconstruction.png  what the model fills in, at the last picture
evaluation.json   the kNN accuracies
failed.json       why trying again is pointless, while that is so
result.json       written last: the run is done
"""

import json
import logging
from dataclasses import dataclass
from typing import Any

from infra import storage
from mae_core.config import StrictConfig
from mae_core.data.samples import DataError
from mae_core.train_step import NonFiniteLossError
from pipelines.config import ConfigError, StageResult

logger = logging.getLogger(__name__)

# Errors that the same step meets again, so that starting the workers anew would not help.
LASTING_ERRORS: tuple[type[Exception], ...] = (DataError, NonFiniteLossError, ConfigError)


class RunRecord(StrictConfig):
    data_digest: str
    """Of the training data."""
    run_id: str | None
    """MLflow's."""
    config: dict[str, Any]
    """As it was resolved at the last start."""


@dataclass(frozen=True)
class RunFolder:
    uri: str

    def _file(self, name: str) -> str:
        return storage.join(self.uri, name)

    def _read(self, name: str) -> bytes | None:
        try:
            return storage.read_bytes(self._file(name))
        except FileNotFoundError:
            return None

    @property
    def index_uri(self) -> str:
        return self._file("shards")

    def clear(self) -> None:
        """Delete all but the index of the shards, which `--fresh` has made anew."""
        for name in storage.list_folders(self.uri):
            if self._file(name) != self.index_uri:
                storage.delete_folder(self._file(name))
        for name in storage.list_files(self.uri):
            storage.delete_file(self._file(name))

    def read_record(self) -> RunRecord | None:
        text = self._read("run.json")
        return None if text is None else RunRecord.model_validate_json(text)

    def write_record(self, record: RunRecord) -> None:
        storage.write_bytes(self._file("run.json"), record.model_dump_json(indent=1).encode())

    def read_result(self) -> StageResult | None:
        text = self._read("result.json")
        return None if text is None else StageResult(**json.loads(text))

    def write_result(self, result: StageResult) -> None:
        storage.write_bytes(self._file("result.json"), json.dumps(result._asdict()).encode())

    @property
    def picture_uri(self) -> str:
        return self._file("reconstruction.png")

    def write_picture(self, png: bytes) -> None:
        storage.write_bytes(self.picture_uri, png)

    def read_evaluation(self) -> dict[str, float]:
        text = self._read("evaluation.json")
        return {} if text is None else json.loads(text)

    def write_evaluation(self, metrics: dict[str, float]) -> None:
        storage.write_bytes(self._file("evaluation.json"), json.dumps(metrics).encode())

    def forget_earlier_start(self) -> None:
        """Remove what an earlier start left that must not steer this one."""
        storage.delete_file(self._file("failed.json"))
        # Ray's own list of checkpoints: it refuses to start where one of them is gone, and ours
        # says where to go on (docs/adr/0005).
        storage.delete_file(self._file("checkpoint_manager_snapshot.json"))

    def record_failure(self, error: BaseException) -> None:
        """Keep a lasting error, so that no further start of the workers is tried."""
        lasting = find_error(error, LASTING_ERRORS)
        if lasting is not None:
            fields = {"kind": type(lasting).__name__, "message": str(lasting)}
            storage.write_bytes(self._file("failed.json"), json.dumps(fields).encode())

    def raise_failure(self) -> None:
        """Raise the lasting error that a worker met, if one did."""
        text = self._read("failed.json")
        if text is None:
            return
        failed = json.loads(text)
        if failed["kind"] == NonFiniteLossError.__name__:
            raise NonFiniteLossError(failed["message"])
        raise DataError(failed["message"])


def find_error(error: BaseException | None, kinds: tuple[type[Exception], ...]) -> Exception | None:
    """The first of `kinds` among an error and what caused it; None if there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, kinds):
            return error
        seen.add(id(error))
        # Ray keeps what a task raised in `cause`.
        error = getattr(error, "cause", None) or error.__cause__ or error.__context__
    return None
