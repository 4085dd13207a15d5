"""Remove passwords and keys from all text before it is written anywhere.

Everything that leaves a process passes through here: logs (by a filter on each handler), the
command line's own lines, what is sent to MLflow, and the small files of a run. Known secrets from
the environment, passwords in addresses, and keys that sign an address or a request are removed.
"""

import base64
import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, quote_plus, urlsplit

MASK = "***"
# A shorter value, such as the password "test", may be part of any word.
MIN_SECRET_CHARS = 6
# Variables whose values are secrets, by the end of their name.
_SECRET_VARIABLE = re.compile(
    r"(SECRET|SECRETS|SECRET_KEY|SECRET_ACCESS_KEY|SESSION_TOKEN|SECURITY_TOKEN|TOKEN|PASSWORD|PASSWD"
    r"|PGPASSWORD|PASSPHRASE|API_KEY|APIKEY|PRIVATE_KEY|CREDENTIALS|ACCOUNT_KEY)$"
)
_USER_INFO = re.compile(r"(?<=://)[^\s/?#\"'<>@]*@(?=[^\s/?#\"'<>]|$)")
# Matches a password that contains an @, which should have been written %40.
_USER_INFO_WITH_AT = re.compile(r"(?<=://)[^\s/?#\"'<>:@]*:[^\s/?#\"'<>]*@")
_QUERY = re.compile(
    r"(?i)(?<=[?&;])((?:[\w.-]*(?:signature|credential|security-token|token|secret|password|passwd"
    r"|api[_-]?key|access[_-]?key(?:[_-]?id)?)|sig|pwd|pass|auth)=)[^\s&;#\"'<>]+"
)
_HEADER = re.compile(
    r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]+"
)
_AWS_HEADER = re.compile(r"(?i)(\bSignature=)[0-9a-f]{16,}")


def redact(text: str) -> str:
    """Replace each secret in a text by `***`."""
    for secret in _known_secrets(_environment()):
        text = text.replace(secret, MASK)
    text = _USER_INFO_WITH_AT.sub(f"{MASK}@", text)
    text = _USER_INFO.sub(f"{MASK}@", text)
    text = _QUERY.sub(rf"\g<1>{MASK}", text)
    return _AWS_HEADER.sub(rf"\g<1>{MASK}", _HEADER.sub(rf"\g<1>{MASK}", text))


def redact_value(value: Any) -> Any:
    """Redact all texts in a JSON-like value: keys and values, at any depth."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_value(key): redact_value(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [redact_value(x) for x in value]
    return value


def _environment() -> tuple[tuple[str, str], ...]:
    """Return the variables that may contain a secret, read each time because they may change."""
    return tuple(
        (name, value)
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name.upper()) or "://" in value
    )


@lru_cache(maxsize=8)
def _known_secrets(variables: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """List the secrets, longest first, also as addresses, headers and JSON spell them."""
    secrets: set[str] = set()
    for name, value in variables:
        if _SECRET_VARIABLE.search(name.upper()):
            secrets.add(value)
        if "://" in value:
            secrets |= _passwords_of(value)
    spelled: set[str] = set()
    for secret in secrets:
        if len(secret) >= MIN_SECRET_CHARS:
            escaped = secret.replace("\\", "\\\\").replace('"', '\\"')
            coded = base64.b64encode(secret.encode(errors="surrogateescape")).decode()
            spelled |= {secret, quote(secret, safe=""), quote_plus(secret), escaped, coded}
    return tuple(sorted(spelled, key=len, reverse=True))


def _passwords_of(address: str) -> set[str]:
    """Return an address's password, such as in MAE__TRACKING__URI, to find it on its own too."""
    try:
        password = urlsplit(address).password
    except ValueError:
        return set()
    return {password} if password else set()


class RedactionFilter(logging.Filter):
    """Redacts a record before its handler formats it; never drops one."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # logging itself reports the mistake
            return True
        record.msg, record.args = redact(message), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        return True


def redact_logs() -> None:
    """Add the filter to every existing handler, once each."""
    names = [None, *logging.root.manager.loggerDict]
    for name in names:
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(found, RedactionFilter) for found in handler.filters):
                handler.addFilter(RedactionFilter())


def redact_texts(texts: Mapping[str, str]) -> dict[str, str]:
    """Redact the values of params or tags."""
    return {key: redact(text) for key, text in texts.items()}


def redact_bytes(data: bytes) -> bytes:
    """Redact a file of UTF-8 text; other files stay as they are."""
    try:
        return redact(data.decode()).encode()
    except UnicodeDecodeError:
        return data


def write_redacted(text: str) -> None:
    """Write a text to stdout without secrets, and end the line."""
    sys.stdout.write(f"{redact(text.rstrip())}\n")
    sys.stdout.flush()
