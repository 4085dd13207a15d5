"""Write the reference pages of the stages' configs from their field docstrings: `make docs`."""

from pathlib import Path

from mae_core.config import StrictConfig
from pipelines.cli import STAGES
from pipelines.config import describe

FOLDER = Path(__file__).parent


def page(stage: str, config_type: type[StrictConfig], summary: str) -> str:
    lines = [
        f"# `mae {stage}`",
        "",
        f"{summary} Written by `make docs` from the config's fields.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    for key, kind, default, meaning in describe(config_type):
        shown = default.replace(str(Path.cwd()), ".")
        cells = [f"`{key}`", f"`{kind}`", f"`{shown}`", meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    return {FOLDER / f"{stage}.md": page(stage, *STAGES[stage]) for stage in STAGES}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
