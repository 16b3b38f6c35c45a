"""Recognises secrets by the form of a text: passwords in URLs, `key=value` pairs, headers, keys of known shapes.

Every rule reads a text once from left to right, so the cost is linear in its length.
"""

from __future__ import annotations

import base64
import binascii
import re
from urllib.parse import unquote

from kha_train.config.urls import find_credentials
from kha_train.record.secret_names import is_secret_item, is_secret_name, is_variable_name

REDACTED = "[redacted]"
QUOTED_TIMES = 3
"""How many times a text inside a URL may have been quoted."""

_KEY = re.compile(
    r"""(?<![\w./+-])(?P<key>(?:(?:api|access|account|auth|private|client|connection)[ ])?[\w./+-]*\w)
        (?:'"'"'|\\*["'])?\]?\s*(?:=>|[=:])\s*
      | (?<![\w./+-])(?P<option>--?[\w-]+)\s+(?!-)""",
    re.VERBOSE | re.IGNORECASE,
)
# A quote inside quotes is \" in JSON and '"'"' in a shell. A separator belongs to the value unless an end, a space or
# another `key=` follows it.
_PLAIN = r"""(?:[^\s,;&"']|[,;&](?!\s|$|["']|[\w./+-]+\s*[=:])|(?<=\w)["'](?=\w))+"""
_VALUE = re.compile(
    rf"""(?P<open>\\+["']|'"'"')(?P<escaped>.*?)(?:(?<!\\)(?P=open)|$|(?=\n))
      | "(?P<double>(?:[^"\\\n]|\\.)*)(?:"|$|(?=\n))
      | '(?P<single>(?:[^'\\\n]|\\.|'')*)(?:'|$|(?=\n))
      | (?P<plain>{_PLAIN})""",
    re.VERBOSE,
)
_SCHEME = re.compile(r"(?<![\w-])(?P<scheme>bearer|basic|sharedkey|aws4-hmac-sha256)[ \t]+", re.IGNORECASE)
_WORD = re.compile(r"""[^\s,;"'<>\\]+""")
_QUOTED = re.compile(r"""[^\s"'<>&=?]*%(?:3[ADad]|20)[^\s"'<>&]*""")
# Quotes right after = belong to the header, as in Digest username="me", response="...".
_HEADER_VALUE = re.compile(r"""(?:[^\n"'\\]+|(?<==)\\*["'][^\n"'\\]*(?:\\*["'])?)*""")
_BRACKET = re.compile(
    r"""(?P<quote>\\+["']).*?(?:(?P=quote)|\Z)
      | "(?:[^"\\]|\\.)*(?:"|\\?\Z) | '(?:[^'\\]|\\.)*(?:'|\\?\Z) | [\[\]{}]""",
    re.VERBOSE | re.DOTALL,
)
"""A bracket, or a quoted text, inside which brackets do not count. An unclosed quote extends to the end."""
_FIRST_QUOTE = re.compile(r"""[^"'\\]*(\\*["'])""")
_LOGIN = re.compile(
    r"""(?<![\w-])(?:-[uU]\s*|--(?:proxy-)?user[\s=]+)(?:\\*(?P<quote>["']))?[^\s:"'\\]{1,100}:(?P<inner>["'])?"""
)
_LOGIN_END = {"": re.compile(r"""[^\s"']*"""), '"': re.compile(r"""[^"\n]*"""), "'": re.compile(r"""[^'\n]*""")}
_HEADERS = ("authorization", "cookie")
_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
        gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{30,} | glpat-[\w-]{20,} | hf_[A-Za-z0-9]{30,}
      | sk-[A-Za-z0-9_-]{20,} | xox[abprs]-[A-Za-z0-9-]{10,} | (?:AKIA|ASIA)[A-Z0-9]{16} | AIza[\w-]{35}
      | wandb_v1_\w{30,} | eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+
      )
      | (?<=-----BEGIN[ ]PRIVATE[ ]KEY-----)[^-]+ | (?<=[A-Z][ ]PRIVATE[ ]KEY-----)[^-]+(?=-----END)""",
    re.VERBOSE,
)
"""Keys with a vendor-specific form."""


def hide(text: str) -> str:
    """`text` with every secret replaced that is recognisable by its form."""
    text = _hide_by_form(text)
    return _QUOTED.sub(_hide_quoted, text) if "%3" in text or "%20" in text else text


def _hide_by_form(text: str) -> str:
    if "@" in text and ":" in text:
        text = _hide_credentials(text)
    if "curl" in text:
        text = _hide_logins(text)
    return _hide_headers(_hide_pairs(_SHAPES.sub(REDACTED, text)))


def _hide_quoted(match: re.Match[str]) -> str:
    """Hide a quoted text inside a URL as a whole if its decoded form shows a secret."""
    decoded = match[0]
    for _ in range(QUOTED_TIMES):
        decoded = unquote(decoded)
        if _hide_by_form(decoded) != decoded:
            return REDACTED
    return match[0]


def _hide_credentials(text: str) -> str:
    parts, end = [], 0
    for found in find_credentials(text):
        parts += [text[end : found.start], REDACTED]
        end = found.end
    return "".join([*parts, text[end:]])


def _hide_pairs(text: str) -> str:
    """The values of `api_key=...`, `"password": "..."`, `--token ...` and `Authorization: ...`; quotes stay."""
    parts, end = [], 0
    for match in _KEY.finditer(text):
        if match.start() < end:
            continue
        name = match["key"] or match["option"]
        value = _VALUE.match(text, match.end()) if is_secret_name(name) or is_variable_name(name) else None
        if value is None:
            continue
        group = value.lastgroup if value.lastgroup != "open" else "escaped"
        start, stop = value.span(group or 0)
        if group == "plain" and name.lower().endswith(_HEADERS):
            stop = _end_of(_HEADER_VALUE, text, start)
        elif group == "plain" and text[start] in "[{":
            stop = _end_of_brackets(text, start)
        content = text[start:stop]
        number = _number(content)
        if is_secret_item(name, content if number is None else number):
            quote = _FIRST_QUOTE.match(content) if group == "plain" and content[0] in "[{" else None
            parts += [text[end:start], f"{quote[1]}{REDACTED}{quote[1]}" if quote else REDACTED]
            end = stop
    return "".join([*parts, text[end:]])


def _end_of(pattern: re.Pattern[str], text: str, start: int) -> int:
    """The end of the match of `pattern` at `start`; the match may be empty."""
    found = pattern.match(text, start)
    assert found is not None
    return found.end()


def _end_of_brackets(text: str, start: int) -> int:
    """The position of the closing bracket for the one at `start`; the end of `text` where it is not closed."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.end()
    return len(text)


