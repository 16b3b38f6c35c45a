"""docs/testing.md says where each promise of the README is held, and it is so."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ((ROOT / name).read_text() for name in ("docs/testing.md", "README.md"))
TARGETS = ("make test", "make test-slow")
ELSEWHERE = {"optim": "test_optim.py"}
"""Where tests of a room are that does not have a folder of its own."""


def rows() -> list[list[str]]:
    """The cells of each promise: its words, and the tests in either target."""
    (table,) = re.findall(r"^\| promise \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def named_in(cell: str) -> list[str]:
    """The tests that a cell names; a dash names none."""
    names = re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", cell)
    assert cell == ", ".join(f"`{name}`" for name in names) or cell == "-", cell
    return names


def exists(name: str) -> bool:
    file, _, function = name.partition("::")
    path = ROOT / file
    return path.exists() and function in {getattr(node, "name", "") for node in ast.parse(path.read_text()).body}


def test_each_promise_names_tests_that_exist_and_run_where_the_table_says(collected: Mapping[str, set[str]]) -> None:
    """The session of either target collects every test; what a smaller one does not is only looked for."""
    for promise, *cells in rows():
        assert len(cells) == len(TARGETS) and named_in(cells[0]), promise
        for target, cell in zip(TARGETS, cells, strict=True):
            for name in named_in(cell):
                assert exists(name), f"{promise}: no {name}"
                if name in collected:
                    assert target in collected[name], f"{promise}: {name} is not run by {target}"


def test_every_command_of_the_readme_has_a_promise() -> None:
    commands = {found for found in re.findall(r"^\| `kha (\w+)", README, re.MULTILINE)}
    assert len(commands) > 8
    assert commands <= set(re.findall(r"`kha (\w+)", "\n".join(promise for promise, *_ in rows())))


def test_every_room_is_touched_by_the_quick_tests(collected: Mapping[str, set[str]]) -> None:
    rooms = {path.parent.name for path in (ROOT / "kha_train").glob("*/__init__.py")} | {"data_tools", "launch"}
    tried = {name.split("/")[1].partition("::")[0] for name, targets in collected.items() if TARGETS[0] in targets}
    whole = {
        path.name for path in (ROOT / "tests").glob("*") if path.name in {ELSEWHERE.get(room, room) for room in rooms}
    }
    assert whole == {ELSEWHERE.get(room, room) for room in rooms}
    if tried >= {"architecture", "train", "config"}:
        assert {ELSEWHERE.get(room, room) for room in rooms} <= tried


def test_both_targets_together_run_every_test_but_those_of_soak() -> None:
    makefile = (ROOT / "Makefile").read_text()
    quick, slow = (
        re.search(rf"^{target}:.*\n\t\$\(PYTEST\) -m '([^']+)'", makefile, re.MULTILINE)
        for target in ("test", "test-slow")
    )
    assert quick and slow
    for marks in ({}, {"slow"}, {"quick"}, {"slow", "quick"}, {"soak"}, {"slow", "soak"}):
        names = {name: name in marks for name in ("slow", "quick", "soak")}
        chosen = [eval(expression[1], {}, names) for expression in (quick, slow)]
        assert sum(chosen) == ("soak" not in marks), marks
