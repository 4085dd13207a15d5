"""Read YAML strictly: no duplicate keys, bounded work, and unquoted text as written.

YAML guesses the type of an unquoted value: 2024 is a number, `no` is false, 010 is 8. Here it stays
text until its field is known (infra/typed_text.py), so `name: 2024` is a name and `seed: 2024` is a
number.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

MAX_BYTES = 2**20  # PyYAML parses about 0.5 MB per second
MAX_DEPTH = 50
MAX_VALUES = 100_000  # after aliases are expanded: ten short lines can stand for billions

_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{x}" for x in ("null", "bool", "int", "float", "str", "timestamp", "value")}
_COMMENT_WITHOUT_SPACE = re.compile(r"[ \t]+#[^\s#].*")


class YamlFileError(ValueError):
    """The file can't be read as a config; the message has the file, the line and the problem."""


class Plain(str):
    """Unquoted text, whose field decides what it means.

    `comment` is the rest of its line if that might be meant as a part of it: ` #2`.
    """

    comment: str = ""
    place: str = ""


class YamlFile(NamedTuple):
    values: Any
    """Dicts, lists, `Plain` for unquoted text and `str` for quoted text."""
    lines: dict[str, int]
    """The line of each key and list item, by dotted name: `optim.epochs`, `schedules.0`."""


class _Entry(NamedTuple):
    line: int
    value: Any


class _MistakeError(Exception):
    def __init__(self, node: yaml.Node, text: str) -> None:
        super().__init__(text)
        self.line = node.start_mark.line + 1


def read_yaml(file: Path) -> YamlFile:
    """Read a file that holds one YAML document.

    Raises:
        FileNotFoundError: There is no such file.
        YamlFileError: It can't be read, is not YAML, repeats a key, or is far too large.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise YamlFileError(f"{file}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise YamlFileError(f"{file}: is larger than {MAX_BYTES // 2**20} MiB; is it a config?")
    return _read(data, str(file))


def read_yaml_text(text: str) -> Any:
    """Parse the values in a text, as `read_yaml` does.

    Raises:
        YamlFileError: For the same reasons as `read_yaml`.
    """
    return _read(text.encode(errors="surrogateescape"), "").values


def _read(data: bytes, name: str) -> YamlFile:
    try:
        loader = _Loader(data)
        try:
            node = loader.get_single_node()
            entry = _Tree(loader, name).build(node, 0) if node is not None else Plain()
        finally:
            loader.dispose()
    except _MistakeError as mistake:
        raise YamlFileError(f"{_place(name, mistake.line)}{mistake}") from mistake
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        told = " ".join(filter(None, [error.context, error.problem]))
        if error.problem is not None and "'\\t'" in error.problem:
            told = "is indented with a tab, which YAML does not allow: use spaces"
        place = _place(name, mark.line + 1 if mark is not None else None)
        raise YamlFileError(f"{place}{told}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise YamlFileError(_place(name, None) + " ".join(str(error).split())) from error
    return YamlFile(_values(entry), dict(_lines(entry)))


def _place(name: str, line: int | None) -> str:
    """Return the start of a message; a text that is not a file has no line to name."""
    if not name:
        return ""
    return f"{name}: " if line is None else f"{name}:{line} "


class _Loader(yaml.SafeLoader):
    """Composes nodes, which is recursive, up to a limited depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            event = cast(Any, self).peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"is nested more than {MAX_DEPTH} levels deep",
                problem_mark=event.start_mark,
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Tree:
    """Converts composed nodes to dicts whose values know their lines, lists and text."""

    def __init__(self, loader: _Loader, name: str) -> None:
        self._loader: Any = loader  # some of its methods are untyped
        self._name = name
        self._count = 0
        self._open: set[int] = set()  # nodes that are being built

    def build(self, node: yaml.Node, depth: int) -> Any:
        self._count += 1
        if self._count > MAX_VALUES:
            raise _MistakeError(
                node, f"stands for more than {MAX_VALUES} values, aliases written out"
            )
        if depth > MAX_DEPTH:
            raise _MistakeError(node, f"is nested more than {MAX_DEPTH} levels deep by its aliases")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._open:
            raise _MistakeError(node, "has an alias of itself within")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                self._check_tag(node, {f"{_TAG}seq"})
                return [_Entry(_line(x), self.build(x, depth + 1)) for x in node.value]
            self._check_tag(node, {f"{_TAG}map"})
            return self._mapping(node, depth)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.Node, depth: int) -> dict[str, _Entry]:
        own: dict[str, _Entry] = {}
        merged: dict[str, _Entry] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_TAG}merge":
                merged = {**self._merged(value_node, depth), **merged}
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise _MistakeError(key_node, "has a list or a section where a key should be")
            key, line = _text(key_node), _line(key_node)
            if key in own:
                raise _MistakeError(key_node, f"{key}: is in line {own[key].line} already")
            own[key] = _Entry(line, self.build(value_node, depth + 1))
        return {**merged, **own}

    def _merged(self, node: yaml.Node, depth: int) -> dict[str, _Entry]:
        """Return what `<<` merges in: of several sections, the first that has a key wins."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        found: dict[str, _Entry] = {}
        for source in sources:
            section = self.build(source, depth + 1)
            if not isinstance(section, dict):
                raise _MistakeError(node, "<<: needs a section, or a list of sections")
            found = {**section, **found}
        return found

    def _scalar(self, node: yaml.ScalarNode) -> str:
        self._check_tag(node, _SCALARS)
        text = _text(node)
        guessed = self._loader.resolve(yaml.ScalarNode, node.value, (True, False))
        if node.style is not None or (node.tag == f"{_TAG}str" and guessed != node.tag):
            return text  # in quotes, a block, or !!str
        plain = Plain(text)
        plain.place = f"{self._name}:{_line(node)}"
        if found := _COMMENT_WITHOUT_SPACE.match(self._rest_of_line(node)):
            plain.comment = found.group()
        return plain

    def _rest_of_line(self, node: yaml.Node) -> str:
        mark = node.end_mark
        if mark.buffer is None:
            return ""
        return mark.buffer[mark.pointer :].partition("\n")[0]

    def _check_tag(self, node: yaml.Node, known: set[str]) -> None:
        if node.tag not in known:
            tag = node.tag.replace(_TAG, "!!")
            raise _MistakeError(node, f"has the tag {tag}, which a config can't have")


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _text(node: yaml.ScalarNode) -> str:
    """Join surrogates: JSON writes characters beyond 16 bits as two escapes, YAML keeps both."""
    text: str = node.value
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _values(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _values(entry.value) for key, entry in tree.items()}
    if isinstance(tree, list):
        return [_values(entry.value) for entry in tree]
    return tree


def _lines(tree: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree)
    if not isinstance(tree, dict | list):
        return
    for key, entry in entries:
        yield f"{prefix}{key}", entry.line
        yield from _lines(entry.value, f"{prefix}{key}.")
