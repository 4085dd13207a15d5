"""Parse the words of `mae`: what each stage accepts, its help, and the resulting config.

Imports no torch, Ray, MLflow or numpy, so help and error messages appear at once.
"""

import argparse
import importlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_core.config import StrictConfig
from pipelines.chain.kinds import KINDS
from pipelines.config.fields import describe, did_you_mean, flatten
from pipelines.config.loading import Given, load_config
from pipelines.outcome import ConfigError

# Commands that are not stages, and the module whose `command` takes the words that follow.
COMMANDS = {
    "run": (
        "chain.command",
        "Run a pipeline: only the stages that changed, in parallel where possible.",
    ),
    "plan": ("chain.command", "Show what `run` would do, and why."),
    "schedule": ("schedule.command", "Run pipelines at set times, or when there is new data."),
    "doctor": ("doctor.command", "Check this machine, the store, MLflow and Ray."),
    "checkpoint": (
        "commands.checkpoint",
        "Describe weights, and convert them to the formats of others.",
    ),
    "masks": ("commands.masks", "Draw what each kind of mask leaves of a picture."),
    "config": ("commands.config", "Show where each value of a config comes from; its JSON Schema."),
    "completion": (
        "commands.completion",
        "Print a script for bash or zsh that completes stages and keys with Tab.",
    ),
}
DEFAULT_USAGE = "mae {stage} [FILE.yaml ...] [section.key=value ...] [--fresh] [--debug]"
USAGES = {
    "prepare": """mae prepare PICTURES OUT [key=value ...]     pack a folder or a list of images
       mae prepare --synthetic shapes OUT [...]     draw a small labelled data set
       mae prepare index TARS [key=value ...]       write a manifest beside existing tars
       mae prepare stats TARS [key=value ...]       the same, with channel statistics
       mae prepare FILE.yaml [key=value ...]        read the settings from a file""",
    "embed": """mae embed init_from=CHECKPOINT data=SHARDS [key=value ...]
       mae embed search IMAGE init_from=CHECKPOINT data=SHARDS [key=value ...]
       mae embed FILE.yaml [key=value ...]""",
}


def stage_type(arguments: argparse.Namespace) -> type[StrictConfig]:
    """Return the config model of the stage that the words name."""
    if arguments.stage == "stage":
        return load_own_stage(arguments.file).Config
    return KINDS[arguments.stage].config_type


def load_own_stage(file: str) -> Any:
    """Load the module of a stage that is a .py file."""
    # Imported by name, because only these stages need the code that reads pipelines.
    return importlib.import_module("pipelines.chain.config").load_stage_file(Path(file))


