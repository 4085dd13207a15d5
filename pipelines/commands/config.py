"""`mae config`: show where each value of a config comes from, and JSON Schema for editors.

    mae config show STAGE [FILE.yaml ...] [section.key=value ...] [--json]
    mae config schema [STAGE]

STAGE is a stage of `mae --help`, or the .py file of a stage of your own. `schema` also accepts
`chain`, `cluster` and `schedules`, for files of those kinds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from infra.cluster import ClusterConfig
from infra.redaction import redact
from mae_core.config import StrictConfig
from pipelines.chain.config import ChainConfig, load_stage_file
from pipelines.chain.kinds import KINDS
from pipelines.config.fields import did_you_mean, flatten
from pipelines.config.loading import load_with_origins
from pipelines.outcome import ConfigError
from pipelines.schedule.config import ScheduleFile

OTHER_FILES: dict[str, type[BaseModel]] = {
    "chain": ChainConfig,
    "cluster": ClusterConfig,
    "schedules": ScheduleFile,
}
# A validator accepts one number for both sides, which pydantic's schema does not show.
SQUARES = ("img_size",)


def command(words: Sequence[str]) -> int:
    """Run `mae config WORDS`; return the exit code."""
    arguments = _parse(words)
    if arguments.action == "show":
        text = _show(arguments.stage, arguments.words, as_json=arguments.json)
    else:
        text = json.dumps(_schema(arguments.stage), indent=2)
    sys.stdout.write(f"{redact(text)}\n")
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mae config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="show | schema")
    show = actions.add_parser("show", help="show every value and where it was set")
    show.add_argument("stage", metavar="STAGE")
    show.add_argument("words", nargs="*", metavar="FILE.yaml | section.key=value")
    show.add_argument("--json", action="store_true", help='{"key": {"value": ..., "origin": ...}}')
    schema = actions.add_parser("schema", help="print the JSON Schema of one or all kinds of file")
    schema.add_argument("stage", nargs="?", metavar="STAGE")
    for action in (show, schema):
        action.add_argument("--debug", action="store_true", help="show tracebacks")
    # Options may be anywhere among the words, which argparse does not allow.
    return parser.parse_args(sorted(words, key=lambda word: word.startswith("--")))


def _show(stage: str, words: Sequence[str], *, as_json: bool) -> str:
    files = [Path(word) for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    config, origins = load_with_origins(_stage_type(stage), files, overrides)
    values = flatten(config)
    places = {key: origins.get(key, "default") for key in values}
    if as_json:
        typed = _typed(config.model_dump(mode="json"))
        return json.dumps(
            {key: {"value": typed[key], "origin": places[key]} for key in values}, indent=2
        )
    key_width = max(map(len, values))
    # A long value shifts the origin on its own line only.
    value_width = min(max(map(len, values.values())), 48)
    return "\n".join(
        f"{key:{key_width}}  {value:{value_width}}  {places[key]}" for key, value in values.items()
    )


def _typed(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted keys, with values as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _typed(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _stage_type(stage: str) -> type[StrictConfig]:
    if stage.endswith(".py"):
        return load_stage_file(Path(stage)).Config
    if stage not in KINDS:
        raise ConfigError(_unknown(stage, [*KINDS]))
    return KINDS[stage].config_type


def _unknown(stage: str, names: list[str]) -> str:
    near = did_you_mean(stage, names)
    return f"there is no stage {stage!r}{near or ';'} There are: {', '.join(names)}"


def _schema(stage: str | None) -> dict[str, Any]:
    """Return the schema of one kind of file, or of all stages' files if none is named."""
    types: list[type[BaseModel]] = [kind.config_type for kind in KINDS.values()]
    if stage is not None:
        if stage not in {*KINDS, *OTHER_FILES} and not stage.endswith(".py"):
            raise ConfigError(_unknown(stage, [*KINDS, *OTHER_FILES]))
        types = [OTHER_FILES[stage] if stage in OTHER_FILES else _stage_type(stage)]
    references, shared = models_json_schema([(x, "validation") for x in types])
    of_each = [references[(x, "validation")] for x in types]
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"mae {stage or 'stages'}",
        **(of_each[0] if len(of_each) == 1 else {"anyOf": of_each}),
        **shared,
    }
    return {**schema, "$defs": _definitions(schema["$defs"], is_partial=stage not in OTHER_FILES)}


def _definitions(definitions: dict[str, Any], *, is_partial: bool) -> dict[str, Any]:
    """Adapt definitions to files; with `is_partial` the command line may supply the rest."""
    changed = {}
    for name, definition in definitions.items():
        one = dict(definition)
        if is_partial:
            one.pop("required", None)
        for field in set(SQUARES) & set(one.get("properties", {})):
            given = one["properties"][field]
            # The field's description stays outside, where editors look for it.
            about = {key: given[key] for key in ("description", "default") if key in given}
            number = {"type": "integer", "exclusiveMinimum": 0}
            one["properties"] = {
                **one["properties"],
                field: {**about, "anyOf": [number, given]},
            }
        changed[name] = one
    return changed
