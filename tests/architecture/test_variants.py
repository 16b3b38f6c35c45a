"""A variant is known by what it says of itself: no module but its own and the registry names it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import get_args

from kha_train.variants.attention import POSITIONS, Positions
from kha_train.variants.registry import BASES, INTERACTIONS

VARIANTS = BASES | INTERACTIONS
ORDINARY_WORDS = {"none", "explicit", "learned", "linear", "diff"}
"""Names that other settings and sentences use too: those are looked for in comparisons alone."""
JUDGED = ("base.name", "interaction.name", "options.name", "positions")
"""How the left side of such a comparison ends."""
CHOOSES_PRESETS = {"bench", "cli", "export", "operate"}
"""Rooms that type presets as a user would: `export` those that models of other people are, and their heads."""
OWN = {
    "kha_train/variants/registry.py",
    *(f"{variant.path.partition(':')[0].replace('.', '/')}.py" for variant in VARIANTS.values()),
    *(f"{variant.options_class().__module__.replace('.', '/')}.py" for variant in VARIANTS.values()),
    *(f"kha_train/model/kernels/{name}.py" for name in VARIANTS),
}
OF_POSITIONS = {"kha_train/variants/attention.py", "kha_train/variants/bases.py", "kha_train/config/schema.py"}
"""Where the traits of positions stand, the fix of bases that need rotation, and the default."""


def test_no_module_but_its_own_names_an_attention_variant(sources) -> None:
    word = re.compile(rf"\b({'|'.join(VARIANTS.keys() - ORDINARY_WORDS)})\b")
    offenders = [
        f"{source.path}:{node.lineno}: {node.value!r}"
        for source in sources
        if source.room not in CHOOSES_PRESETS and source.path not in OWN
        for node in texts(source.tree)
        if word.search(node.value)
    ]
    assert offenders == []


def test_no_module_compares_the_name_of_a_variant_or_of_positions(sources) -> None:
    """Whatever the name: a trait says it."""
    names = {*VARIANTS, *POSITIONS}
    offenders = []
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(JUDGED):
                compared = {text.value for side in node.comparators for text in texts(side)}
                offenders += [f"{source.path}:{node.lineno}"] if compared & names else []
    assert offenders == []


def test_positions_are_named_where_their_traits_stand(sources) -> None:
    assert set(POSITIONS) == set(get_args(Positions))
    offenders = [
        f"{source.path}:{node.lineno}: {node.value!r}"
        for source in sources
        if source.room not in CHOOSES_PRESETS and source.path not in OF_POSITIONS
        for node in texts(source.tree)
        if node.value in POSITIONS.keys() - ORDINARY_WORDS or re.search(r"positions=(rope|alibi|learned)\b", node.value)
    ]
    assert offenders == []


def test_the_class_of_a_variant_or_of_its_options_is_imported_by_variants_alone(sources) -> None:
    classes = {variant.path.partition(":")[2] for variant in VARIANTS.values()}
    # What a variant without options of its own has is the contract.
    classes |= {variant.options_class().__name__ for variant in VARIANTS.values()} - {"InteractionOptions"}
    offenders = [
        f"{source.path}:{node.lineno}: {name}"
        for source in sources
        if source.room not in CHOOSES_PRESETS and source.path not in OWN
        for name, node in source.imports()
        if name.rpartition(".")[2] in classes
    ]
    assert offenders == []


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """Every string but docstrings and the notes under a name."""
    notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes:
            yield node


ASKS = {
    "decide",
    "decide_plan",
    "resolve",
    "resolve_plan",
    "backend_problem",
    "triton_problem",
    "precision_on",
    "implementation",
}
MAY_ASK = {
    "kha_train/model/device.py",
    "kha_train/model/attention/measured.py",
    "kha_train/model/kernel_choice.py",
    "kha_train/model/decoder.py",
}
"""In the model's room: what asks about this machine's device, what measures backends and kernels before a run is built,
and the default of a notebook."""


def test_the_model_is_given_what_runs_and_does_not_ask(sources) -> None:
    offenders = [
        f"{source.path}:{node.lineno}: {name}"
        for source in sources
        if source.room == "model" and source.path not in MAY_ASK
        for name, node in source.imports()
        if name.rpartition(".")[0] == "kha_train.config.resolve" and name.rpartition(".")[2] in ASKS
    ]
    assert offenders == []


def test_every_decoder_that_the_package_builds_is_given_what_runs(sources) -> None:
    """The default is for tests and notebooks."""
    given = [
        (f"{source.path}:{node.lineno}", len(node.args))
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "build_decoder"
    ]
    assert len(given) >= 3 and [where for where, count in given if count != 2] == []
