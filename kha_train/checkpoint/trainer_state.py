"""Trainer state as JSON text; every value reads back bit for bit.

Python's `repr` of a finite float reads back as the same float. JSON has no other floats, so those are written as
{"$float": "nan" | "inf" | "-inf"} and restored (the payload bits of a NaN are lost).
"""

from __future__ import annotations

import json
import math
from typing import Any

from kha_train.errors import CheckpointError
from kha_train.foreign.documents import check_depth

_MARK = "$float"
_SPECIAL = ("nan", "inf", "-inf")


def encode_state(state: dict[str, Any]) -> bytes:
    """`state` (dict, list, str, int, float, bool, None, nested) as JSON.

    Raises CheckpointError naming the entry when a value would not read back unchanged: tuples, arrays, keys that are
    not text.
    """
    return (json.dumps(_to_json(state, "trainer_state"), allow_nan=False, indent=1) + "\n").encode()


def decode_state(raw: bytes, where: str = "trainer.json") -> dict[str, Any]:
    """The inverse of `encode_state`. Raises CheckpointError naming `where` for any other text."""
    try:
        state = json.loads(raw.decode(), object_hook=_from_json, parse_constant=_refuse)
        check_depth(state)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not trainer state: {error}", field=where) from error
    if type(state) is not dict:
        raise CheckpointError("not trainer state", field=where, value=type(state).__name__, allowed="an object")
    return state


def _to_json(value: Any, where: str) -> Any:
    if type(value) is float and not math.isfinite(value):
        return {_MARK: repr(value)}
    if type(value) is dict:
        for key in value:
            if type(key) is not str or key == _MARK:
                raise CheckpointError(
                    "cannot be stored as JSON", field=f"{where}: key", value=key, allowed="other text"
                )
        return {key: _to_json(entry, f"{where}.{key}") for key, entry in value.items()}
    if type(value) is list:
        return [_to_json(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    allowed = "dict with text keys, list, str, int, float, bool, None"
    raise CheckpointError("cannot be stored as JSON", field=where, value=type(value).__name__, allowed=allowed)


def _from_json(found: dict[str, Any]) -> Any:
    if _MARK not in found:
        return found
    if len(found) != 1 or found[_MARK] not in _SPECIAL:
        raise ValueError(f"{found!r} is no float")
    return float(found[_MARK])


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
