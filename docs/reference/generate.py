"""Write the reference pages of the stages' configs from their field docstrings: `make docs`."""

from pathlib import Path

from mae_core.config import StrictConfig
from pipelines.chain.config import ChainConfig, PromoteSpec, StageSpec
from pipelines.chain.kinds import KINDS
from pipelines.commands import checkpoint, masks
from pipelines.config.fields import describe

FOLDER = Path(__file__).parent
INTRODUCTION = (
    "Look up every setting here. Set it as `section.key=value` on the command line or in a "
    "YAML file ([how](../guides/config.md)). `make docs` writes this page from the config's fields."
)


def page(stage: str, config_type: type[StrictConfig], summary: str) -> str:
    """Return the reference page of a stage."""
    return f"# `mae {stage}`\n\n{summary} {INTRODUCTION}\n\n{table(config_type)}"


def table(config_type: type[StrictConfig]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, meaning in describe(config_type):
        shown = default.replace(str(Path.cwd()), ".")
        cells = [f"`{key}`", f"`{kind}`", f"`{shown}`", meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    stages = {
        FOLDER / f"{name}.md": page(name, kind.config_type, kind.summary)
        for name, kind in KINDS.items()
    }
    own = {
        FOLDER / "chain.md": chain_page(),
        FOLDER / "checkpoint.md": help_page("checkpoint", checkpoint.__doc__, "weights.md"),
        FOLDER / "masks.md": help_page("masks", masks.__doc__, "run.md#masks"),
    }
    return {**stages, **own}


def help_page(command: str, text: str | None, guide: str) -> str:
    """Return the page of a command that is no stage, which is its help."""
    return (
        f"# `mae {command}`\n\n"
        f"Look up what the command takes here ([guide](../guides/{guide})). `make docs` writes "
        f"this page from its help.\n\n```text\n{(text or '').strip()}\n```\n"
    )


def chain_page() -> str:
    """Return the page of a pipeline's file, whose tables lie in each other."""
    parts = [
        "# `mae run`, `mae plan`\n",
        "Look up every field of a pipeline's file here ([guide](../guides/chain.md)). "
        "`make docs` writes this page from the config's fields.\n",
        "## The pipeline\n\n" + table(ChainConfig),
        "## `stages.NAME`\n\n" + table(StageSpec),
        "## `promote`\n\n" + table(PromoteSpec),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
