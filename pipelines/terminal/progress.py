"""Show what a command is doing: a bar on a terminal, occasional lines in a pipe or a job.

No command is silent for long: code that waits for something wraps it in `doing`.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipelines import job
from pipelines.terminal import worker_logging

logger = logging.getLogger(__name__)

DRAW_EVERY_S = 0.25
SAY_FIRST_S = 4.0  # seconds of silence before the first line; later intervals grow
MAX_SAY_EVERY_S = 60.0
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix} [{elapsed}]"


class Progress(NamedTuple):
    """What is being done, and how far it is."""

    what: str
    done: int = 0
    total: int = 0  # 0 if there is nothing to count
    detail: str = ""


def shows_bar() -> bool:
    """Return whether to draw bars: on a terminal, and without other machines' lines in between."""
    return sys.stderr.isatty() and job.cluster_address() is None


def has_bar() -> bool:
    """Return whether a bar shows what this process does: it may be a worker of the driver's."""
    return bool(os.environ.get(worker_logging.BAR_VARIABLE)) or shows_bar()


def write(text: str) -> None:
    """Write to stderr, above the bar if there is one."""
    tqdm.write(text, file=sys.stderr, end="")
    sys.stderr.flush()


def silence_limit_s(elapsed_s: float) -> float:
    """Return the longest allowed silence, which grows: a run of days needs fewer lines."""
    return min(max(SAY_FIRST_S, elapsed_s / 10), MAX_SAY_EVERY_S)


def format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


@contextmanager
def doing(what: str, read: Callable[[], Progress] | None = None) -> Iterator[None]:
    """Show that something is being done, for the duration of the block.

    Args:
        what: What is being done, such as "starting Ray".
        read: Called a few times per second for the current state, if it changes.
    """
    is_bar = shows_bar()
    display = _Bar() if is_bar else _Lines(what)
    ended = threading.Event()

    def show() -> None:
        while not ended.wait(DRAW_EVERY_S):
            try:
                display.show(Progress(what) if read is None else read())
            except Exception as error:  # the object that is shown may end first
                logger.debug("could not show the progress: %s", error)

    thread = threading.Thread(target=show, name="progress", daemon=True)
    redirected = logging_redirect_tqdm(_console_loggers() if is_bar else [])
    with redirected:
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            display.close()


def _console_loggers() -> list[logging.Logger]:
    """Return the loggers whose own handlers write to the terminal: their lines go above the bar.

    Others would get a handler without filters, which repeats a line and redacts nothing.
    """
    loggers = [logging.getLogger(name) for name in (None, *worker_logging.OURS)]
    consoles = (sys.stdout, sys.stderr)
    return [x for x in loggers if any(getattr(y, "stream", None) in consoles for y in x.handlers)]


class _Bar:
    """Progress on a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._shown: tuple[str, int] | None = None
        self._since_s = time.monotonic()

    def show(self, state: Progress) -> None:
        if self._shown != (state.what, state.total):
            self.close()
            self._shown, self._since_s = (state.what, state.total), time.monotonic()
            bar: tqdm[Any] = tqdm(
                total=state.total or None,
                desc=state.what,
                bar_format=BAR if state.total else "{desc}",
                file=sys.stderr,
                dynamic_ncols=True,
                leave=False,
            )
            self._bar = bar
        assert self._bar is not None
        if state.total:
            self._bar.n = state.done
            self._bar.set_postfix_str(state.detail, refresh=False)
        else:
            elapsed = format_seconds(time.monotonic() - self._since_s)
            self._bar.set_description_str(f"{state.what} ... {elapsed}", refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines:
    """Progress in a pipe, a job or a file: a line if nothing else was written for a while."""

    def __init__(self, what: str) -> None:
        self._began_s = self._since_s = time.monotonic()
        self._state: Progress | None = None
        self._num_lines = worker_logging.num_lines_shown()
        logger.info("%s ...", what)

    def show(self, state: Progress) -> None:
        now_s, num_lines = time.monotonic(), worker_logging.num_lines_shown()
        if num_lines != self._num_lines:
            self._num_lines, self._since_s = num_lines, now_s
        if now_s - self._since_s < silence_limit_s(now_s - self._began_s):
            return
        self._since_s = now_s
        counted = f", {state.done} of {state.total}" if state.total else ""
        detail = f", {state.detail}" if state.detail else ""
        elapsed = format_seconds(now_s - self._began_s)
        logger.info("still %s%s%s, after %s", state.what, counted, detail, elapsed)

    def close(self) -> None:
        """Do nothing: there is no bar to clear."""
