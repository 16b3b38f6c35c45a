"""`make lint` checks types strictly; these tests cover what a type checker does not: that nothing is exempt from it."""

from __future__ import annotations

import ast
import re
import tokenize
import tomllib
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

UNTYPED = {
    "kha_train/cli/options.py OverridesCommand.parse_args": "a context of the click that Typer carries inside",
    "kha_train/config/build.py variant_class": "one of two families of options, or any dataclass",
    "kha_train/variants/registry.py Variant.load": "the class of a module, which a room without torch cannot name",
    "kha_train/data/sentencepiece_model.py specification": "a message that protobuf makes at run time",
    "kha_train/engine/zero_state.py owned_gradients": "DeepSpeed's optimiser",
    "kha_train/engine/zero_state.py partitioned_fragments": "DeepSpeed's optimiser",
    "kha_train/engine/zero_state.py replicated_fragments": "DeepSpeed's optimiser",
    "kha_train/export/hugging_face.py load_tokenizer": "a tokenizer of transformers",
    "kha_train/model/host.py spare_the_compiler": "any function of torch",
    "kha_train/model/kernels/launch.py Call.kernel": "a program for Triton",
    "kha_train/model/moe/megablocks.py Kernels.gmm": "a function of megablocks",
    "kha_train/model/moe/megablocks.py Kernels.ops": "a module of megablocks",
    "kha_train/model/recompute.py kept": "an operator of torch and its arguments",
    "kha_train/model/recompute.py runner": "a block's forward, recomputed or not",
}
"""Public names with `Any` in their signature, and what it stands for."""
JSON_OBJECTS = {"dict[str, Any]", "Mapping[str, Any]"}
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]


def test_lint_checks_every_package_strictly() -> None:
    """`make lint` runs the checker, not a test: with its cache a second run takes about a second."""
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None and "$(BIN)/mypy\n" in lint[1]
    assert SETTINGS["strict"] is True
    assert set(SETTINGS["files"]) == {"kha_train", "data_tools"}


def test_no_room_is_exempt_and_only_programs_for_triton_are_checked_less_strictly() -> None:
    """Other exceptions are packages without types, each used in one place."""
    ours = [override for override in SETTINGS["overrides"] if any(map(_is_ours, override["module"]))]
    assert not [override for override in SETTINGS["overrides"] if "ignore_errors" in override]
    assert len(ours) == 1
    assert all(re.fullmatch(r"kha_train\.model\.kernels\.(language|\w+_kernels)", name) for name in ours[0]["module"])


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in SETTINGS["files"]


def test_an_ignored_type_error_names_its_code_and_its_reason(sources) -> None:
    """The reason stands behind it on the line, or in a comment on the line above."""
    offenders = []
    for source in sources:
        lines = source.text.splitlines()
        for token in tokenize.generate_tokens(StringIO(source.text).readline):
            if token.type != tokenize.COMMENT or "type: ignore" not in token.string:
                continue
            row = token.start[0]
            coded = re.match(r"# type: ignore\[[a-z-]+\]", token.string)
            reasoned = re.search(r"\]  # \w+", token.string) or lines[row - 2].lstrip().startswith("# ")
            if not (coded and reasoned):
                offenders.append(f"{source.path}:{row}: {token.string}")
    assert offenders == []


def test_no_public_signature_says_any_but_of_json(sources) -> None:
    """`Json` is a value from a file, `dict[str, Any]` an object of it, as is `**fields: Any`; the rest is typed, or
    listed in `UNTYPED`, which lists nothing else.
    """
    untyped = {
        f"{source.path} {owner.name + '.' if owner else ''}{node.name if field is None else field}"
        for source in sources
        for node, owner, field, annotation in _seams(source)
        if _says_any(annotation)
    }
    assert untyped == set(UNTYPED)


def _seams(source) -> Iterator[tuple[ast.AST, ast.ClassDef | None, str | None, ast.expr]]:
    """Annotations of parameters, results and fields of public names."""
    for _, node, owner in source.public():
        if isinstance(node, ast.ClassDef):
            lines = (
                line for line in node.body if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            )
            yield from ((node, node, f.target.id, f.annotation) for f in lines if not f.target.id.startswith("_"))
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg]
        annotations = [node.returns, *(argument.annotation for argument in given if argument)]
        yield from ((node, owner, None, annotation) for annotation in annotations if annotation)


def _says_any(annotation: ast.expr) -> bool:
    if isinstance(annotation, ast.Name):
        return annotation.id == "Any"
    if ast.unparse(annotation) in JSON_OBJECTS:
        return False
    return any(_says_any(part) for part in ast.iter_child_nodes(annotation) if isinstance(part, ast.expr))
