"""The `mae` command: words to a config, a stage's result to one line, errors to exit codes.

Exit codes: 0 done, 2 config, 3 a gate refused, 4 data, 5 infrastructure, 6 training, 130 and 143
stopped, 1 anything else (docs/guides/run.md).
"""

import argparse
import importlib
import json
import logging
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from infra.processes import end_with_parent
from mae_core.config import StrictConfig
from pipelines.chain_config import load_stage_file
from pipelines.config import ConfigError, StageResult
from pipelines.config_fields import describe
from pipelines.config_loading import Given, load_config
from pipelines.failures import tell
from pipelines.stage_kinds import KINDS

# Words that are no stage, and the module whose `command` takes what follows.
COMMANDS = {
    "run": ("chain", "Run a pipeline: the stages that changed, in parallel where they can."),
    "plan": ("chain", "Say what `run` would do, and why."),
    "schedule": ("schedule", "Run pipelines at times, or when there is new data."),
    "doctor": ("doctor", "Check this machine, the store, MLflow and Ray."),
    "config": ("config_command", "Show where each value of a config comes from; its JSON Schema."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit code."""
    # Quiet the libraries before they are imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    end_with_parent()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return _run_command(words)
    arguments = _parse(words)
    started_s = time.monotonic()
    try:
        config = _config(arguments)
        if arguments.stage == "stage":
            stage = load_stage_file(Path(arguments.file))
        else:
            # By name: a wrong config is told before torch and Ray are loaded.
            stage = importlib.import_module(f"pipelines.{arguments.stage}")
        result: StageResult = stage.run(config, fresh=arguments.fresh)
    except BaseException as error:
        exit_code = _tell(error, debug=arguments.debug)
        if not sys.stdout.isatty():  # a person has been told
            told = tell(error)
            # Of an error that is not ours, the words alone: its class is on stderr.
            message = str(error) if told.exit_code == 1 else told.message
            failed = {"status": "failed", "error": message, "can_pass": told.can_pass}
            print(json.dumps({"stage": arguments.stage, **failed}), flush=True)
        return exit_code
    # A count stays one; numpy's numbers are none that JSON knows.
    metrics = {k: x if isinstance(x, int) else float(x) for k, x in result.metrics.items()}
    result = result._replace(metrics=metrics)
    fields = {**result._asdict(), "seconds": round(time.monotonic() - started_s, 1)}
    print(json.dumps(fields), flush=True)
    # By name: not every stage has loaded MLflow.
    if sys.stdout.isatty() and result.run_id is not None:
        importlib.import_module("pipelines.recording").say_run_page(config, result.run_id)
    return 0


def _run_command(words: list[str]) -> int:
    module, _ = COMMANDS[words[0]]
    # Those of `chain` begin with which of the two is meant.
    own_words = words if module == "chain" else words[1:]
    try:
        code: int = importlib.import_module(f"pipelines.{module}").command(own_words)
    except BaseException as error:
        return _tell(error, debug="--debug" in words)
    return code


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand anywhere among the words, which argparse alone does not allow here."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; `mae {arguments.stage} --help` lists them")
    arguments.words = [*arguments.words, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mae", description="Masked-autoencoder pretraining on WebDataset shards."
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, (_, summary) in COMMANDS.items():
        stages.add_parser(name, help=summary)
    own = stages.add_parser("stage", help="Run a stage of your own: a .py file.")
    own.add_argument(
        "file", metavar="FILE.py", help="with Config and run, see docs/guides/chain.md"
    )
    _add_stage_arguments(own)
    for name, kind in KINDS.items():
        stage = stages.add_parser(
            name,
            help=kind.summary,
            description=kind.summary,
            epilog=_fields_help(kind.config_type),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_stage_arguments(stage)
        if name == "prepare":
            stage.add_argument(
                "--synthetic",
                choices=["shapes"],
                help="draw scenes: mae prepare --synthetic shapes OUT",
            )
    return parser


def _add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        metavar="FILE.yaml | section.key=value",
        help="files are merged left to right, then the values",
    )
    parser.add_argument("--fresh", action="store_true", help="delete what is there; start over")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _fields_help(config_type: type[StrictConfig]) -> str:
    lines = ["fields (key, type, default):"]
    for key, kind, default, meaning in describe(config_type):
        lines.append(f"  {key}  {kind}  [{default}]")
        lines += textwrap.wrap(meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _config(arguments: argparse.Namespace) -> StrictConfig:
    config_type = (
        load_stage_file(Path(arguments.file)).Config
        if arguments.stage == "stage"
        else KINDS[arguments.stage].config_type
    )
    values = {word for word in arguments.words if _is_value(word, config_type)}
    files = [Path(word) for word in arguments.words if word not in values and _is_file(word)]
    overrides: list[str | Given] = [word for word in arguments.words if word in values]
    bare = [word for word in arguments.words if word not in values and not _is_file(word)]
    if arguments.stage == "prepare":
        overrides += _prepare_words(bare, arguments.synthetic)
    elif arguments.stage == "embed" and len(bare) == 2 and bare[0] == "search":
        overrides.append(_bare("query", bare[1]))
    elif bare:
        raise ConfigError(f"{bare[0]!r} is neither a .yaml file nor section.key=value")
    return load_config(config_type, files, overrides)


def _is_value(word: str, config_type: type[StrictConfig]) -> bool:
    """Whether it is `key=value`, and not the path of something that has such a name."""
    key, separator, _ = word.partition("=")
    is_known = key.partition(".")[0] in config_type.model_fields
    return bool(separator) and (is_known or not Path(word).exists())


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) and not Path(word).is_dir()


def _prepare_words(bare: list[str], synthetic: str | None) -> list[Given]:
    """`mae prepare SOURCE OUT`, `--synthetic shapes OUT`, `index TARS` and such as key=value."""
    if bare and bare[0] in ("index", "stats") and not synthetic:
        return [_bare("existing", bare[0]), *_prepare_words(bare[1:], "")]
    keys = ["source", "output"] if synthetic is None else ["output"]
    if len(bare) > len(keys):
        raise ConfigError(f"too many words: {' '.join(bare)}; expected {' '.join(keys).upper()}")
    given = [_bare(key, word) for key, word in zip(keys, bare, strict=False)]
    return [*given, *([_bare("synthetic", synthetic)] if synthetic else [])]


def _bare(key: str, word: str) -> Given:
    """A word without `key=` is taken as it was typed."""
    if not word:
        raise ConfigError(f"{key}: is empty")
    return Given(key, word, "command line")


def _tell(error: BaseException, *, debug: bool) -> int:
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
    told = tell(error)
    hint = "" if debug or told.exit_code != 1 else "; --debug shows where"
    for line in f"{told.message}{hint}".splitlines():
        print(f"{told.title}: {line}", file=sys.stderr)
    return told.exit_code


if __name__ == "__main__":
    sys.exit(main())
