"""The README's figures are those of docs/results.md."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs/results.md").read_text()


def images_per_s(row: str) -> int:
    """The first number of the row of that name, in the table of shards to decoded batches."""
    table = RESULTS[RESULTS.index("| shards to decoded batches, ") :]
    found = re.search(rf"^\| {re.escape(row)}[^|]*\| (\d+) ", table, re.MULTILINE)
    assert found is not None, f"docs/results.md has no row {row!r}"
    return int(found[1])


def test_how_much_faster_than_a_data_loader() -> None:
    said = re.search(r"([0-9.]+) times a\s+torch DataLoader", README)
    assert said is not None
    assert said[1] == f"{images_per_s('ours: Ray Data') / images_per_s('torch DataLoader'):.1f}"


def test_accuracies_of_cifar10() -> None:
    for name in ("raw pixels", "untrained encoder", r"\*\*trained encoder\*\*"):
        row = re.compile(rf"^\| {name} \|.*", re.MULTILINE)
        (said,) = row.findall(README)
        assert said == row.findall(RESULTS)[0]


def test_what_pretraining_gives() -> None:
    first = "| set, labels (test images) |"
    said, measured = (text[text.index(first) :].partition("\n\n")[0] for text in (README, RESULTS))
    assert len(said.splitlines()) >= 6
    assert said == measured
