"""What DeepSpeed leaves on modules and tensors is known in the engine's room alone, and `engine.name` selects the
engine."""

from __future__ import annotations

import ast
import inspect
import re

from kha_train.engine import deepspeed, plain
from kha_train.engine.contract import Engine

ROOM = "kha_train/engine/"
ON_PARAMETERS = re.compile(r"ds_[a-z_]+")
OF_ITS_OPTIMIZERS = re.compile(
    r"_hp_mapping|_hp_param|hp_fragment|lp_fragment_address|fp32_partitioned_groups_flat|fp32_groups_flat_partition|"
    r"single_partition_of_fp32_groups|averaged_gradients|grad_position|was_step_applied|_get_norm_groups"
)


def names_in(tree: ast.AST) -> set[str]:
    """Names of attributes, and whole texts, because `getattr` takes one."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes | {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and _is_text(node)}


def test_nothing_outside_the_engine_names_what_deepspeed_leaves_behind(sources) -> None:
    offenders = [
        f"{source.path}: {name}"
        for source in sources
        if not source.path.startswith(ROOM)
        for name in names_in(source.tree)
        if ON_PARAMETERS.fullmatch(name) or OF_ITS_OPTIMIZERS.fullmatch(name)
    ]
    assert offenders == []
    named = {source.path for source in sources if any(ON_PARAMETERS.fullmatch(name) for name in names_in(source.tree))}
    assert named == {"kha_train/engine/deepspeed.py"}, "the rule sees the names where they are"


def test_nobody_outside_their_room_imports_the_module_of_an_engine(sources) -> None:
    """`engine_for` finds it by the name in the configuration."""
    modules = {"kha_train.engine.deepspeed", "kha_train.engine.plain", "kha_train.engine.zero_state"}
    users = {
        source.path
        for source in sources
        for name, _ in source.imports()
        if name in modules or name.rpartition(".")[0] in modules
    }
    assert {path for path in users if not path.startswith(ROOM)} == set()
    assert "kha_train/engine/deepspeed.py" in users, "the rule sees its own state"


def test_every_engine_offers_what_the_contract_names_and_nothing_else() -> None:
    """So nobody can rely on more than another engine would offer."""
    asked = {name for name in [*vars(Engine), *Engine.__annotations__] if not name.startswith("_")}
    for module in (deepspeed, plain):
        tree = ast.parse(inspect.getsource(module))
        (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Engine")
        methods = {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
        stored = {
            node.attr
            for node in ast.walk(cls)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
        assert {name for name in methods | stored if not name.startswith("_")} == asked, module.__name__


def _is_text(node: ast.Constant) -> bool:
    return isinstance(node.value, str)
