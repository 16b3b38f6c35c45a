"""What several tests need stands in one place: a fixture of `conftest.py`, or a file beside them."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SHORT = 40
"""Characters of a body that may be written as often as one likes."""


def bodies(path: Path) -> list[str]:
    """The bodies of the functions in a file, without docstrings, their parameters by position."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_"):
            given = {argument.arg: f"_{place}" for place, argument in enumerate(node.args.args)}
            lines = node.body[1:] if ast.get_docstring(node) else node.body
            for part in (part for line in lines for part in ast.walk(line)):
                if isinstance(part, ast.Name):
                    part.id = given.get(part.id, part.id)
            found.append("\n".join(map(ast.unparse, lines)))
    return [text for text in found if len(text) > SHORT]


def test_no_helper_is_written_three_times() -> None:
    places = defaultdict(set)
    for path in sorted(TESTS.rglob("*.py")):
        for text in bodies(path):
            places[text].add(path.relative_to(TESTS).as_posix())
    assert {text: sorted(files) for text, files in places.items() if len(files) > 2} == {}


def test_a_helper_is_known_by_what_it_does_whatever_its_names_are(tmp_path: Path) -> None:
    texts = [
        f'def {name}({given}):\n    "{doc}"\n    return [{given} + n for n in range(10) if n != {given}] + [0]\n'
        for name, given, doc in (("one", "a", "x"), ("two", "b", "y"))
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.py").write_text(text)
    first, second = (bodies(tmp_path / f"{number}.py") for number in (0, 1))
    assert first == second and len(first) == 1
