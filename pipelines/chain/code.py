"""Compute digests of a stage's code for the cache, ignoring comments, layout and docstrings.

A module counts as its unparsed syntax tree without docstrings. It includes the modules that it
imports from `mae_core` and from the packages that read, pack and tune, because they compute the
numbers. Code that starts, logs and stores (the rest of `pipelines`, and `infra`) does not count
unless a stage names it.

Parsing all modules of a pipeline takes half a second. So `mae run` keeps what it has parsed in a
file, by the hash of each source's bytes: what the file says can be missing, but never out of date.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from infra import storage
from infra.own_files import read_or_none
from pipelines.job import ROOT

COMPUTING_PACKAGES = ("mae_core", "pipelines.reading", "pipelines.packing", "pipelines.downstream")


class Parsed(NamedTuple):
    """What counts of a source file."""

    digest: str
    imports: list[tuple[str, str]]
    """What it imports, by a longer and a shorter name: of `a.b` and `a`, either can be a module."""


class ParsedFile(NamedTuple):
    """The file in which parsed sources are kept."""

    rules: str  # how they were parsed
    sources: dict[str, Parsed]  # by the SHA-256 of the source's bytes


_parsed: dict[str, Parsed] = {}
_num_kept: dict[str, int] = {}  # number of sources in each file that was read or written


def recall(uri: str) -> None:
    """Take over what an earlier process parsed by the same rules, if the file is there."""
    kept = read_or_none(uri, ParsedFile, "the sources are parsed again")
    if kept is not None and kept.rules == _rules():
        _parsed.update(kept.sources)
        _num_kept[uri] = len(_parsed)


def remember(uri: str) -> None:
    """Write what was parsed for later processes, unless the file has all of it."""
    if len(_parsed) != _num_kept.get(uri, 0):
        kept = ParsedFile(_rules(), dict(sorted(_parsed.items())))
        storage.write_bytes(uri, json.dumps(kept).encode())
        _num_kept[uri] = len(_parsed)


@lru_cache(maxsize=1)
def _rules() -> str:
    """Return a digest of what decides how a source is parsed: this file, and Python's version."""
    return _sha256(Path(__file__).read_bytes() + sys.version.encode())


def code_digests(modules: Iterable[str | Path]) -> dict[str, str]:
    """Return a digest for each module or file, including everything that it computes with.

    Raises:
        FileNotFoundError, SyntaxError: From Python, unchanged.
    """
    waiting = list(modules)
    found: dict[str, str] = {}
    while waiting:
        module = waiting.pop()
        name = module.name if isinstance(module, Path) else module
        if name in found:
            continue
        file = module if isinstance(module, Path) else _file_of(module)
        parsed = _parse(file)
        found[name] = parsed.digest
        waiting += [name for name in _computing(parsed.imports) if name not in found]
    return dict(sorted(found.items()))


def _file_of(module: str) -> Path:
    place = ROOT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _parse(file: Path) -> Parsed:
    source = file.read_bytes()
    key = _sha256(source)
    if key not in _parsed:
        tree = ast.parse(source, filename=str(file))
        imports = sorted(set(_imports(tree)))
        _parsed[key] = Parsed(source_digest(tree), imports)
    return _parsed[key]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def source_digest(tree: ast.Module) -> str:
    """Return a digest that is equal for sources differing only in comments, layout, docstrings."""
    # Not ast.dump, whose format changes from one Python version to the next.
    return hashlib.sha256(ast.unparse(_WithoutDocstrings().visit(tree)).encode()).hexdigest()[:16]


class _WithoutDocstrings(ast.NodeTransformer):
    """Removes strings that are statements, which only people read."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [part for part in body if not _is_text(part)]
            is_empty = not kept and not isinstance(node, ast.Module)
            node.body = [ast.Pass()] if is_empty else kept  # type: ignore[attr-defined]
        return node


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield what is imported from our packages, as `Parsed.imports` describes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if _is_computing(inner := f"{node.module}.{alias.name}"):
                    yield inner, node.module
        elif isinstance(node, ast.Import):
            yield from ((x.name, x.name) for x in node.names if _is_computing(x.name))


def _computing(imports: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield the modules that are meant, as far as they compute."""
    for inner, outer in imports:
        if _file_of(inner).is_file():
            yield inner
        elif _is_computing(outer) and _file_of(outer).is_file():
            yield outer


def _is_computing(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{package}." for package in COMPUTING_PACKAGES))
