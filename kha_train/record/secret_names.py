"""Decides which names hold secrets: names of configuration keys, options, headers and environment variables.

The words that mark a secret (api key, token, secret, password, credential) are also everyday words of language models:
`tokens`, `tokenizer`, `eos_token_id`, `key_norm`. So a name is first split into words, and only whole words count:
`hf_token` and `authToken` name a secret, `tokens_per_second` and `tokenizer` do not. `key` counts only with a word for
what it opens (`api_key`, `AccountKey`). A number is never a token, and the special tokens of a vocabulary (`eos_token`,
`pad_token`) are not secrets.

Names of environment variables are less specific. They are judged more broadly, together with the value: `DB_PASS`,
`GPG_KEY`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORD = re.compile(
    r"secrets?|[a-z]*passw(?:or)?ds?|[a-z]*passphrase|credentials?|[a-z]*apikeys?|(?:account|access)keys?|signatures?"
    r"|sig|authorization|cookies?|dsn"
)
_OPENERS = {
    "access", "account", "api", "auth", "client", "deploy", "encryption", "license", "private", "signing", "ssh",
    "storage", "subscription", "webhook",
}  # fmt: skip
"""Words before `key` that say what it opens."""
_PAIRS = {("connection", "string"), ("connection", "strings"), ("conn", "str")}
_TOKEN_OWNERS = {"access", "api", "auth", "bearer", "csrf", "id", "identity", "jwt", "oauth", "refresh", "session"}
_VOCABULARY_WORDS = {
    "bos", "cls", "count", "dtype", "eos", "eot", "first", "ids", "index", "last", "length", "mask", "max", "min",
    "next", "num", "pad", "per", "sep", "size", "special", "text", "type", "unk",
}  # fmt: skip
_DIRECTORIES = {"old", "init", "work", "project"}
"""Words before `pwd` that make it a working directory."""

_LAST_OF_VARIABLES = {"auth", "key", "keys", "pass", "pat", "pw", "webhook", "webhooks"}
_VARIABLE_LENGTH = 8
_PATH = re.compile(r"[/~.\\]|[A-Za-z]:[/\\]")
_NO_SECRET = re.compile(r"[a-z]+|[-+]?[\d.]+(?:e[-+]?\d+)?")
"""A word such as `publickey`, which `key` or `auth` may hold, or a number."""


@lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a configuration key, metric key, option, header or environment variable of this name holds a secret."""
    words = [word.lower() for word in _WORDS.findall(name)]
    pairs = set(pairwise(words))
    if any(_SECRET_WORD.fullmatch(word) for word in words) or _PAIRS & pairs:
        return True
    if any(second in ("key", "keys") and first in _OPENERS for first, second in pairs):
        return True
    if any(second == "pwd" and first not in _DIRECTORIES for first, second in pairs):
        return True
    if "token" in words:
        return not _VOCABULARY_WORDS & set(words)
    return any((owner, "tokens") in pairs for owner in _TOKEN_OWNERS)


@lru_cache(maxsize=4096)
def is_variable_name(name: str) -> bool:
    """Whether an environment variable of this name, in the usual capitals, may hold a secret: see
    `is_secret_variable`.
    """
    return name.isupper() and _may_open(name)


def is_secret_variable(name: str, value: str) -> bool:
    """Whether `value` of the environment variable `name` is a secret. `SSHPASS`, `GITHUB_PAT` and `SLACK_WEBHOOK_URL`
    are, unless they hold a path, a number or a few letters.
    """
    if is_secret_name(name):
        return True
    value = value.strip()
    if len(value) < _VARIABLE_LENGTH or _PATH.match(value) or not _may_open(name):
        return False
    return not (_NO_SECRET.fullmatch(value) and (not value.isalpha() or name.lower().endswith(("key", "keys", "auth"))))


def _may_open(name: str) -> bool:
    words = [word.lower() for word in _WORDS.findall(name)]
    if len(words) > 1 and words[-1] in ("url", "urls"):
        words.pop()
        return words[-1] in ("webhook", "webhooks")
    return bool(words) and (
        (len(words) > 1 and words[-1] in _LAST_OF_VARIABLES) or (words[-1].endswith("pass") and words[-1] != "pass")
    )


def is_secret_item(name: str, value: object) -> bool:
    """Whether `value` under `name` is a secret. Empty values, switches and token counts are not."""
    if value is None or value == "" or isinstance(value, bool):
        return False
    if not is_secret_name(name):
        return isinstance(value, str) and is_variable_name(name) and is_secret_variable(name, value)
    # Numbers under a `token` key count, measure or index tokens; under `password` even a number is a secret.
    counts_tokens = bool({"token", "tokens"} & {word.lower() for word in _WORDS.findall(name)})
    numbers = value if isinstance(value, list) else [value]
    return not (counts_tokens and all(isinstance(number, int | float) for number in numbers))
