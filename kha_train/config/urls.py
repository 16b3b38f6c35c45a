"""Credentials inside URLs. One rule finds what a configuration refuses and what a text hides.

Passwords are found as people type them, with characters that a URL would have to quote: `https://u:pw/x@host`,
`postgres://u:p@ss@host`. If a colon before the first slash is not followed by a port, everything up to the last `@`
counts as credentials.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from kha_train.errors import ConfigError

# JSON may write a slash as \/. A path drops the second slash, as in https:/u:pw@host.
_START = re.compile(r"(?<=[A-Za-z0-9+.-]):(?:\\*/)+")
# A quote inside a word ends nothing: it is part of the password.
_END = re.compile(r"""[\s<>]|["'](?=[\s,;:)\]}]|$)|$""")
_AUTHORITY = re.compile(r"[^/?#]*")
_PORT = re.compile(r":\d{1,5}\\*$")
_NAMED = ("abfs:", "abfss:", "git:", "sftp:", "ssh:", "wasb:", "wasbs:")
"""Schemes in which a single word before the `@` is a container or a user."""
_QUERY = re.compile(r"://[^\s?]*\?")
OF_DATA = ("data.", "validation.", "evaluation.")
"""Sections whose URLs name datasets."""


class Credentials(NamedTuple):
    """`text[start:end]` is the part of a URL between `//` and `@`: `user:password`, or one word that may be a token."""

    start: int
    end: int
    has_password: bool


def find_credentials(text: str) -> Iterator[Credentials]:
    """The credentials of every URL in `text`, from left to right."""
    stop = last = -1
    done = 0
    for match in _START.finditer(text) if "@" in text else ():
        start = match.end()
        if start < done:
            continue
        if start > stop:
            ending = _END.search(text, start)
            assert ending is not None, "it matches the end of the text at the latest"
            stop = ending.start()
            last = text.rfind("@", start, stop)
        found = _AUTHORITY.match(text, start, stop)
        assert found is not None, "it matches no characters at the least"
        authority = found.end()
        colon = text.find(":", start, authority)
        at = text.rfind("@", start, authority)
        if last < start or (at < 0 and (colon < 0 or _PORT.search(text, colon, authority))):
            continue
        has_password = 0 <= colon and (at < 0 or colon < at)
        one_slash = match[0].count("/") == 1
        if not has_password and (one_slash or text.endswith(_NAMED, 0, match.start() + 1)):
            continue
        done = last if has_password else at
        yield Credentials(start, done, has_password)


def holds_password(text: str) -> bool:
    """Whether a URL in `text` has a password."""
    return any(found.has_password for found in find_credentials(text))


def refuse_credentials(text: str, field: str, *, query: bool = True) -> None:
    """Raises ConfigError for a URL with a password in the setting `field` and, with `query`, for one with a query,
    which may hold signatures and tokens.
    """
    if holds_password(text) or (query and _QUERY.search(text)):
        raise ConfigError(
            "a URL is written into logs and records, and this one holds a password or a query",
            field=field,
            value=f"{text.partition(':')[0][-12:]}://...",
            fix="give the credentials by the store's own environment variables or profile",
        )


def refuse_credentials_in(values: object, field: str = "") -> None:
    """`refuse_credentials` for every text in nested plain values, such as a whole configuration; a query is refused if
    the URL names data. Raises ConfigError.
    """
    if isinstance(values, str):
        refuse_credentials(values, field, query=field.startswith(OF_DATA))
    elif isinstance(values, dict):
        for key, value in values.items():
            refuse_credentials_in(value, f"{field}.{key}" if field else str(key))
    elif isinstance(values, list):
        for number, value in enumerate(values):
            refuse_credentials_in(value, f"{field}[{number}]")
