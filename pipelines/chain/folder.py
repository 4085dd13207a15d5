"""The folder of a stage's result, named by its key: STORAGE/stages/KIND/KEY.

key.json    the parts that the key hashes, from which `mae plan` explains changes
lease       held while a run of the pipeline makes the result
done.json   written last: the result, and the size of each of its files
others      the stage's own files

Beside the kinds lies code.json: what `pipelines.chain.code` has parsed.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from infra import storage
from infra.own_files import read_or_none
from mae_core.config import StrictConfig
from pipelines.chain.execute import KeyParts
from pipelines.outcome import StageResult

OWN_FILES = ("key.json", "lease", "done.json")
FOLDER = "{self}"  # placeholder in a result's output, because the folder may be moved


class Done(StrictConfig):
    """A stage's result as it was committed."""

    output: str
    run_id: str | None
    metrics: dict[str, float]
    files: dict[str, int]
    """Size in bytes by path in the folder, or by URI for files outside it."""
    seconds: float
    peak_bytes: int = 0
    """Peak memory of its processes in bytes, as measured beside the driver."""
    steps: int | None = None
    """Number of optimizer steps that it took."""
    finished_at: float = Field(default_factory=time.time)
    """Seconds since 1970."""
    made_with: dict[str, str] = Field(default_factory=dict)
    """Versions of the software that it ran on, which are not part of the key."""


@dataclass(frozen=True)
class StageFolder:
    root: str
    kind: str
    key: str

    @property
    def uri(self) -> str:
        return storage.join(storage.absolute(self.root), "stages", self.kind, self.key)

    @property
    def lease_uri(self) -> str:
        return storage.join(self.uri, "lease")

    def read_parts(self) -> KeyParts | None:
        place = storage.join(self.uri, "key.json")
        return read_or_none(place, KeyParts, "the plan can't say what has changed")

    def write_parts(self, parts: KeyParts) -> None:
        storage.write_bytes(storage.join(self.uri, "key.json"), parts.to_json().encode())

    def read_done(self) -> Done | None:
        place = storage.join(self.uri, "done.json")
        return read_or_none(place, Done, "the stage runs again")

    def commit(self, result: StageResult, **facts: Any) -> Done:
        """Record the sizes of all files; from then on the folder holds a result."""
        files = {name: facts.num_bytes for name, facts in storage.list_tree(self.uri).items()}
        files = {name: size for name, size in files.items() if name not in OWN_FILES}
        output = storage.absolute(result.output)
        if not f"{output}/".startswith(f"{self.uri}/"):
            outside = storage.list_tree(output)
            files |= {storage.join(output, name): x.num_bytes for name, x in outside.items()}
        done = Done(
            output=output.replace(self.uri, FOLDER, 1),
            run_id=result.run_id,
            metrics=result.metrics,
            files=files,
            **facts,
        )
        self.write_done(done)
        return done

    def write_done(self, done: Done) -> None:
        text = json.dumps(done.model_dump(mode="json"), indent=1)
        storage.write_bytes(storage.join(self.uri, "done.json"), text.encode())

    def output(self, done: Done) -> str:
        return done.output.replace(FOLDER, self.uri, 1)

    def problem(self, done: Done) -> str | None:
        """Return the first file that differs from what was committed, or None."""
        found = {name: facts.num_bytes for name, facts in storage.list_tree(self.uri).items()}
        outside = [name for name in done.files if "://" in name or name.startswith("/")]
        for folder in {name.rpartition("/")[0] for name in outside}:
            listed = storage.list_tree(folder)
            found |= {storage.join(folder, name): x.num_bytes for name, x in listed.items()}
        for name, size in done.files.items():
            if name not in found:
                return f"{name} is gone"
            if found[name] != size:
                return f"{name} has {found[name]} bytes, not {size}"
        return None

    def clear(self) -> None:
        """Delete the result but keep the lease, which is held."""
        storage.delete_file(storage.join(self.uri, "done.json"))
        for name in storage.list_folders(self.uri):
            storage.delete_folder(storage.join(self.uri, name))
        for name in storage.list_files(self.uri):
            if name != "lease":
                storage.delete_file(storage.join(self.uri, name))


def code_uri(root: str) -> str:
    """Return the file that keeps what has been parsed of the stages' code."""
    return storage.join(storage.absolute(root), "stages", "code.json")


def earlier_folders(root: str, kind: str) -> Iterator[StageFolder]:
    """Yield the folders of all results of a kind of stage, finished or not."""
    for key in storage.list_folders(storage.join(storage.absolute(root), "stages", kind)):
        yield StageFolder(root, kind, key)
