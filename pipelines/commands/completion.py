"""`mae completion`: print a script that completes stages, options, keys and files with Tab.

    eval "$(mae completion bash)"      in ~/.bashrc
    eval "$(mae completion zsh)"       in ~/.zshrc, after compinit

The words are written into the script, so that Tab starts no Python. Print it again after an
update. Keys are completed up to `=`; choices and files after it.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from pipelines.chain.kinds import KINDS
from pipelines.commands import checkpoint, masks
from pipelines.commands.arguments import OPTIONS, STAGE_WORDS
from pipelines.config.fields import annotation_of, choices_of, describe

PIPELINE_OPTIONS = ("--set", "--sweep", "--force", "--from", "--only", "--debug", "--help")
# Words that may follow a command, besides files.
COMMAND_WORDS: dict[str, tuple[str, ...]] = {
    "run": PIPELINE_OPTIONS,
    "plan": (*PIPELINE_OPTIONS, "--mermaid"),
    "schedule": ("serve", "once", "next", "pause", "resume", "list", "backfill", "render"),
    "doctor": ("storage.root=", "tracking.uri="),
    "checkpoint": (*checkpoint.ACTIONS, *checkpoint.OPTIONS, *checkpoint.FORMATS),
    "masks": ("preview", *masks.OPTIONS),
    "config": ("show", "schema", *KINDS),
    "completion": ("bash", "zsh"),
}
BARE_WORDS = {"prepare": ("index", "stats", "--synthetic"), "embed": ("search",)}

SCRIPT = """\
_mae() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" words="" key=""
    # Bash takes = for a word of its own.
    if [ "$word" = "=" ]; then key="${{COMP_WORDS[COMP_CWORD-1]}}"; word=""
    elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = "=" ]; then key="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
    if [ -n "$key" ]; then
        case "${{COMP_WORDS[1]}} $key" in
{choices}
        esac
    elif [ "$COMP_CWORD" -eq 1 ]; then words="{stages}"
    else
        case "${{COMP_WORDS[1]}}" in
{keys}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default -F _mae mae
"""
ZSH = "autoload -Uz bashcompinit && bashcompinit\n"


def command(words: Sequence[str]) -> int:
    """Run `mae completion WORDS`; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="mae completion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    shell = parser.parse_args(words).shell
    sys.stdout.write((ZSH if shell == "zsh" else "") + script())
    return 0


def script() -> str:
    """Return the completion script for bash; zsh reads it with bashcompinit."""
    after = dict(COMMAND_WORDS)
    for name, kind in KINDS.items():
        keys = [f"{key}=" for key, *_ in describe(kind.config_type)]
        after[name] = (*keys, *BARE_WORDS.get(name, ()), *OPTIONS[:3])
    return SCRIPT.format(
        stages=" ".join(["--help", "--version", *STAGE_WORDS]),
        keys="\n".join(f'        {name}) words="{" ".join(x)}" ;;' for name, x in after.items()),
        choices="\n".join(_choices()),
    )


def _choices() -> Iterator[str]:
    """Yield a case for each field that accepts one of a few words."""
    for name, kind in KINDS.items():
        for key in (key for key, *_ in describe(kind.config_type)):
            words = choices_of(annotation_of(kind.config_type, key.split(".")))
            if words:
                yield f'        "{name} {key}") words="{" ".join(words)}" ;;'
