"""Every shell block of README, CONTRIBUTING and docs/ is run by a test, or says why it is not.

A comment on the line before a block says which:

    <!-- needs: services -->                  what CI does not have, one or more of `NEEDS`
    <!-- tested by: tests/e2e/test_x.py -->   the tests that run these commands
    (nothing)                                 the block is run here, in a folder of its own
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pipelines.chain.config import load_chain
from pipelines.chain.kinds import KINDS
from pipelines.commands.arguments import COMMANDS, parse, read_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
NEEDS = {
    "your images",  # or shards, labels, checkpoints: paths that only the reader has
    "services",  # what `make up` starts
    "cluster",  # Ray or Kubernetes
    "containers",  # Docker or another engine
    "network",
    "time",  # more than CI has
    "your shell",  # the reader's own session or editor
}
LANGUAGES = {"sh", "text", "yaml", "json", "python", "ini", "{toctree}"}
FENCE = re.compile(r"^ *```(.*)$")
MARK = re.compile(r"<!-- (needs|tested by): (.+) -->")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    mark: str
    """The line before the block."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence and start is None:
            start = number
        elif fence and start is not None:
            language = lines[start].strip().removeprefix("```")
            mark = lines[start - 1].strip() if start else ""
            text = "\n".join(lines[start + 1 : number])
            found.append(Block(str(page.relative_to(ROOT)), start + 1, language, mark, text))
            start = None
    assert start is None, f"{page}:{start}: the block has no end"
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
RUN_HERE = [block for block in SHELL if MARK.fullmatch(block.mark) is None]


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command, without comments and with continued lines joined."""
    joined = block.text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def test_every_block_names_its_language() -> None:
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_only_indented(page: Path) -> None:
    """Such a block names no language, so that nothing here would look at it."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"\n\n {4,}\S.*", text) == []


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_a_marked_block_says_what_it_needs_or_which_test_runs_it(block: Block) -> None:
    assert "<!--" not in block.mark or MARK.fullmatch(block.mark), block.mark
    mark = MARK.fullmatch(block.mark)
    listed = [x.strip() for x in mark[2].split(",")] if mark else []
    if mark and mark[1] == "needs":
        assert set(listed) <= NEEDS
    assert [x for x in listed if mark and mark[1] == "tested by" and not (ROOT / x).exists()] == []


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_the_tests_that_a_mark_names_mention_each_command(block: Block) -> None:
    mark = MARK.fullmatch(block.mark)
    if mark and mark[1] == "tested by":
        tests = "".join((ROOT / path.strip()).read_text() for path in mark[2].split(","))
        named = [word for words in commands(block) for word in named_words(words)]
        assert [word for word in named if not re.search(rf"\b{word}\b", tests)] == []


def named_words(words: list[str]) -> list[str]:
    """Return what a command is called: the target of make, the stage or command of `mae`."""
    known = {"next", "list", "pause", "serve", "once", "backfill", "schema", "show", "search"}
    if words[0] in {"make", "mae"}:
        return [words[1], *(word for word in words[2:3] if word in known)]
    return []


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_command_is_one_that_exists(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run or not: stages, keys, values, config files, make targets and modules are real ones."""
    monkeypatch.chdir(ROOT)
    for words in commands(block):
        joined = " ".join(words)
        if script := re.search(r"\bpython (pipelines/\w+\.py) ", joined):
            assert (ROOT / script[1]).exists()
        if module := re.search(r"\bpython -m ((?:infra|pipelines)\.[\w.]+)", joined):
            assert (ROOT / f"{module[1].replace('.', '/')}.py").exists()
        if words[0] == "make":
            targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets
        if words[0] == "mae":
            check_mae(words[1:])


def check_mae(words: list[str]) -> None:
    """Read the config that the words come to, which names a mistake in any of them."""
    if words[:2] == ["config", "show"]:
        words = words[2:]
    if words[0] in {"run", "plan"} and words[1:]:
        chain, *rest = [word for word in words[1:] if not word.startswith("--")]
        values = [word for word in rest if "=" in word and "," not in word]
        load_chain(Path(chain), values, [word for word in rest if "," in word])
    elif words[0] in KINDS and "--help" not in words:
        read_config(parse(words))
    else:
        assert words[0] in {*KINDS, *COMMANDS, "stage"} or words[0].startswith("--")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the repository, and a `mae` that runs its sources."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "pipelines", "infra", "mae_core", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "bin").mkdir()
    mae = folder / "bin/mae"
    mae.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipelines.cli "$@"\n')
    mae.chmod(0o755)
    return folder


@pytest.mark.parametrize("block", RUN_HERE, ids=str)
def test_an_unmarked_block_runs(block: Block, folder: Path) -> None:
    environment = {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder)}
    ran = subprocess.run(
        ["bash", "-euc", block.text],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
