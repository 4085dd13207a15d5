"""The reference pages say what the config fields say."""

import importlib.util
from pathlib import Path

GENERATOR = Path(__file__).parents[2] / "docs/reference/generate.py"


def test_reference_pages_are_what_make_docs_writes() -> None:
    spec = importlib.util.spec_from_file_location("generate", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pages = generate.pages()
    assert {path.name for path in pages} >= {"prepare.md", "pretrain.md"}
    for path, text in pages.items():
        assert path.read_text() == text, f"{path} is stale: run `make docs`"
