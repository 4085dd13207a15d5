"""Define what a stage adds to the driver in `pipelines.training.run`."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from infra.config import StorageConfig, TrackingConfig
from pipelines.config.sections import SavingConfig, ScalingConfig
from pipelines.outcome import StageResult
from pipelines.training.run_folder import RunFolder, Taken

if TYPE_CHECKING:  # A finished run is found without Ray.
    from pipelines.training.stopping import Channel


class RunConfig(Protocol):
    """The fields that the config of each of these stages has."""

    @property
    def name(self) -> str: ...

    @property
    def tracking(self) -> TrackingConfig: ...

    @property
    def run_name(self) -> str: ...

    @property
    def storage(self) -> StorageConfig: ...

    @property
    def scaling(self) -> ScalingConfig: ...

    @property
    def checkpoint(self) -> SavingConfig: ...


class Identity(NamedTuple):
    """What a run is computed from, and the tags by which MLflow's list of runs can be searched."""

    digest: str  # of the data and of the weights that the run starts from
    inputs: Mapping[str, str]  # a fingerprint of each input, by the config key that names it
    data: Mapping[str, tuple[str, str]]  # digest and source of each data set, by its purpose
    tags: Mapping[str, str]


class Work(NamedTuple):
    """What the workers of a run do."""

    run: Callable[[], object]  # returns when the work is done
    channel: "Channel"
    what_is_saved: Callable[[], str]  # text for the user of a run that was stopped


class PlannedRun(Protocol):
    """A run that can start."""

    def work(self, taken: Taken) -> Work: ...

    def is_kept(self, taken: Taken) -> bool:
        """Return whether the result counts, although the workers failed in the end."""

    def finish(
        self, taken: Taken, earlier: StageResult | None, failure: Exception | None
    ) -> StageResult:
        """Record what the workers made, and write the result.

        Args:
            taken: the run.
            earlier: the result of an earlier start, if there is one.
            failure: what the workers failed with, if `is_kept` said that their work counts.
        """


class OpenedRun(Protocol):
    """A run whose data are open."""

    @property
    def identity(self) -> Identity: ...

    def reuse(self, done: StageResult) -> StageResult | None:
        """Return the result of an earlier start as this start's result; None if work is left."""

    def plan(self) -> PlannedRun: ...


class Run(Protocol):
    """A stage's own part of its driver."""

    @property
    def config(self) -> RunConfig: ...

    @property
    def stage(self) -> str: ...

    @property
    def needs_ray(self) -> bool:
        """Whether the work of the run is done with Ray."""

    def open(self, folder: RunFolder) -> OpenedRun:
        """Open the data; an earlier result counts only if it was computed from the same data."""
