"""Settings that README and the pages of docs/ name are ones that a stage has."""

import re
from pathlib import Path

import pytest

from infra.cluster import ClusterConfig
from pipelines.chain.config import ChainConfig, PromoteSpec
from pipelines.chain.kinds import KINDS
from pipelines.config.fields import describe

ROOT = Path(__file__).parents[2]
# Not the decisions, which name functions in the same form.
PAGES = [ROOT / "README.md", *sorted(set(ROOT.glob("docs/**/*.md")) - set(ROOT.glob("docs/adr/*")))]
NAMED = re.compile(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=[^`]*)?`")
CONFIGS = [*(kind.config_type for kind in KINDS.values()), ChainConfig, ClusterConfig]
KNOWN = {
    *(key for config in CONFIGS for key, *_ in describe(config)),
    *(f"promote.{key}" for key, *_ in describe(PromoteSpec)),
}
SECTIONS = {key.partition(".")[0] for key in KNOWN if "." in key}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_setting_that_a_page_names_exists(page: Path) -> None:
    named = {key for key in NAMED.findall(page.read_text()) if key.partition(".")[0] in SECTIONS}
    files = {key for key in named if key.endswith((".png", ".json", ".jsonl", ".py", ".md"))}
    assert sorted(named - files - KNOWN) == []
