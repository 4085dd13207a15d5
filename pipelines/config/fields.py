"""Describe the fields of a config model: names, types, defaults, meanings, and values as text.

Imports no torch, Ray or MLflow.
"""

import difflib
import json
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from mae_core.config import StrictConfig

NEAR = 0.6  # smallest similarity at which one name may be a misspelling of the other
_WORDS: dict[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "true or false",
    types.NoneType: "null",
    Any: "any value",
}


def section(config_type: type[StrictConfig], parts: list[str]) -> type[BaseModel]:
    """Return the model at these keys, looking through `dict[str, Model]` and `Model | None`."""
    found: Any = config_type
    for part in parts:
        if not hasattr(found, "model_fields"):  # `part` is a key of a dict
            found = get_args(found)[1]
            continue
        found = found.model_fields[part].annotation
        models = [x for x in get_args(found) if hasattr(x, "model_fields")]
        if models and get_origin(found) is not dict:
            found = models[0]
    assert issubclass(found, BaseModel)
    return found


def annotation_of(config_type: type[StrictConfig], keys: Sequence[str]) -> Any:
    """Return the type of the field at these keys; Any if there is none."""
    found: Any = config_type
    for key in keys:
        options = [found, *get_args(found)]
        models = [x for x in options if hasattr(x, "model_fields")]
        sections = [x for x in options if get_origin(x) is dict]
        if get_origin(found) is not dict and models:
            field = models[0].model_fields.get(key)
            found = Any if field is None else field.annotation
        else:
            found = get_args(sections[0])[1] if sections else Any
    return found


def did_you_mean(name: str, names: Iterable[str], cutoff: float = NEAR) -> str:
    """Return the end of a message that suggests the most similar name; "" if none is similar."""
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def describe(
    config_type: type[StrictConfig], prefix: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (dotted key, type, default, meaning) of each field, for --help and the reference."""
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
            type_in_words(annotation),
            default,
            " ".join((field.description or "").split()),
        )


def flatten(config: StrictConfig) -> dict[str, str]:
    """Map dotted keys to values as text, the form of params in MLflow."""
    return dict(_flat_items(config.model_dump(mode="json")))


def _flat_items(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def type_in_words(annotation: Any) -> str:
    """Describe a field's type to a reader who does not know Python: `text or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_in_words(arguments[0])
    if _is_union(annotation):
        return _listed([word for x in arguments for word in _choices(x)])
    if origin is Literal:
        return _listed(_choices(annotation))
    if origin is dict:
        return f"section: {type_in_words(arguments[0])} to {type_in_words(arguments[1])}"
    if origin is not None and arguments:
        count = "" if origin is not tuple or Ellipsis in arguments else f"{len(arguments)} "
        of_items = type_in_words(arguments[0])
        return f"list of {count}{of_items}{'s' if arguments[0] in _WORDS else ''}"
    if hasattr(annotation, "model_fields"):
        return "section"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def choices_of(annotation: Any) -> list[str]:
    """List the words that a field accepts; empty if it also accepts other values."""
    options = get_args(annotation) if _is_union(annotation) else [annotation]
    if annotation is bool:
        return ["true", "false"]
    if not all(get_origin(x) is Literal or x is types.NoneType for x in options):
        return []
    return [word for x in options for word in _choices(x)]


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [json.dumps(x) if isinstance(x, bool) else str(x) for x in get_args(annotation)]
    return [type_in_words(annotation)]


def _listed(words: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
