"""Convert text to the type of its config field.

Text from a YAML file, the environment or the command line becomes a string if the field holds text
and a number if it holds a number, whatever YAML would guess: `name=2024`, `source="set #2"`.
"""

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml

from infra.yaml_files import Plain, YamlFileError, read_yaml_text

NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_DECIMAL = re.compile(r"[-+]?[0-9][0-9_]*")
_OTHER_BASE = re.compile(r"[-+]?0(x[0-9a-fA-F_]+|o[0-7_]+|b[01_]+)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
_MAX_DIGITS = 400  # no config value has more
_QUOTES = "'\""


class Word(str):
    """Text from the command line or environment that is not parsed yet: the field decides how."""


class Written:
    """Marks, in `Annotated[Any, Written]`, values that stay as written for a later reader."""


def read_word(annotation: Any, text: str) -> Any:
    """Parse a word as a value for a field of this type; `typed` then converts it to that type.

    `[a, b]` is a list and `{a: b}` a section only if the field can hold one. Quotes around the
    whole word are removed. Everything else is text as it was typed.

    Raises:
        YamlFileError: A section can't be parsed.
    """
    options = list(_options(annotation))
    if Written in options:
        return Word(text)
    of_items = next((o for o in options if _is_sequence(o)), None)
    if of_items is not None and text[:1] == "[" and text[-1:] == "]":
        items = _split(text[1:-1])
        return [read_word(_item_type(of_items, n), item) for n, item in enumerate(items)]
    if text[:1] == "{" and any(_is_mapping(o) or _is_model(o) for o in options):
        return read_yaml_text(text)
    is_quoted = len(text) > 1 and text[0] in _QUOTES and text[-1] == text[0]
    if is_quoted or (Any in options and text[:1] in ("[", "{")):
        try:
            return read_yaml_text(text)
        except YamlFileError:  # for example 'a' and 'b', or a pattern
            return Plain(text)
    return Plain(text)


def typed(annotation: Any, value: Any) -> Any:
    """Convert each `Plain` in a tree of dicts and lists to the type of its field.

    Values that have no place in the type are left for pydantic to refuse.

    Raises:
        YamlFileError: A comment may have been meant as the end of a text.
    """
    options = list(_options(annotation))
    if Written in options:
        return value
    if isinstance(value, Plain):
        return _typed_scalar(options, value)
    if isinstance(value, list):
        of_items = next((o for o in options if _is_sequence(o)), Any)
        return [typed(_item_type(of_items, n), item) for n, item in enumerate(value)]
    if isinstance(value, dict):
        return _typed_section(options, value)
    return value


def _typed_section(options: Sequence[Any], values: Mapping[str, Any]) -> dict[Any, Any]:
    models = [o for o in options if _is_model(o)]
    if models:
        fields = max((m.model_fields for m in models), key=lambda f: len(f.keys() & values.keys()))
        return {
            key: typed(fields[key].annotation if key in fields else Any, value)
            for key, value in values.items()
        }
    of_keys, of_values = next((get_args(o) for o in options if _is_mapping(o)), (Any, Any))
    if of_keys is int and len({_number(key) for key in values}) < len(values):
        raise YamlFileError(f"two of the keys {', '.join(values)} are the same number")
    return {key: typed(of_values, value) for key, value in values.items()}


def _typed_scalar(options: Sequence[Any], text: Plain) -> Any:
    if text in NULLS and (types.NoneType in options or not text):
        return None
    if Any in options:
        return _guess(text)
    literals = [x for o in options if get_origin(o) is Literal for x in get_args(o)]
    if text in literals:
        return str(text)
    if (bool in options or any(isinstance(x, bool) for x in literals)) and text.lower() in _BOOLS:
        return _BOOLS[text.lower()]
    if not {int, float}.isdisjoint(options) or not any(_holds_text(o) for o in options):
        number = _number(text)
        return str(text) if number is None else number
    if str in options and text.comment:
        raise YamlFileError(
            f"{text.place} {str(text)!r} is followed by {text.comment.strip()!r}: put the whole in "
            'quotes if it belongs to it ("..."), or a space after # if it is a comment'
        )
    return str(text)


def _options(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union and of `Annotated`, and `Written` for a marked field."""
    if get_origin(annotation) is Annotated:
        inner, *marks = get_args(annotation)
        if Written in marks:
            yield Written
            return
        yield from _options(inner)
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _options(member)
    else:
        yield annotation


def _is_model(option: Any) -> bool:
    return hasattr(option, "model_fields")


def _is_mapping(option: Any) -> bool:
    origin = get_origin(option)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_sequence(option: Any) -> bool:
    origin = get_origin(option)
    return isinstance(origin, type) and issubclass(origin, tuple | list | set | frozenset)


def _holds_text(option: Any) -> bool:
    """Return whether pydantic should get text for this type: a name, a path, a date."""
    if get_origin(option) is Literal:
        return any(isinstance(x, str) for x in get_args(option))
    return isinstance(option, type) and not (
        option in (bool, types.NoneType)
        or _is_model(option)
        or _is_sequence(option)
        or _is_mapping(option)
        or issubclass(option, Enum)
    )


def _item_type(option: Any, index: int) -> Any:
    arguments = get_args(option)
    if not arguments:
        return Any
    if get_origin(option) is tuple and Ellipsis not in arguments:
        return arguments[min(index, len(arguments) - 1)]
    return arguments[0]


def _number(text: str) -> int | float | None:
    """Parse a decimal number, even with leading zeros; YAML 1.1 reads 010 as 8 and 1:30 as 90."""
    if len(text) > _MAX_DIGITS:
        return None
    digits = text.replace("_", "")
    if _DECIMAL.fullmatch(text):
        return int(digits)
    if _OTHER_BASE.fullmatch(text):
        return int(digits, 0)
    return float(digits) if _FLOAT.fullmatch(text) else None


def _guess(text: str) -> Any:
    """Parse as YAML would, for a field that can hold anything."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # for example an invalid date
        return str(text)


def _split(text: str) -> list[str]:
    """Split at commas, except those inside quotes or brackets."""
    items, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in _QUOTES and not items[-1].strip():
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth == 0:
            items.append("")
            continue
        items[-1] += char
    stripped = [item.strip() for item in items]
    return stripped if stripped[-1] else stripped[:-1]
