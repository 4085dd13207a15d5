"""Let the workers agree on the step after which their run is saved or stopped.

The driver gets the signal and asks through a channel. Rank 0 looks there, decides at the end of
each step, and tells the other ranks, so that all of them stop after the same step (docs/adr/0018).
"""

import logging
import threading
import time
from enum import Enum
from typing import NamedTuple, Protocol

import torch
import torch.distributed

logger = logging.getLogger(__name__)

POLL_S = 0.1
TELL_EVERY_S = 0.5
WATCH_ENDS_S = 2.0


class Phase(Enum):
    STARTING = "starting"
    TRAINING = "training"  # the end of each step can be saved
    MEASURING = "measuring"  # what was trained is saved already
    STOPPED = "stopped"  # a checkpoint of the step is written


class Told(NamedTuple):
    """What the workers said last."""

    phase: Phase = Phase.STARTING
    step: int = 0
    total: int = 0  # of the steps, or of the images that are measured; 0 where nothing is counted
    what: str = ""  # is done now, such as an arm's name
    detail: str = ""


class Channel(Protocol):
    """Connects the driver and the workers of one start of a run."""

    def ask(self) -> None:
        """Ask the workers to stop after the step that they are in."""

    def is_asked(self) -> bool:
        """Return whether the workers are to stop."""

    def tell(self, told: Told) -> None:
        """Tell the driver how far the workers are."""

    def told(self) -> Told:
        """Return what the workers told last."""


class LocalChannel:
    """A channel to a worker that is a thread of the driver's process; it needs no Ray."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._told = Told()

    def ask(self) -> None:
        self._asked.set()

    def is_asked(self) -> bool:
        return self._asked.is_set()

    def tell(self, told: Told) -> None:
        self._told = told

    def told(self) -> Told:
        return self._told


class AfterStep(Enum):
    GO_ON = 0
    SAVE = 1
    STOP = 2  # with a checkpoint


class StepEnds:
    """Decides at the end of each step whether to save and whether to stop, alike on all ranks.

    Args:
        channel: to the driver.
        every_minutes: time between checkpoints.
        rank: this worker's.
        world_size: the number of workers.
    """

    def __init__(
        self, channel: Channel, *, every_minutes: float, rank: int, world_size: int
    ) -> None:
        self._channel = channel
        self._every_s = 60 * every_minutes
        self._rank = rank
        # On CPUs: the device does not wait for the answer.
        self._group: torch.distributed.ProcessGroup | None = None
        if world_size > 1:
            group = torch.distributed.new_group(backend="gloo")
            assert isinstance(group, torch.distributed.ProcessGroup)
            self._group = group
        self._saved_at_s = time.monotonic()
        self._told_at_s = 0.0
        self._is_closed = False
        self.is_asked = False  # to stop; only rank 0 knows
        # A thread of its own looks: a step costs no request.
        self._watching = threading.Thread(target=self._watch, name="stop-watch", daemon=True)
        if rank == 0:
            self._watching.start()

    def close(self) -> None:
        """End the watch, which would otherwise go on for as long as the process."""
        self._is_closed = True
        if self._watching.is_alive():
            self._watching.join(WATCH_ENDS_S)

    def _watch(self) -> None:
        while not (self.is_asked or self._is_closed):
            try:
                self.is_asked = self._channel.is_asked()
            except Exception as error:  # Ray ends, or its store is away for a moment
                logger.debug("could not check for a request to stop: %s", error)
            time.sleep(POLL_S)

    def tell(self, phase: Phase, step: int = 0) -> None:
        if self._rank == 0:
            self._channel.tell(Told(phase, step))

    def tell_progress(self, told: Told) -> None:
        """Twice a second at most: it is called in loops."""
        if self._rank == 0 and time.monotonic() - self._told_at_s > TELL_EVERY_S:
            self._told_at_s = time.monotonic()
            self._channel.tell(told)

    def measured(self, what: str, done: int, total: int) -> None:
        """Tell how far the measuring is, in images or pieces of them."""
        self.tell_progress(Told(Phase.MEASURING, done, total, what))

    def agree(self, *, is_due: bool) -> AfterStep:
        """Every rank calls it after the same steps, and gets the same answer.

        Args:
            is_due: whether a checkpoint is due at this step, whatever the clock says.
        """
        decision = self._of_this_rank(is_due)
        if self._group is not None:
            word = torch.tensor(decision.value)
            torch.distributed.broadcast(word, 0, group=self._group)
            decision = AfterStep(int(word))
        if decision is not AfterStep.GO_ON:
            self._saved_at_s = time.monotonic()
        return decision

    def _of_this_rank(self, is_due: bool) -> AfterStep:
        if self.is_asked:
            return AfterStep.STOP
        is_due = is_due or time.monotonic() - self._saved_at_s >= self._every_s
        return AfterStep.SAVE if is_due else AfterStep.GO_ON
