"""Compute digests of a stage's code for the cache, ignoring comments, layout and docstrings.

A module counts as its unparsed syntax tree without docstrings. It includes the modules that it
imports from `mae_core` and from the packages that read, pack and tune, because they compute the
numbers. Code that starts, logs and stores (the rest of `pipelines`, and `infra`) does not count
unless a stage names it.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from pipelines.job import ROOT

COMPUTING_PACKAGES = ("mae_core", "pipelines.reading", "pipelines.packing", "pipelines.downstream")


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
        digest, imported = _read(file, file.stat().st_mtime_ns)
        found[name] = digest
        waiting += [name for name in imported if name not in found]
    return dict(sorted(found.items()))


def _file_of(module: str) -> Path:
    place = ROOT.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@lru_cache(maxsize=512)
def _read(file: Path, _changed_at_ns: int) -> tuple[str, tuple[str, ...]]:
    tree = ast.parse(file.read_text(), filename=str(file))
    return source_digest(tree), tuple(sorted(set(_computing_imports(tree))))


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


def _computing_imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = _file_of(inner).is_file() if _is_computing(inner) else False
                yield from _computing([inner if is_module else node.module])
        elif isinstance(node, ast.Import):
            yield from _computing(alias.name for alias in node.names)


def _computing(modules: Iterable[str]) -> Iterator[str]:
    return (module for module in modules if _is_computing(module) and _file_of(module).is_file())


def _is_computing(module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{package}." for package in COMPUTING_PACKAGES))
