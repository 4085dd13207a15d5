"""Files that README, CONTRIBUTING and the pages of docs/ name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in ROOT.glob("docs/**/*.md") if page.name != "changelog.md"),
]
NAMED = re.compile(
    r"(?<![\w/])((?:pipelines|mae_core|infra|benchmarks|tests|configs|docs)/[\w./*{},-]*[\w*}/])"
)
MADE_LATER = {"infra/.env"}  # by the reader; git ignores it


def named_files(text: str) -> list[str]:
    """Return the paths that the text names, without patterns and what the reader makes."""
    names = {name for name in NAMED.findall(text) if not re.search(r"[{*]", name)}
    return sorted(names - MADE_LATER)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    missing = [name for name in named_files(page.read_text()) if not (ROOT / name).exists()]
    assert missing == []


def test_the_architecture_page_names_what_its_files_define() -> None:
    page = (ROOT / "docs/concepts/architecture.md").read_text()
    rows = re.findall(r"^\| \d+ \| `(\S+\.py)` \| `(?:\w+\.)?(\w+)` \|", page, re.MULTILINE)
    assert len(rows) == 13
    for path, name in rows:
        assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), (
            name
        )
