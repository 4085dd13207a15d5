"""Name runs in a list by what they are and by how they differ from others."""

import re
from collections.abc import Mapping

# Number of values in a run's name, and characters of each.
MAX_NAMED = 3
MAX_NAMED_CHARS = 24


def name_with_differences(
    run_name: str, params: Mapping[str, str], first: Mapping[str, str] | None
) -> str:
    """Return the name, followed by the values that differ from the first run of that name."""
    changed = {} if first is None else {k: v for k, v in params.items() if first.get(k, v) != v}
    shown = [f"{key.rsplit('.', 1)[-1]}={_brief(value)}" for key, value in changed.items()]
    more = [f"+{len(shown) - MAX_NAMED}"] if len(shown) > MAX_NAMED else []
    return " ".join([run_name, *shown[:MAX_NAMED], *more])


def _brief(value: str) -> str:
    """Return a param's value without JSON punctuation, and of a path only the last two names."""
    text = re.sub(r'[\[\]"{} ]', "", value)
    if "/" in text:
        text = "/".join(text.rstrip("/").split("/")[-2:])
    return text if len(text) <= MAX_NAMED_CHARS else f"{text[: MAX_NAMED_CHARS - 1]}…"
