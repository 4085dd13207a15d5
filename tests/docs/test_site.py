"""The documentation builds as a site without a warning and loads nothing from other hosts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOREIGN = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|(?:url\(|@import)\s*["']?(?:https?:)?//""",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs-site` does: a warning, such as a broken link, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "-n", "-W", "--keep-going"]
    built = subprocess.run(
        [*command, "-d", str(folder / "doctrees"), "docs", str(folder / "html")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert built.stderr == ""
    return folder / "html"


def test_every_page_and_the_readme_are_on_the_site(site: Path) -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        html = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert html.exists(), f"{page} is not on the site"
    assert "Train on your own images" in (site / "index.html").read_text()


def test_the_menu_leads_to_guides_and_reference(site: Path) -> None:
    menu = (site / "index.html").read_text()
    for page in ("guides/data.html", "reference/pretrain.html", "adr/README.html"):
        assert f'href="{page}"' in menu


def test_the_search_knows_a_field_of_the_reference(site: Path) -> None:
    index = (site / "searchindex.js").read_text().removeprefix("Search.setIndex(").rstrip(")\n;")
    assert "mask_ratio" in json.loads(index)["terms"]
    assert 'action="search.html"' in (site / "index.html").read_text()


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    loaded = {
        str(path.relative_to(site)): FOREIGN.findall(path.read_text())
        for path in site.rglob("*")
        if path.suffix in {".html", ".css"}
    }
    assert {path: found for path, found in loaded.items() if found} == {}
