"""Foreign files are opened without blocking, parsed within limits, and typed or refused with the place of the fault."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kha_train.config.build import to_plain
from kha_train.config.compose import compose, dump, load_plain
from kha_train.errors import CheckpointError, DataError
from kha_train.foreign.documents import MAX_DEPTH, parse_json, parse_yaml
from kha_train.foreign.files import read_regular
from kha_train.foreign.typed import Absent, Count, Match, Range, Source

SOURCE = Source("run.json", fix="look at it")


class Inner(TypedDict):
    number: Annotated[float, Range(0, 1)]
    name: NotRequired[str]


class Outer(TypedDict):
    count: Count
    kind: Literal["a", "b"]
    inner: list[Inner]
    pairs: Annotated[dict[str, tuple[int, int]], Absent({})]
    digits: Annotated[str, Match(r"\d+"), Absent("0")]
    maybe: int | None


@dataclass(frozen=True)
class Exact:
    step: Count
    kept: tuple[int, ...] = ()


GOOD: dict[str, Any] = {"count": 3, "kind": "a", "inner": [{"number": 1}], "maybe": None}


def test_what_is_right_is_returned_with_declared_values_for_what_is_absent_and_later_fields_kept() -> None:
    found = SOURCE.read(Outer, {**GOOD, "later": {"x": 1}, "inner": [{"number": 0.5, "later": 2}]})
    assert found == {
        **GOOD, "later": {"x": 1}, "inner": [{"number": 0.5, "later": 2}], "pairs": {}, "digits": "0",
    }  # fmt: skip
    assert SOURCE.read(Exact, {"step": 3, "kept": [1, 2]}) == Exact(3, (1, 2))


@pytest.mark.parametrize(
    "change, place",
    [
        ({"count": True}, "count"),
        ({"count": -1}, "count"),
        ({"count": 2**60}, "count"),
        ({"count": 3.0}, "count"),
        ({"count": None}, "count"),
        ({"kind": "c"}, "kind"),
        ({"kind": ["a"]}, "kind"),
        ({"inner": {"number": 1}}, "inner"),
        ({"inner": [{"number": "1"}]}, "inner[0].number"),
        ({"inner": [{"number": 10**400}]}, "inner[0].number"),
        ({"inner": [{"number": 1}, {}]}, "inner[1].number"),
        ({"inner": [[1]]}, "inner[0]"),
        ({"pairs": {"x": [1]}}, "pairs.x"),
        ({"pairs": {"x": [1, "2"]}}, "pairs.x[1]"),
        ({"digits": "1x"}, "digits"),
        ({"maybe": "x"}, "maybe"),
    ],
)
def test_the_first_wrong_field_is_named_with_file_and_fix(change: dict[str, Any], place: str) -> None:
    with pytest.raises(DataError) as caught:
        SOURCE.read(Outer, {**GOOD, **change})
    assert str(caught.value).startswith((f"run.json {place}:", f"run.json {place} = "))
    assert "fix: look at it" in str(caught.value)


def test_a_further_field_of_what_must_be_exact_is_refused_in_the_kind_of_the_file() -> None:
    source = Source("trainer.json", CheckpointError)
    with pytest.raises(CheckpointError, match=r"trainer\.json progress\.later: unknown field; allowed: step, kept"):
        source.read(Exact, {"step": 3, "later": 1}, "progress")
    with pytest.raises(CheckpointError, match="an object"):
        source.read(Exact, [1])


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path)], ids=["directory", "fifo"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "x")
    with pytest.raises(DataError, match="where a file is expected; fix: move it away"):
        read_regular(tmp_path / "x")
    assert read_regular(tmp_path / "none") is None
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    assert read_regular(tmp_path / "dangling") is None


def test_a_file_too_large_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "x", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match="too large"):
        read_regular(tmp_path / "x", limit=2**20)


def test_json_and_yaml_nested_too_deeply_are_refused_and_not_recursed_into() -> None:
    for depth in (MAX_DEPTH + 1, 500, 100_000):
        with pytest.raises(ValueError):
            parse_json(b"[" * depth + b"]" * depth)
        with pytest.raises(ValueError):
            parse_yaml(b"[" * depth + b"]" * depth)
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


def test_an_alias_bomb_is_refused_before_it_goes_off() -> None:
    rows = [b"a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]".encode() for i in range(1, 30)]
    before = time.process_time()
    with pytest.raises(ValueError, match="alias"):
        parse_yaml(b"\n".join(rows))
    assert time.process_time() - before < 5


@pytest.mark.parametrize(
    "text", ["!!int ''", "!!timestamp x", "!!bool x", "2001-13-99", "a: 2001-01-01", "? [a]\n: b", "1: 2",
             "a: !!binary eA==", "!!python/object/apply:os.system [id]", "\x00", "a: \x1b", "a: b: c", "!!set {a}"],
)  # fmt: skip
def test_yaml_that_is_no_plain_value_is_one_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_yaml(text.encode())


def test_what_the_trainer_writes_is_read_back_equal(tmp_path: Path) -> None:
    config = compose(["attention=kha_mlp"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load_plain(tmp_path / "config.yaml") == to_plain(config)


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_a_value_or_a_value_error(raw: bytes) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            parse(raw)
        except ValueError:
            continue


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(_PLAIN)
def test_any_value_is_typed_or_the_one_error(value: Any) -> None:
    for schema in (Outer, Exact):
        for one in (value, {**GOOD, "inner": value}, {**GOOD, "pairs": value}, {"step": value, "kept": value}):
            try:
                SOURCE.read(schema, one)
            except DataError as error:
                str(error).encode()
    json.dumps(value)
    yaml.safe_dump(value)
