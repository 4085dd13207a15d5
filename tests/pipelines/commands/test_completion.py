"""Tab completes stages, keys and choices, in a shell that has the script."""

import subprocess

import pytest

from pipelines.commands import completion
from pipelines.commands.arguments import COMMANDS


def complete(*words: str) -> list[str]:
    """Return what bash proposes for the last word."""
    typed = " ".join(f"'{word}'" for word in words)
    lines = [
        completion.script(),
        f"COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}",
        '_mae; printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "proposed"),
    [
        (("mae", "pre"), ["prepare", "pretrain"]),
        (("mae", "pretrain", "optim.ep"), ["optim.epochs="]),
        (
            ("mae", "pretrain", "masking.kind", "="),
            ["random", "block", "inverse_block", "grid", "uniform", "cell"],
        ),
        (("mae", "pretrain", "masking.kind", "=", "b"), ["block"]),
        (("mae", "pretrain", "scaling.use_gpu", "=", "t"), ["true"]),
        (("mae", "pretrain", "data.train", "="), []),
        (("mae", "prepare", "in"), ["in_chans=", "index"]),
        (("mae", "embed", "se"), ["search"]),
        (("mae", "run", "--sw"), ["--sweep"]),
        (("mae", "completion", ""), ["bash", "zsh"]),
    ],
)
def test_the_last_word_is_completed(words: tuple[str, ...], proposed: list[str]) -> None:
    assert complete(*words) == proposed


def test_every_command_has_words_to_follow() -> None:
    assert completion.COMMAND_WORDS.keys() == COMMANDS.keys()


def test_zsh_reads_the_same_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.command(["zsh"]) == 0
    told = capsys.readouterr().out
    assert told == "autoload -Uz bashcompinit && bashcompinit\n" + completion.script()
