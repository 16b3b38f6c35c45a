"""The sources of the packages, parsed once."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kha_train", "data_tools")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WHEELS = {"heads": {"torch", "safetensors"}, "stability": set()}
"""Rooms that are also packages under another name, and import their own modules relatively -> what else they need."""


@dataclass(frozen=True)
class Source:
    """One file: `path` from the root of the checkout, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The package it belongs to: `config`, `data_tools`, ...; `kha_train` for the package itself."""
        parts = self.path.removesuffix(".py").split("/")
        if parts[0] != "kha_train":
            return parts[0]
        return {"__init__": "kha_train", "__main__": "cli"}.get(parts[1], parts[1])

    def imports(self) -> Iterator[tuple[str, ast.stmt]]:
        """Every imported module, at any depth; `from a import b` counts as `a.b`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, node) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= (self.room in WHEELS), f"{self.path}:{node.lineno}: relative import"
                module = f"kha_train.{self.room}.{node.module}" if node.level else node.module
                yield from ((f"{module}.{alias.name}", node) for alias in node.names)

    def public(self) -> Iterator[tuple[str, ast.AST, ast.ClassDef | None]]:
        """Public classes, functions and methods, with the class that contains them."""
        yield from self._public_in(self.tree.body, None)

    def _public_in(self, body: list[ast.stmt], owner: ast.ClassDef | None) -> Iterator:
        for node in body:
            if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_") or _is_setter(node):
                continue
            yield f"{self.path}:{node.lineno} {node.name}", node, owner
            if isinstance(node, ast.ClassDef):
                yield from self._public_in(node.body, node)


def _is_setter(node: ast.AST) -> bool:
    """A property's setter is described by its getter."""
    return any(isinstance(line, ast.Attribute) and line.attr == "setter" for line in node.decorator_list)


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """Every Python file of the packages."""
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    found = [_source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]
    assert len(found) > 50
    return found


@pytest.fixture(scope="session")
def make_source() -> Callable[[str, str], Source]:
    """`make_source(path, text)`: a file that is not there, to try a rule on."""
    return _source


def _source(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text))
