"""JSON and YAML of other programs -> plain values: text keys, bounded depth, no aliases, no constructed objects."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

Json = Any
"""Any JSON value, as a file may hold it; `typed.Source.read` gives it a type."""
MAX_DEPTH = 64
"""Limit on nested containers; our own files have fewer than ten levels."""
_YAML_TROUBLE = (ValueError, OverflowError, RecursionError, LookupError, TypeError, AttributeError)
"""What PyYAML raises besides its own errors for tags such as `!!int ''`."""


def parse_json(raw: bytes) -> Json:
    """The value of JSON text, which may contain NaN and infinities. Raises ValueError for anything else, and for text
    that is nested too deeply.
    """
    try:
        value = json.loads(raw.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    # Only text with many brackets can be deep; lines of a record have few.
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH:
        check_depth(value)
    return value


def parse_yaml(raw: bytes) -> Json:
    """The value of YAML text: mappings with text keys, lists, text, numbers, true, false, null.

    Raises ValueError for anything else. Aliases are refused: a few lines of them can expand to gigabytes.
    """
    import yaml

    try:
        value = yaml.load(raw, Loader=_plain_loader())
    except (yaml.YAMLError, *_YAML_TROUBLE) as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    check_depth(value)
    _check_plain(value)
    return value


def as_yaml(value: Json) -> str:
    """Plain `value` as YAML, keys in their order."""
    import yaml

    return yaml.safe_dump(value, sort_keys=False)


def yaml_lines(text: str) -> dict[str, tuple[int, str]]:
    """The line (from 1) and the text of the value of each key of YAML `text`, by dotted keys; "" for a mapping or a
    list. Raises as `yaml`: for files of our own.
    """
    import yaml

    found: dict[str, tuple[int, str]] = {}
    left: list[tuple[str, Any]] = [("", yaml.compose(text, Loader=yaml.SafeLoader))]
    for path, node in left:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            where = f"{path}.{key.value}" if path else key.value
            found[where] = key.start_mark.line + 1, value.value if isinstance(value, yaml.ScalarNode) else ""
            left.append((where, value))
    return found


def check_depth(value: object) -> None:
    """Raises ValueError when containers are nested more than `MAX_DEPTH` deep."""
    level, depth = [value], 0
    while level := [one for one in level if isinstance(one, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
        level = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]


def _check_plain(value: Any) -> None:
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            if strange := [key for key in one if type(key) is not str]:
                raise ValueError(f"a key that is not text: {str(strange[0])[:80]}")
            left += one.values()
        elif isinstance(one, list):
            left += one
        elif one is not None and type(one) not in (str, int, float, bool):
            raise ValueError(f"a value of an unsupported type: {type(one).__name__}")


@cache
def _plain_loader() -> type:
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """Python's safe loader, without aliases."""

        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()  # type: ignore[no-untyped-call]  # yaml's, without annotations
                raise ValueError(f"it has an alias, *{event.anchor[:80]}")
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise ValueError("nested too deeply")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return PlainLoader
