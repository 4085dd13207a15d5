"""The fields of a config model: names, types, defaults, meanings, and values as text.

Imports no torch, Ray or MLflow.
"""

import json
from collections.abc import Iterator
from typing import Any, Literal, cast, get_args, get_origin

from mae_core.config import StrictConfig


def section(config_type: type[StrictConfig], parts: list[str]) -> type[StrictConfig]:
    """The model below these keys, through `dict[str, Model]` and `Model | None`."""
    found: Any = config_type
    for part in parts:
        if not hasattr(found, "model_fields"):  # `part` is a key of a dict
            found = get_args(found)[1]
            continue
        found = found.model_fields[part].annotation
        models = [x for x in get_args(found) if hasattr(x, "model_fields")]
        if models and get_origin(found) is not dict:
            found = models[0]
    return cast(type[StrictConfig], found)


def describe(
    config_type: type[StrictConfig], prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """(dotted key, type, default, meaning) of every field, for --help and the reference page."""
    for name, field in config_type.model_fields.items():
        annotation: Any = field.annotation
        if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
            yield from describe(annotation, f"{prefix}{name}.")
            continue
        if field.is_required():
            default = "needed"
        else:
            default = json.dumps(field.get_default(call_default_factory=True), default=str)
        yield (
            f"{prefix}{name}",
            _type_name(annotation),
            default,
            " ".join((field.description or "").split()),
        )


def flatten(config: StrictConfig) -> dict[str, str]:
    """Dotted keys to values as text, as MLflow keeps params."""
    return dict(_flat_items(config.model_dump(mode="json")))


def _flat_items(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__name__
    if getattr(annotation, "__origin__", None) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    return str(annotation).replace("NoneType", "None").replace("typing.", "")
