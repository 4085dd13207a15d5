"""Build the documentation site with Sphinx: `make docs-site`.

The pages stay plain Markdown that also reads well in the repository. README, CONTRIBUTING and
CHANGELOG lie outside of docs/, so their text is put into the pages that stand for them here.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
IN_ROOT = re.compile(rf"\]\((?:\.\./)+({'|'.join(map(re.escape, PAGES))})")

project = "mae-pipeline"
copyright = "mae-pipeline contributors, Apache-2.0"
extensions = ["myst_parser"]
exclude_patterns = ["**/*.py"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"footer_icons": []}


# Lists of pages that only the site needs; in the repository a reader sees the folder.
LISTS = {"adr/README": "```{toctree}\n:hidden:\n:glob:\n\n0*\n```\n"}


def complete_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the text of README, CONTRIBUTING or CHANGELOG into the page that stands for it."""
    for name, stands_for in PAGES.items():
        if page == stands_for:
            app.env.note_dependency(ROOT / name, docname=page)
            text = LINK.sub(lambda link: f"]({from_docs(link[1])}", (ROOT / name).read_text())
            source[0] = f"{text}\n{source[0]}"
    # Links of other pages to these three: Sphinx reads a leading slash as docs/.
    source[0] = IN_ROOT.sub(lambda link: f"](/{PAGES[link[1]]}.md", source[0])
    source[0] += LISTS.get(page, "")


def from_docs(target: str) -> str:
    """Return the link `target` of a file in the root as a link of a page in docs/."""
    if target in PAGES:
        return f"{PAGES[target]}.md"
    return target.removeprefix("docs/") if target.startswith("docs/") else f"../{target}"


def setup(app: Sphinx) -> None:
    """Register the hook; Sphinx calls this."""
    app.connect("source-read", complete_page)