OPTIONS = ("--fresh", "--debug", "--help", "--synthetic")
STAGE_WORDS = (*KINDS, *COMMANDS, "stage")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words; options may be anywhere among them, which argparse does not allow here."""
    parser = make_parser()
    first = words[0] if words else ""
    if first and not first.startswith("-") and first not in STAGE_WORDS:
        near = did_you_mean(first, STAGE_WORDS) or ";"
        parser.error(f"there is no stage {first!r}{near} `mae` lists them")
    arguments, rest = parser.parse_known_args(words)
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        hint = did_you_mean(unknown[0], OPTIONS) or f"; `mae {arguments.stage} --help` lists them"
        parser.error(f"unknown option {unknown[0]}{hint}")
    arguments.words = [*arguments.words, *rest]
    return arguments


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of all stages, with a line of help for each."""
    parser = argparse.ArgumentParser(
        prog="mae",
        description="Masked-autoencoder pretraining on WebDataset shards.",
        epilog="`mae STAGE --help` shows what a stage accepts.",
        formatter_class=_OneLineEach,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    _add_stages(stages)
    own = stages.add_parser("stage", help="Run a stage of your own: a .py file.")
    own.add_argument(
        "file", metavar="FILE.py", help="with Config and run, see docs/guides/chain.md"
    )
    _add_stage_arguments(own)
    for name, (_, summary) in COMMANDS.items():
        stages.add_parser(name, help=summary)
    return parser


class _OneLineEach(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=18, width=120)


def _add_stages(stages: Any) -> None:
    for name, kind in KINDS.items():
        stage = stages.add_parser(
            name,
            usage=USAGES.get(name, DEFAULT_USAGE.format(stage=name)),
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


def _add_stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="FILE.yaml | section.key=value",
        help="files are merged from left to right, then the values are set",
    )
    parser.add_argument("--fresh", action="store_true", help="delete earlier output and start over")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def _fields_help(config_type: type[StrictConfig]) -> str:
    lines = ["fields (key, type, default):"]
    for key, kind, default, meaning in describe(config_type):
        lines.append(f"  {key}  {kind}  [{default}]")
        lines += textwrap.wrap(meaning, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def read_config(arguments: argparse.Namespace) -> StrictConfig:
    """Build the config of the named stage from files, environment and words."""
    config_type = stage_type(arguments)
    values = {word for word in arguments.words if _is_value(word, config_type)}
    files = [Path(word) for word in arguments.words if word not in values and _is_file(word)]
    overrides: list[str | Given] = [word for word in arguments.words if word in values]
    bare = [word for word in arguments.words if word not in values and not _is_file(word)]
    if arguments.stage == "prepare":
        _check_prepare(arguments)
        overrides += _prepare_words(bare, arguments.synthetic)
    elif arguments.stage == "embed" and bare[:1] == ["search"] and len(bare) <= 2:
        if len(bare) == 1:
            raise ConfigError("which image is searched for? mae embed search IMAGE ...")
        overrides.append(_bare("query", bare[1]))
    elif bare:
        raise ConfigError(f"{bare[0]!r} is neither a .yaml file nor section.key=value")
    config = load_config(config_type, files, overrides)
    if arguments.stage == "stage":
        _check_own_folder(config)
    return config


def _check_own_folder(config: StrictConfig) -> None:
    """Refuse `{self}`, which only a pipeline replaces: a stage would write to a folder so named.

    Raises: ConfigError.
    """
    for key, value in flatten(config).items():
        if "{self}" in value:
            raise ConfigError(
                f"{key}={value}: {{self}} is the stage's folder in a pipeline; run alone, the "
                f"stage needs {key}=FOLDER"
            )


def _is_value(word: str, config_type: type[StrictConfig]) -> bool:
    """Return whether a word is `key=value`, and not the path of a file with such a name."""
    key, separator, _ = word.partition("=")
    is_known = key.partition(".")[0] in config_type.model_fields
    return bool(separator) and (is_known or not Path(word).exists())


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) and not Path(word).is_dir()


def _check_prepare(arguments: argparse.Namespace) -> None:
    """Say what `mae prepare` needs where a person typed too little, and not which key is missing.

    Raises: ConfigError.
    """
    if not arguments.words and not arguments.synthetic:
        raise ConfigError("mae prepare PICTURES OUT; mae prepare --help shows the other ways")
    if arguments.words in (["index"], ["stats"]):
        raise ConfigError(f"which tars? mae prepare {arguments.words[0]} TARS")


def _prepare_words(bare: list[str], synthetic: str | None) -> list[Given]:
    """Turn `mae prepare SOURCE OUT`, `--synthetic shapes OUT`, `index TARS` into key=value."""
    if bare and bare[0] in ("index", "stats") and not synthetic:
        return [_bare("existing", bare[0]), *_prepare_words(bare[1:], "")]
    keys = ["source", "output"] if synthetic is None else ["output"]
    if len(bare) > len(keys):
        raise ConfigError(f"too many words: {' '.join(bare)}; expected {' '.join(keys).upper()}")
    given = [_bare(key, word) for key, word in zip(keys, bare, strict=False)]
    return [*given, *([_bare("synthetic", synthetic)] if synthetic else [])]


def _bare(key: str, word: str) -> Given:
    """Take a word without `key=` as it was typed."""
    if not word:
        raise ConfigError(f"{key}: is empty")
    return Given(key, word, "command line")
