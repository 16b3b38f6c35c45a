"""Keeps secrets out of everything a run writes: by the name of a key, and by the value of the environment's secrets.

The words that betray a secret (api key, token, secret, password, credential) are also the daily words of language
models: `tokens`, `tokenizer`, `eos_token_id`. A key is therefore cut into words first, and only whole words count:
`hf_token` and `authToken` name a secret, `tokens_per_second` and `tokenizer` do not. A number is never taken for a
token, and the special tokens of a vocabulary (`eos_token`, `pad_token`) are not secrets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

REDACTED = "[redacted]"
MIN_VALUE_LENGTH = 8
"""Shorter values of secret variables are replaced only where they are the whole string: "test" is in too many words."""

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORD = re.compile(r"(?:secrets?|passw\w*|passphrase|credentials?|apikeys?|signatures?|sig)", re.IGNORECASE)
_TOKEN_OWNERS = {"access", "api", "auth", "bearer", "csrf", "id", "identity", "jwt", "oauth", "refresh", "session"}
_VOCABULARY_WORDS = {
    "bos", "cls", "count", "dtype", "eos", "eot", "first", "ids", "index", "last", "length", "mask", "max", "min",
    "next", "num", "pad", "per", "sep", "size", "special", "text", "type", "unk",
}  # fmt: skip
_ASSIGNED_KEY = re.compile(
    r"""(?P<key>[\w./+-]*[A-Za-z])["']?\s*[=:]\s*|(?<!\S)(?P<option>--?[\w-]+)\s+(?!-)""",
)
_ASSIGNED_VALUE = re.compile(r"""(?P<quote>["'])(?P<quoted>.*?)(?P=quote)|(?P<plain>[^\s,;&"']+)""")
_URL_PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a configuration key, metric key, option or environment variable of this name holds a secret."""
    words = [word.lower() for word in _WORDS.findall(name)]
    pairs = set(pairwise(words))
    if any(_SECRET_WORD.fullmatch(word) for word in words) or ("api", "key") in pairs or ("api", "keys") in pairs:
        return True
    if "token" in words:
        return not _VOCABULARY_WORDS & set(words)
    return any((owner, "tokens") in pairs for owner in _TOKEN_OWNERS)


class Redactor:
    """Replaces secrets in text and in trees of plain values; `environ` supplies the values to look for."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        secrets = {value.strip() for name, value in environ.items() if is_secret_name(name)} - {""}
        self._short = {value for value in secrets if len(value) < MIN_VALUE_LENGTH}
        long = sorted(secrets - self._short, key=len, reverse=True)
        self._values = re.compile("|".join(map(re.escape, long))) if long else None
        # Every line of a run has the same few dozen keys.
        self._keys: dict[str, str] = {}

    @classmethod
    def from_environment(cls) -> Redactor:
        """A redactor that knows the secrets of this process' environment."""
        return cls(os.environ)

    def text(self, text: str) -> str:
        """`text` without the environment's secrets, `key=value` pairs of secret keys, and passwords inside URLs."""
        if text in self._short:
            return REDACTED
        if self._values:
            text = self._values.sub(REDACTED, text)
        return _hide_assignments(_URL_PASSWORD.sub(rf"\g<scheme>{REDACTED}@", text))

    def clean(self, value: Any) -> Any:
        """A copy of a tree of dicts, lists and plain values in which every secret is the text "[redacted]"."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self._clean_item(key, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.clean(item) for item in value]
        return value

    def _key(self, key: Any) -> Any:
        if not isinstance(key, str):
            return key
        if key not in self._keys:
            self._keys[key] = self.text(key)
        return self._keys[key]

    def _clean_item(self, key: Any, item: Any) -> Any:
        return REDACTED if isinstance(key, str) and _is_secret_item(key, item) else self.clean(item)


def _is_secret_item(key: str, item: Any) -> bool:
    if item is None or item == "" or isinstance(item, bool) or not is_secret_name(key):
        return False
    # Numbers under a `token` key count or index tokens; under `password` even a number is a secret.
    counts_tokens = bool({"token", "tokens"} & {word.lower() for word in _WORDS.findall(key)})
    return not (counts_tokens and isinstance(item, int | float))


def _hide_assignments(text: str) -> str:
    """`text` with the values of `api_key=...`, `"password": "..."` and `--token ...` replaced."""
    parts, end = [], 0
    for match in _ASSIGNED_KEY.finditer(text):
        value = _ASSIGNED_VALUE.match(text, match.end())
        if match.start() < end or value is None:
            continue
        content = value["quoted"] if value["quote"] else value["plain"]
        number = _number(content)
        if _is_secret_item(match["key"] or match["option"], content if number is None else number):
            parts += [text[end : match.end()], REDACTED]
            end = value.end()
    return "".join([*parts, text[end:]])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
