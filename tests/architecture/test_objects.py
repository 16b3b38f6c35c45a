"""Objects are complete once they are made: whoever reads a class finds all of its attributes in one place."""

from __future__ import annotations

import ast

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAKING = ("__init__", "__post_init__")


def test_every_attribute_is_set_in_init_or_declared_in_its_class(sources) -> None:
    classes = [(source.path, node) for source in sources for node in ast.walk(source.tree) if _is_class(node)]
    by_name: dict[str, list[ast.ClassDef]] = {}
    for _, node in classes:
        by_name.setdefault(node.name, []).append(node)
    assert [f"{path}:{late}" for path, node in classes for late in _set_late(node, by_name)] == []


def test_an_attribute_that_another_method_adds_is_seen() -> None:
    text = """
class Base:
    shown: int
    def __init__(self):
        self.known = 1
class Late(Base):
    def begin(self):
        self.known, self.shown, self.added = 1, 2, 3
    def end(self):
        self.known += 1
        self.removed = 0
"""
    base, late = (node for node in ast.parse(text).body if _is_class(node))
    assert _set_late(late, {"Base": [base], "Late": [late]}) == ["8 Late.added", "11 Late.removed"]


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def _set_late(node: ast.ClassDef, classes: dict[str, list[ast.ClassDef]]) -> list[str]:
    """Attributes that a method of `node` sets and that neither `node` nor a base of it introduces."""
    known = _introduced(node, classes)
    methods = [method for method in node.body if isinstance(method, FUNCTIONS) and method.name not in MAKING]
    found = sorted((line, name) for method in methods for name, line in _set_in(method) if name not in known)
    return [f"{line} {node.name}.{name}" for line, name in found]


def _introduced(node: ast.ClassDef, classes: dict[str, list[ast.ClassDef]]) -> set[str]:
    names = set()
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            names.add(part.target.id)
        elif isinstance(part, ast.Assign):
            names |= {target.id for target in part.targets if isinstance(target, ast.Name)}
        elif isinstance(part, FUNCTIONS):
            # A property's setter is called by its name.
            names |= {name for name, _ in _set_in(part)} if part.name in MAKING else {part.name}
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
        for found in classes.get(name, ()):
            names |= _introduced(found, classes) if found is not node and found.name != node.name else set()
    return names


def _set_in(method: ast.AST) -> list[tuple[str, int]]:
    """(name, line) of every `self.name` that is assigned."""
    return [
        (node.attr, node.lineno)
        for node in ast.walk(method)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    ]
