"""The `mae` command: words to a config, a stage's result to one line, errors to exit codes.

Exit codes: 0 done, 2 config, 3 a gate refused, 4 data, 5 infrastructure, 6 training, 130 and 143
stopped, 1 anything else (docs/guides/run.md).
"""

import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from infra.processes import end_with_parent
from infra.redaction import redact, redact_logs
from pipelines.commands.arguments import COMMANDS, load_own_stage, make_parser, parse, read_config
from pipelines.outcome import StageResult, explain
from pipelines.terminal import progress


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit code."""
    # Quiet the libraries before they are imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
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
            # By name: a wrong config is told before torch and Ray are loaded.
            with _telling_that_it_loads():
                stage = importlib.import_module(f"pipelines.{arguments.stage}")
        result: StageResult = stage.run(config, fresh=arguments.fresh)
    except BaseException as error:
        exit_code = _report(error, debug=arguments.debug)
        if not sys.stdout.isatty():  # a person has been told
            explained = explain(error)
            # Of an error that is not ours, the words alone: its class is on stderr.
            message = str(error) if explained.exit_code == 1 else explained.message
            failed = {"status": "failed", "error": message, "can_pass": explained.can_pass}
            print(redact(json.dumps({"stage": arguments.stage, **failed})), flush=True)
        return exit_code
    # A count stays one; numpy's numbers are none that JSON knows.
    metrics = {k: x if isinstance(x, int) else float(x) for k, x in result.metrics.items()}
    result = result._replace(metrics=metrics)
    fields = {**result._asdict(), "seconds": round(time.monotonic() - started_s, 1)}
    print(redact(json.dumps(fields)), flush=True)
    # By name: not every stage has loaded MLflow.
    if sys.stdout.isatty() and result.run_id is not None:
        importlib.import_module("pipelines.training.recording").say_run_page(config, result.run_id)
    return 0


def _telling_that_it_loads() -> AbstractContextManager[None]:
    """Tell a person at a terminal that torch and Ray are being loaded, which takes seconds."""
    return progress.doing("loading") if progress.shows_bar() else nullcontext()


def _version() -> str:
    try:
        return importlib.import_module("importlib.metadata").version("mae-pipeline")
    except ModuleNotFoundError:  # PackageNotFoundError is one: a copy that is not installed
        return "of a copy that is not installed"


def _run_command(words: list[str]) -> int:
    module, _ = COMMANDS[words[0]]
    # Those of `chain` begin with which of the two is meant.
    own_words = words if module == "chain.command" else words[1:]
    try:
        code: int = importlib.import_module(f"pipelines.{module}").command(own_words)
    except BaseException as error:
        return _report(error, debug="--debug" in words)
    return code


def _report(error: BaseException, *, debug: bool) -> int:
    """Say what went wrong on stderr; returns the exit code."""
    if debug:
        logging.getLogger(__name__).error("traceback follows", exc_info=error)
    exit_code = getattr(error, "exit_code", None)
    if isinstance(exit_code, int):  # a stage that was stopped from outside
        return exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    explained = explain(error)
    hint = "" if debug or explained.exit_code != 1 else "; --debug shows where"
    for line in redact(f"{explained.message}{hint}").splitlines():
        print(f"{explained.title}: {line}", file=sys.stderr)
    return explained.exit_code


if __name__ == "__main__":
    sys.exit(main())
