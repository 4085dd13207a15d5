"""Merge YAML files, the environment and `key=value` into one config.

Imports no torch, Ray or MLflow, so a mistake in a config is reported within a second.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from infra.typed_text import NULLS, Word, read_word, typed
from infra.yaml_files import Plain, YamlFile, YamlFileError, read_yaml
from mae_core.config import StrictConfig
from pipelines.config.fields import NEAR, annotation_of, describe, did_you_mean, section
from pipelines.outcome import ConfigError

ENVIRONMENT_PREFIX = "MAE__"
MAX_SHOWN = 120  # characters of a value shown in a message
ConfigT = TypeVar("ConfigT", bound=StrictConfig)


class Given(NamedTuple):
    """A value that is not from a config file."""

    key: str
    """Dotted key."""
    value: Any
    """A `Word` is parsed according to its field; other text is taken as it is."""
    origin: str
    """Where the value was given, for messages."""


def load_config(
    config_type: type[ConfigT],
    files: Iterable[Path],
    overrides: Iterable[str | Given] = (),
    environment: Mapping[str, str] = os.environ,
) -> ConfigT:
    """Merge YAML files left to right, then MAE__SECTION__KEY, then `section.key=value`.

    Raises:
        ConfigError: Names file, line and key of each mistake, and the most similar valid name.
    """
    return load_with_origins(config_type, files, overrides, environment)[0]


def load_with_origins(
    config_type: type[ConfigT],
    files: Iterable[Path],
    overrides: Iterable[str | Given] = (),
    environment: Mapping[str, str] = os.environ,
) -> tuple[ConfigT, dict[str, str]]:
    """Load as `load_config`, and map the dotted keys of non-default values to their origins."""
    raw: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file in files:
        values, lines = read_config_file(file)
        raw = _merge(raw, values)
        origins |= {key: f"{file}:{line}" for key, line in lines.items()}
    given = [*_of_environment(config_type, environment), *map(_of_word, overrides)]
    for key, value, origin in given:
        if isinstance(value, Word):
            value = _read(config_type, key, value, origin)
        raw = _merge(raw, _nest(key.split("."), value))
        origins |= dict.fromkeys(_keys(key, value), origin)
    try:
        return config_type.model_validate(typed(config_type, raw)), origins
    except YamlFileError as error:
        raise ConfigError(str(error)) from error
    except ValidationError as error:
        raise ConfigError(
            "\n".join(_explain(config_type, dict(e), origins) for e in error.errors())
        ) from error


def _of_environment(
    config_type: type[StrictConfig], environment: Mapping[str, str]
) -> Iterator[Given]:
    for name, text in sorted(environment.items()):
        keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        # One environment serves all stages, so keys of another stage are not a mistake here.
        if name.startswith(ENVIRONMENT_PREFIX) and keys[0] in config_type.model_fields:
            yield Given(".".join(keys), Word(text), f"environment {name}")


def _of_word(word: str | Given) -> Given:
    if isinstance(word, Given):
        return word
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise ConfigError(f"{word!r} is neither a YAML file nor section.key=value")
    return Given(key, Word(text), "command line")


def _read(config_type: type[StrictConfig], key: str, text: Word, origin: str) -> Any:
    try:
        return read_word(annotation_of(config_type, key.split(".")), text)
    except YamlFileError as error:
        raise ConfigError(f"{origin} {key}: {error}") from error


def _keys(key: str, value: Any) -> Iterator[str]:
    """Yield the key and all keys below it."""
    yield key
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _keys(f"{key}.{name}", below)


def read_config_file(file: Path) -> YamlFile:
    """Read the untyped sections of a YAML file, and the line of each dotted key.

    Raises:
        ConfigError: There is no such file, or it is not a config; names the line.
    """
    try:
        values, lines = read_yaml(file)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file{near_file(file)}") from None
    except YamlFileError as error:
        raise ConfigError(str(error)) from error
    if isinstance(values, Plain) and values in NULLS:
        return YamlFile({}, {})
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: has no `section: ...` at its top level")
    return YamlFile(values, lines)


def near_file(file: Path) -> str:
    near = did_you_mean(file.name, (x.name for x in file.parent.glob("*.yaml")))
    return near.replace("mean ", f"mean {file.parent}/") if file.parent != Path() else near


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
    """Return one line for a person: the place, the mistake, the most similar valid name."""
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
        near = difflib.get_close_matches(parts[-1], names, n=1, cutoff=NEAR)
        in_section = [".".join([*parts[:-1], *near])] if near else []
        elsewhere = [
            everywhere[name] for name in difflib.get_close_matches(parts[-1], everywhere, n=1)
        ]
        # The name is valid in another section, which is a better guess than a similar name.
        exact = parts[-1] in everywhere
        nearest = elsewhere + in_section if exact else in_section + elsewhere
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(names)}"
        return f"{place}: no such key; {hint}"
    if error["type"] == "missing":
        needed = [name for name, _, default, _ in describe(config_type) if default == "needed"]
        name = next((n for n in needed if n == key or n.startswith(f"{key}.")), key)
        return f"{name}: is needed; give it in a file or as {name}=..."
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}{shown(error.get('input'))}"


def shown(given: object) -> str:
    """Return the end of a message that shows the value, if it fits into a line."""
    if given is None:
        return "; it is empty"
    if isinstance(given, dict) and len(given) == 1 and None in given.values():
        return f"; put quotes around {{{next(iter(given))}}}, which YAML reads as a section"
    if not isinstance(given, str | int | float | bool):
        return ""
    text = repr(given)
    return f", not {text}" if len(text) <= MAX_SHOWN else f", not {text[:MAX_SHOWN]}..."
