"""Keeps secrets out of everything a run writes or prints: one `Redactor` in front of every file, mirror and stream.

A secret is recognised by its name (`secret_names`), by its value if the environment holds it (`secret_values`), or by
the form of the text around it (`secret_text`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from kha_train.foreign.documents import Json
from kha_train.record.secret_names import is_secret_item, is_secret_name
from kha_train.record.secret_text import REDACTED, hide
from kha_train.record.secret_values import MIN_LENGTH, forms, secrets_of

__all__ = ["REDACTED", "Redactor", "is_secret_name"]


class Redactor:
    """Replaces secrets in text and in nested plain values; `environ` supplies the values to look for."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        secrets = secrets_of(environ)
        self._short = {secret for secret in secrets if len(secret) < MIN_LENGTH}
        long = {form for secret in secrets - self._short for form in forms(secret)}
        self._values = re.compile("|".join(map(re.escape, sorted(long, key=len, reverse=True)))) if long else None
        # All lines of a run share a few dozen keys.
        self._keys: dict[str, str] = {}

    @classmethod
    def from_environment(cls) -> Redactor:
        """A redactor that knows the secrets of this process' environment."""
        return cls(os.environ)

    def values(self, text: str) -> str:
        """`text` without the environment's secrets; the rest is unchanged."""
        if text in self._short:
            return REDACTED
        return self._values.sub(REDACTED, text) if self._values else text

    def text(self, text: str) -> str:
        """`text` without the environment's secrets, and without those recognisable by their form: `key=value` pairs
        with secret keys, passwords inside URLs, authentication headers.
        """
        return hide(self.values(text))

    def clean(self, value: Json) -> Json:
        """A copy of nested dicts, lists and plain values in which every secret is replaced by "[redacted]"."""
        if isinstance(value, float | int) or value is None:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self._key(key): self._clean_item(key, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return self._clean_list(value)
        return self.text(str(value)) if isinstance(value, os.PathLike) else value

    def clean_values(self, value: Json) -> Json:
        """A copy of nested dicts, lists and plain values without the environment's secrets, keys included; the rest is
        unchanged.
        """
        if isinstance(value, str):
            return self.values(value)
        if isinstance(value, Mapping):
            return {self.clean_values(key): self.clean_values(item) for key, item in value.items()}
        return [self.clean_values(item) for item in value] if isinstance(value, list | tuple) else value

    def _clean_list(self, values: list[Any] | tuple[Any, ...]) -> list[Any]:
        """On a command line, the value of an option follows its name."""
        cleaned: list[Any] = []
        before: Any = None
        for value in values:
            named = isinstance(before, str) and before.startswith("-") and isinstance(value, str)
            hidden = named and not value.startswith("-") and is_secret_item(before, value)
            cleaned.append(REDACTED if hidden else self.clean(value))
            before = value
        return cleaned

    def _key(self, key: Any) -> Any:
        if not isinstance(key, str):
            return key
        if key not in self._keys:
            self._keys[key] = self.text(key)
        return self._keys[key]

    def _clean_item(self, key: Any, item: Any) -> Any:
        return REDACTED if isinstance(key, str) and is_secret_item(key, item) else self.clean(item)
