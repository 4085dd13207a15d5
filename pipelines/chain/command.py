"""`mae plan` and `mae run`: a pipeline of stages, of which only the changed ones run again."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from infra.quick_imports import hidden, without_collecting
from infra.redaction import write_redacted
from pipelines import driver
from pipelines.chain.config import load_chain
from pipelines.chain.plan import (
    Forced,
    mermaid_graph,
    plan_chain,
    plan_table,
    text_graph,
)


def command(words: Sequence[str]) -> int:
    """Run `mae plan CHAIN` or `mae run CHAIN`; the first word is `plan` or `run`."""
    arguments = _parse(words)
    overrides = [*arguments.words, *arguments.set]
    chain = load_chain(arguments.chain, overrides, arguments.sweep)
    driver.check_paths([("storage.root", chain.config.storage.root)])
    driver.check_tracking(chain.config.tracking.uri)
    forced = Forced.of(chain, arguments.force, arguments.start, arguments.only)
    if words[0] == "plan":
        plans = plan_chain(chain, forced)
        states = {plan.stage.name: plan.decision.action.value for plan in plans}
        shown = mermaid_graph(chain, states) if arguments.mermaid else None
        write_redacted(shown or f"{text_graph(chain)}\n\n{plan_table(plans)}")
        return 0
    # Imported here, because a plan needs neither MLflow nor what draws the report. MLflow reads
    # tables of these packages' types, which a pipeline does not give it.
    with without_collecting(), hidden(["pandas", "scipy"]):
        from pipelines.chain.run import run

    return run(chain, forced, overrides)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"mae {words[0]}", description=__doc__)
    parser.add_argument("chain", type=Path, metavar="CHAIN.yaml", help="see configs/chain")
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="STAGE.key=value",
        help="override values in the stages' files",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.key=value",
        help="the same, as an option",
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="[STAGE.]key=a,b",
        help="run the stages that depend on the key once for each value",
    )
    parser.add_argument(
        "--force", action="append", default=[], metavar="STAGE", help="run this stage again"
    )
    parser.add_argument(
        "--from",
        dest="start",
        action="append",
        default=[],
        metavar="STAGE",
        help="run this stage and all stages after it again",
    )
    parser.add_argument("--only", metavar="STAGE", help="run no other stage")
    if words[0] == "plan":
        parser.add_argument("--mermaid", action="store_true", help="print the graph for Mermaid")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser.parse_intermixed_args(words[1:])