def _hide_logins(text: str) -> str:
    """The password of `curl -u user:password`."""
    parts, end = [], 0
    for match in _LOGIN.finditer(text):
        if match.start() < end:
            continue
        stop = _end_of(_LOGIN_END[match["inner"] or match["quote"] or ""], text, match.end())
        secret = text[match.end() : stop].rstrip("\\")
        parts += [text[end : match.end()], REDACTED if secret else ""]
        end = match.end() + len(secret)
    return "".join([*parts, text[end:]])


def _hide_headers(text: str) -> str:
    """Hide what follows `Bearer`, `Basic` and other authentication schemes."""
    parts, end = [], 0
    for match in _SCHEME.finditer(text):
        word = _WORD.match(text, match.end())
        if match.start() < end or word is None or not _is_credential(match["scheme"].lower(), word[0]):
            continue
        parts += [text[end : word.start()], REDACTED]
        end = word.end()
    return "".join([*parts, text[end:]])


def _is_credential(scheme: str, word: str) -> bool:
    """Whether `Basic` is followed by a credential and not by an English word."""
    if scheme != "basic":
        return True
    try:
        if ":" in base64.b64decode(word, validate=True).decode(errors="replace"):
            return True
    except (binascii.Error, ValueError):
        pass
    return len(word) >= 8 and not word.isalpha() and any(character.isdigit() for character in word)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
