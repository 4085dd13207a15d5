"""The `mae` command: turn words into a config, a result into one line, errors into exit codes.

Exit codes: 0 done, 2 config, 3 refused by a gate, 4 data, 5 infrastructure, 6 training, 130 and 143
stopped, 1 anything else (docs/guides/run.md).
"""

import importlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from infra.processes import end_past_threads, end_with_parent
from infra.quick_imports import end_quickly, without_collecting
from infra.redaction import redact, redact_logs
from pipelines.commands.arguments import COMMANDS, load_own_stage, make_parser, parse, read_config
from pipelines.outcome import STOPPED_CODES, StageResult, explain
from pipelines.terminal import progress, worker_logging


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage or another command; return the exit code."""
    exit_code = _run(argv)
    end_past_threads(exit_code)
    if argv is None:  # this process has nothing else to do
        end_quickly()
    return exit_code


def _run(argv: Sequence[str] | None) -> int:
    # Silence the libraries before they are imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    # A call after Ray has ended must not start another Ray, which would lack the guards of ours.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    worker_logging.hide_libraries()
    redact_logs()
    end_with_parent()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return _run_command(words)
    if not words:
        make_parser().print_help()
        return 2
    if words == ["--version"]:
        print(f"mae {_version()}")
        return 0
    arguments = parse(words)
    started_s = time.monotonic()
    try:
        config = read_config(arguments)
        if arguments.stage == "stage":
            stage = load_own_stage(arguments.file)
        else:
            # Imported by name, so that a wrong config is reported before torch and Ray load.
            with _telling_that_it_loads(), without_collecting():
                stage = importlib.import_module(f"pipelines.{arguments.stage}")
        result: StageResult = stage.run(config, fresh=arguments.fresh)
    except BaseException as error:
        exit_code = _report(error, debug=arguments.debug)
        if not sys.stdout.isatty():  # a person has already seen the message
            fields = {"stage": arguments.stage, **_failure(error, exit_code)}
            print(redact(json.dumps(fields)), flush=True)
        return exit_code
    # Integers stay integers; numpy numbers cannot be written as JSON.
    metrics = {k: x if isinstance(x, int) else float(x) for k, x in result.metrics.items()}
    result = result._replace(metrics=metrics)
    fields = {**result._asdict(), "seconds": round(time.monotonic() - started_s, 1)}
    print(redact(json.dumps(fields)), flush=True)
    # Imported by name, because not every stage has loaded MLflow.
    if sys.stdout.isatty() and result.run_id is not None:
        importlib.import_module("pipelines.terminal.run_page").say_run_page(config, result.run_id)
    return 0


def _telling_that_it_loads() -> AbstractContextManager[None]:
    """Show a person at a terminal that torch and Ray are loading, which takes seconds."""
    return progress.doing("loading") if progress.shows_bar() else nullcontext()


def _version() -> str:
    try:
        return importlib.import_module("importlib.metadata").version("mae-pipeline")
    except ModuleNotFoundError:  # PackageNotFoundError is a subclass: the copy is not installed
        return "of a copy that is not installed"


def _run_command(words: list[str]) -> int:
    module, _ = COMMANDS[words[0]]
    # The words of `chain` begin with the command that is meant, run or plan.
    own_words = words if module == "chain.command" else words[1:]
    try:
        code: int = importlib.import_module(f"pipelines.{module}").command(own_words)
    except BaseException as error:
        return _report(error, debug="--debug" in words)
    return code


def _failure(error: BaseException, exit_code: int) -> dict[str, Any]:
    """Return what a program that reads stdout is told about a command that did not end well."""
    if exit_code in STOPPED_CODES:  # the same command continues, so this is no failure of the run
        name = signal.Signals(exit_code - 128).name
        return {"status": "stopped", "error": f"stopped by {name}", "can_pass": True}
    explained = explain(error)
    # For an error that is not ours, only its text: its class is on stderr.
    message = str(error) if explained.exit_code == 1 else explained.message
    return {"status": "failed", "error": message, "can_pass": explained.can_pass}


def _report(error: BaseException, *, debug: bool) -> int:
    """Explain the error on stderr; return the exit code."""
    if debug:
        logging.getLogger(__name__).error("traceback follows", exc_info=error)
    exit_code = getattr(error, "exit_code", None)
    if isinstance(exit_code, int):  # a stage that was stopped from outside
        return exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        if error.code == signal.SIGTERM:  # Ray's handler ends with the number of the signal
            return 128 + signal.SIGTERM
        return error.code if isinstance(error.code, int) else 1
    explained = explain(error)
    hint = "" if debug or explained.exit_code != 1 else "; --debug shows where"
    for line in redact(f"{explained.message}{hint}").splitlines():
        print(f"{explained.title}: {line}", file=sys.stderr)
    return explained.exit_code


if __name__ == "__main__":
    sys.exit(main())
