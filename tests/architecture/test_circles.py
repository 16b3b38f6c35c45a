"""No circle of any kind: not between modules, nor between rooms, an import for types or inside a function included.

What the type checker or a later call needs is needed as well: in a circle no part can be read, tested or moved alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

import pytest


def module_name(path: str) -> str:
    """The dotted name of the module in the file `path`."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def module_graph(sources: Iterable) -> dict[str, set[str]]:
    """Every module with those it imports: at the top, inside functions, for type checkers, by `import_module`."""
    trees = {module_name(source.path): source for source in sources}
    return {name: _imported(source, trees.keys()) - {name} for name, source in trees.items()}


def _imported(source, known: Iterable[str]) -> set[str]:
    named = [name for name, _ in source.imports()]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named += [text.value for text in node.args if isinstance(text, ast.Constant)]
    return {found for name in named if (found := _longest_known(name, known))}


def _longest_known(name: str, known: Iterable[str]) -> str:
    """The module that `name`, maybe something in it, stands for; "" where it is none of ours."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def room_graph(sources: Iterable) -> dict[str, set[str]]:
    """Every room with those that one of its modules imports from."""
    rooms = {module_name(source.path): source.room for source in sources}
    graph: dict[str, set[str]] = {room: set() for room in rooms.values()}
    for name, imported in module_graph(sources).items():
        graph[rooms[name]] |= {rooms[other] for other in imported} - {rooms[name]}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of `graph`, its first member again at the end; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_module_imports_itself_by_way_of_others(sources) -> None:
    assert circle(module_graph(sources)) == []


def test_no_room_imports_itself_by_way_of_others(sources) -> None:
    assert circle(room_graph(sources)) == []


@pytest.mark.parametrize(
    "back",
    [
        "from kha_train.a.one import x",
        "def later():\n    from kha_train.a import one",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kha_train.a.one",
        "from importlib import import_module\n\ndef later():\n    return import_module('kha_train.a.one')",
    ],
)
def test_an_import_is_seen_at_the_top_inside_a_function_for_types_and_by_name(back: str, make_source) -> None:
    one = make_source("kha_train/a/one.py", "from kha_train.b import two")
    two = make_source("kha_train/b/two.py", back)
    for graph in (module_graph([one, two]), room_graph([one, two])):
        assert len(circle(graph)) == 3
    assert circle(module_graph([one, make_source("kha_train/b/two.py", "import json")])) == []
