"""The rules for every file of the packages: documented, annotated, limited in length, without the usual shortcuts."""

from __future__ import annotations

import ast
import inspect
import re
import tokenize
from io import StringIO

from kha_train import errors

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
KINDS = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.KhaError)}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SUFFIX = re.compile(r"^[a-z][a-z0-9_]*_([A-Z][A-Z0-9]*)$")
"""A tensor's name with the letters of its dimensions, such as x_BTD."""


def test_every_public_name_has_a_docstring(sources) -> None:
    offenders = [source.path for source in sources if not ast.get_docstring(source.tree)]
    offenders += [where for source in sources for where, node, _ in source.public() if not ast.get_docstring(node)]
    assert offenders == []


def test_every_return_is_annotated(sources) -> None:
    offenders = [
        f"{source.path}:{node.lineno} {node.name}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, FUNCTIONS) and node.returns is None
    ]
    assert offenders == []


def test_a_public_function_that_raises_an_error_of_ours_names_it(sources) -> None:
    """In its own docstring or that of its class; `Raises as` another function is enough."""
    offenders = []
    for source in sources:
        for where, node, owner in source.public():
            if not isinstance(node, FUNCTIONS):
                continue
            told = (ast.get_docstring(node) or "") + (ast.get_docstring(owner) or "" if owner else "")
            if "Raises as `" not in told:
                offenders += [f"{where}: {kind}" for kind in sorted(_raised(node)) if kind not in told]
    assert offenders == []


def test_an_error_raised_by_a_private_function_is_named_in_its_module(sources) -> None:
    """In the docstring of the module, or of one of its functions or classes, where the caller can read it."""
    offenders = []
    for source in sources:
        named = (*FUNCTIONS, ast.ClassDef, ast.Module)
        told = " ".join(ast.get_docstring(node) or "" for node in ast.walk(source.tree) if isinstance(node, named))
        offenders += [f"{source.path}: {kind}" for kind in sorted(_raised(source.tree)) if kind not in told]
    assert offenders == []


def test_a_file_with_shape_suffixes_explains_every_letter_at_its_top(sources) -> None:
    offenders = []
    for source in sources:
        letters = {letter for name in _names(source.tree) if (match := SUFFIX.match(name)) for letter in match[1]}
        legend = _comments_before_the_imports(source)
        missing = [letter for letter in sorted(letters) if letter.isalpha() and not re.search(rf"\b{letter}\b", legend)]
        if missing:
            offenders.append(f"{source.path}: {' '.join(missing)}")
    assert offenders == []


def test_files_and_functions_keep_to_their_bounds(sources) -> None:
    offenders = [source.path for source in sources if source.text.count("\n") > MAX_FILE_LINES]
    offenders += [
        f"{source.path}:{node.lineno} {node.name}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert offenders == []


def test_nothing_is_kept_in_module_globals(sources) -> None:
    offenders = [
        f"{source.path}:{node.lineno}"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Global)
    ]
    assert offenders == []


def test_no_exception_is_caught_without_naming_its_kind(sources) -> None:
    offenders = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ExceptHandler):
                kinds = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {""}
                if kinds & {"", "Exception", "BaseException"}:
                    offenders.append(f"{source.path}:{node.lineno}")
    assert offenders == []


SWALLOWING = {
    "kha_train/distributed.py Caught": "ranks must not wait for one that is gone: the error is told to all of them",
    "kha_train/telemetry/guard.py Guard": "libraries of mirrors list no errors, and no mirror has one worth a run",
}
"""Classes whose `__exit__` may swallow any exception of its block, and the reason."""


def test_no_block_swallows_every_exception_but_those_that_say_why(sources) -> None:
    """`suppress(Exception)`, and an `__exit__` that returns more than None, are broad `except` clauses too."""
    found, offenders = set(), []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef) and any(map(_may_swallow, node.body)):
                found.add(f"{source.path} {node.name}")
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                kinds = {ast.unparse(argument) for argument in node.args}
                offenders += [f"{source.path}:{node.lineno}"] * bool(kinds & {"Exception", "BaseException"})
    assert offenders == []
    assert found == set(SWALLOWING)


def test_whoever_catches_an_error_looks_at_it(sources) -> None:
    """Except for reading ahead: the read that needs the block meets and reports the same error."""
    heedless = set()
    for source in sources:
        for node in source.tree.body:
            text = ast.unparse(node)
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and "Caught()" in text and ".error" not in text:
                heedless.add(f"{source.path} {node.name}")
    assert heedless == {"kha_train/data/remote/store.py _fetch_ahead"}


def test_what_an_exit_stack_calls_with_an_exception_lets_it_go_on(sources) -> None:
    """`push` takes a function like `__exit__`: one that returns something true swallows the exception."""
    returned: dict[str, set[str]] = {}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, FUNCTIONS):
                returned.setdefault(node.name, set()).add(ast.unparse(node.returns or node))
    pushed = {
        f"{source.path}:{node.lineno}": _called(node.args[0])
        for source in sources
        if "contextlib.ExitStack" in {name for name, _ in source.imports()}
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "push"
    }
    assert len(pushed) > 3
    assert {where: returned.get(name) for where, name in pushed.items() if returned.get(name) != {"None"}} == {}


def _called(callback: ast.expr) -> str:
    """The name of the function that `callback`, a lambda, a `partial` or a function itself, calls."""
    if isinstance(callback, ast.Lambda):
        callback = callback.body
    if isinstance(callback, ast.Call):
        is_partial = ast.unparse(callback.func) == "partial"
        callback = callback.args[0] if is_partial else callback.func
    return callback.attr if isinstance(callback, ast.Attribute) else ast.unparse(callback)


def _may_swallow(node: ast.stmt) -> bool:
    leaves = isinstance(node, FUNCTIONS) and node.name in ("__exit__", "__aexit__")
    return leaves and ast.unparse(node.returns or node) != "None"


def test_no_comment_puts_work_off(sources) -> None:
    offenders = []
    for source in sources:
        for token in tokenize.generate_tokens(StringIO(source.text).readline):
            if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
                offenders.append(f"{source.path}:{token.start[0]}: {token.string}")
    assert offenders == []


def test_every_file_postpones_annotations(sources) -> None:
    """Only then may an annotation name something that is imported only for type checkers."""
    line = "from __future__ import annotations"
    offenders = [source.path for source in sources if len(source.tree.body) > 1 and line not in source.text]
    assert offenders == []


def _raised(node: ast.AST) -> set[str]:
    """The kinds of KhaError in `raise Kind(...)` inside `node`."""
    calls = (child.exc for child in ast.walk(node) if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call))
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)} & KINDS


def _names(tree: ast.Module) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def _comments_before_the_imports(source) -> str:
    first = next((node.lineno for node in source.tree.body if isinstance(node, ast.Import | ast.ImportFrom)), 1)
    return "\n".join(line for line in source.text.splitlines()[: first - 1] if line.startswith("#"))
