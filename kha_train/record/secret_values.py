"""The secret values of an environment, in the forms in which texts may contain them: quoted, escaped, encoded."""

from __future__ import annotations

import base64
import html
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from urllib.parse import quote, quote_plus, unquote

from kha_train.config.urls import find_credentials
from kha_train.record.secret_names import is_secret_name, is_secret_variable

MIN_LENGTH = 8
"""Shorter values are hidden only when they are the whole text: "test" occurs in too many words."""
MIN_WORD = 12
"""From this length on, a single word before the `@` of a URL in an environment variable counts as a token; shorter ones
count as a name. From this length on, each line of a multi-line secret counts on its own.
"""

_FIELD = re.compile(r"(?:^|[;,\s])\s*([\w ]+?)\s*=\s*([^;,\s]+)")
"""A field of a connection string, such as `AccountKey=...` or `password=...`."""


def secrets_of(environ: Mapping[str, str]) -> set[str]:
    """The values of variables with secret names, the secret parts of connection strings, and the passwords in URLs of
    any variable.
    """
    found: set[str] = set()
    for name, value in environ.items():
        if is_secret_variable(name, value):
            found |= {value.strip(), *(line.strip() for line in value.splitlines() if len(line.strip()) >= MIN_WORD)}
        if "=" in value:
            found |= {text for field, text in _FIELD.findall(value) if is_secret_name(field)}
        found |= set(_in_urls(value))
    return found - {""}


def forms(secret: str) -> set[str]:
    """`secret` itself, and as JSON, Python, a shell, a URL, HTML or a Basic header would write it inside a text."""
    ways = {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        repr(secret)[1:-1],
        secret.replace("'", "\\'"),
        secret.replace("'", "''"),
        shlex.quote(secret).removeprefix("'").removesuffix("'"),
        html.escape(secret),
        html.escape(secret, quote=False),
    }
    encoded = {quote(secret, safe=safe, errors="replace") for safe in ("", "/", "/:@!$&'()*+,;=")}
    encoded.add(quote_plus(secret, errors="replace"))
    # Hexadecimal digits occur in either case.
    ways |= encoded | {re.sub(r"%[0-9A-F]{2}", lambda hit: hit[0].lower(), text) for text in encoded}
    # Text encoded twice: JSON inside JSON, the representation of a list of representations.
    twice = {json.dumps(way)[1:-1] for way in ways} | {way.replace("\\", "\\\\") for way in ways}
    return ways | twice | {way.replace("'", "\\'") for way in twice}


def _in_urls(value: str) -> Iterator[str]:
    for found in find_credentials(value):
        text = value[found.start : found.end]
        user, colon, rest = text.partition(":")
        if not colon and len(text) >= MIN_WORD:
            yield from {text, unquote(text)}
        # If the rest contains an @, the password may end before any of them.
        for end in [*(at for at, letter in enumerate(rest) if letter == "@"), len(rest)]:
            password = rest[:end]
            yield from {password, unquote(password)}
            if len(password) >= MIN_LENGTH:
                for word in (password, unquote(password)):
                    yield base64.b64encode(f"{unquote(user)}:{word}".encode(errors="replace")).decode()
