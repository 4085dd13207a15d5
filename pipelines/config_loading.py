"""How YAML files, the environment and `key=value` become one config.

Imports no torch, Ray or MLflow: a mistake in a config is reported within a second.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from mae_core.config import StrictConfig
from pipelines.config import ConfigError
from pipelines.config_fields import describe, section

ENVIRONMENT_PREFIX = "MAE__"
ConfigT = TypeVar("ConfigT", bound=StrictConfig)


def load_config(
    config_type: type[ConfigT],
    files: Iterable[Path],
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> ConfigT:
    """Merge YAML files left to right, then MAE__SECTION__KEY, then `section.key=value`.

    Raises:
        ConfigError: names file, line and key of each mistake, and the nearest valid name.
    """
    return load_with_origins(config_type, files, overrides, environment)[0]


def load_with_origins(
    config_type: type[ConfigT],
    files: Iterable[Path],
    overrides: Iterable[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> tuple[ConfigT, dict[str, str]]:
    """As `load_config`, and where each value that is no default was written, by dotted key."""
    raw: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in files:
        values, lines = _read_yaml(file)
        raw = _merge(raw, values)
        origins |= {key: f"{file}:{line}" for key, line in lines.items()}
    for name, text in sorted(environment.items()):
        keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        # One environment serves every stage: what another stage reads is not this one's mistake.
        if name.startswith(ENVIRONMENT_PREFIX) and keys[0] in config_type.model_fields:
            value = parse_value(text)
            raw = _merge(raw, _nest(keys, value))
            origins |= dict.fromkeys(_keys(".".join(keys), value), f"environment {name}")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r} is neither a YAML file nor section.key=value")
        value = parse_value(text)
        raw = _merge(raw, _nest(key.split("."), value))
        origins |= dict.fromkeys(_keys(key, value), "command line")
    try:
        return config_type.model_validate(raw), origins
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_explain(config_type, dict(e), origins) for e in error.errors())
        ) from error


def _keys(key: str, value: Any) -> Iterator[str]:
    """The key, and those below it."""
    yield key
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _keys(f"{key}.{name}", below)


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The file's values, and the line of each dotted key."""
    try:
        text = file.read_text()
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        nearest = difflib.get_close_matches(
            str(file), map(str, file.parent.glob("*.yaml")), n=1, cutoff=0.0
        )
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ConfigError(f"{file}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: {' '.join(str(error).split())}") from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: holds no `section: ...` at its top level")
    return values, dict(_lines(node))


def _lines(node: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, f"{name}.")


def parse_value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # such as {000000..000099}.tar
        return text


def _nest(keys: list[str], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = _merge(old, value) if both and isinstance(old, dict) else value
    return merged


def _explain(
    config_type: type[StrictConfig], error: dict[str, Any], origins: dict[str, str]
) -> str:
    """One line for a person: where, what, the nearest valid name."""
    parts = [str(part) for part in error["loc"] if isinstance(part, str)]
    parts = [part for part in parts if part not in {"str", "tuple[str, ...]", "constrained-str"}]
    key = ".".join(parts)
    where = next(
        (
            origins[prefix]
            for prefix in (".".join(parts[:n]) for n in range(len(parts), 0, -1))
            if prefix in origins
        ),
        "",
    )
    place = " ".join(filter(None, [where, key])) or "config"
    if error["type"] == "extra_forbidden":
        names = list(section(config_type, parts[:-1]).model_fields)
        everywhere = {field.rsplit(".", 1)[-1]: field for field, *_ in describe(config_type)}
        near = difflib.get_close_matches(parts[-1], names, n=1, cutoff=0.4)
        in_section = [".".join([*parts[:-1], *near])] if near else []
        elsewhere = [
            everywhere[name] for name in difflib.get_close_matches(parts[-1], everywhere, n=1)
        ]
        # Spelt right, in the wrong section: that beats a likeness.
        exact = parts[-1] in everywhere
        nearest = elsewhere + in_section if exact else in_section + elsewhere
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(names)}"
        return f"{place}: no such key; {hint}"
    if error["type"] == "missing":
        needed = [name for name, _, default, _ in describe(config_type) if default == "needed"]
        name = next((n for n in needed if n == key or n.startswith(f"{key}.")), key)
        return f"{name}: is needed; give it in a file or as {name}=..."
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    shown = f", not {given!r}" if isinstance(given, str | int | float | bool) else ""
    return f"{place}: {message}{shown}"
