"""Nothing stands in the packages for tests alone, and no docstring names what is not there."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOR_TESTS = {
    "kha_train/data/stream.py bytes_per_id": "what a validation set opened for this once says",
    "kha_train/data/stream.py validation_batches": "the same",
    "kha_train/checkpoint/background.py write": "one checkpoint in one call: what many tests of checkpoints begin with",
    "kha_train/bench/spikes.py labelled_set": "what the committed labelled set was made with, by a test that compares",
    "kha_train/stability/benchmark.py encode_labelled": "the same",
    "kha_train/model/kernels/norm_rotate.py plain_norm_rotate": "the definition that its kernel is held against",
}
"""What only tests use, and why it stands there all the same."""
FOUND_BY_OTHERS = {
    "kha_train/model/kernels/flops.py OPERATORS": "importing them registers their counts with torch",
    "kha_train/model/moe/flops.py OPERATORS": "the same",
    "kha_train/config/schema.py ScheduleSection": "a section of the tree, whose header stands with the optimisers",
    "launch/hydra_plugins/kha_slurm/__init__.py KhaSlurmLauncher": "Hydra finds its plugins by themselves",
    "kha_train/heads/folding.py fold": "for programs of other people, as the wheel kha-heads",
    "kha_train/heads/saving.py load": "the same",
    "kha_train/stability/command.py main": "the command of the wheel spike-score",
}
"""What is used by its place or its import."""
OF_OTHER_PROGRAMS = {"use_multi_rank_bucket_allreduce", "hf_token", "api_key", "eos_token", "pad_token", "eos_token_id"}
"""Names in docstrings that are DeepSpeed's, or examples of what people write."""
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def unused(sources: Iterable) -> set[str]:
    """The functions, classes and constants of modules that no other line names: `path name`. A decorator that is given
    the function is a user of it."""
    trees = {_module(source.path): source for source in sources}
    used = _used_elsewhere(trees)
    paths = {text.rpartition(":")[2] for source in sources for text in _texts(source.tree) if ":" in text}
    found = set()
    for module, source in trees.items():
        for node, name in _defined(source.tree):
            taken = any(decorator for decorator in getattr(node, "decorator_list", []) if not _keeps(decorator))
            if not (taken or (module, name) in used or name in paths or _named_beside(source.tree, node, name)):
                found.add(f"{source.path} {name}")
    return found


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _defined(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            named = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            named = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from ((node, name) for name in named if not name.startswith("__"))


def _keeps(decorator: ast.expr) -> bool:
    """Whether it leaves the function to be called by its name."""
    return any(
        word in ast.unparse(decorator) for word in ("dataclass", "cache", "contextmanager", "no_grad", "runtime")
    )


def _named_beside(tree: ast.Module, own: ast.stmt, name: str) -> bool:
    others = (node for line in tree.body if line is not own for node in ast.walk(line))
    return any(isinstance(node, ast.Name) and node.id == name for node in others)


def _used_elsewhere(trees: dict) -> set[tuple[str, str]]:
    """(module, name) of all that is imported by name or reached through its module. What a package hands on counts as
    used only where somebody takes it from there."""
    used, handed_on = set(), {}
    for module, source in trees.items():
        aliases = defaultdict(set)
        for full, _ in source.imports():
            owner, _, name = full.rpartition(".")
            if full in trees:
                aliases[name].add(full)
            elif source.path.endswith("__init__.py") and owner.startswith(module):
                handed_on[module, name] = owner, name
            else:
                used.add((owner, name))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.asname and f"{node.module}.{alias.name}" in trees:
                        aliases[alias.asname].add(f"{node.module}.{alias.name}")
            if isinstance(node, ast.Attribute):
                used |= {(owner, node.attr) for owner in aliases[ast.unparse(node.value).rpartition(".")[2]]}
    for place in list(used):
        while place in handed_on:
            place = handed_on[place]
            used.add(place)
    return used


def _texts(tree: ast.AST) -> Iterator[str]:
    yield from (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_every_function_class_and_constant_has_a_user_that_is_no_test(sources, make_source) -> None:
    plugin = "launch/hydra_plugins/kha_slurm/__init__.py"
    launcher = [make_source(plugin, (ROOT / plugin).read_text())]
    lazily = set(re.findall(r'"(\w+)"', (ROOT / "kha_train" / "__init__.py").read_text()))
    # `engine.name` selects the module of an engine.
    engines = r"kha_train/engine/(\w+|\w+/__init__)\.py Engine"
    # `telemetry.sinks` selects the module of a sink.
    by_file = re.compile(rf"{engines}|kha_train/telemetry/\w+\.py open_sink")
    unnamed = (name for name in unused([*sources, *launcher]) if not by_file.fullmatch(name))
    found = {name for name in unnamed if name.split()[1] not in lazily}
    assert found == FOR_TESTS.keys() | FOUND_BY_OTHERS.keys()


def test_what_is_only_handed_on_or_calls_only_itself_counts_as_unused(make_source) -> None:
    text = "def used(): return used\ndef handed_on(): ...\ndef itself(): return itself()\nA = 1\n"
    sources = [
        make_source("kha_train/a/one.py", text),
        make_source("kha_train/a/__init__.py", "from kha_train.a.one import handed_on, used"),
        make_source("kha_train/b.py", "from kha_train.a import one as first, used\nprint(first.A, used)"),
    ]
    assert unused(sources) == {"kha_train/a/one.py handed_on", "kha_train/a/one.py itself"}


def test_a_name_in_a_docstring_is_there(sources) -> None:
    """Of names with an underscore, which are no words: a parameter that was renamed stays in no description."""
    known = {word for path in (ROOT / "configs").rglob("*.yaml") for word in re.findall(r"\w+", path.read_text())}
    known |= {path.stem for path in (ROOT / "tests").rglob("*.py")}
    described = []
    for source in sources:
        docs = {id(node.value): node for node in ast.walk(source.tree) if isinstance(node, ast.Expr)}
        known |= set(re.findall(r"\w+", source.path))
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) in docs:
                    described.append((f"{source.path}:{node.lineno}", node.value))
                else:
                    known |= set(re.findall(r"\w+", node.value))
            known |= {getattr(node, field) for field in ("id", "attr", "arg", "name") if hasattr(node, field)}
    offenders = [
        f"{where} {name}"
        for where, text in described
        for quoted in re.findall(r"`([^`\n]+)`", text)
        for name in re.findall(r"\b[a-z]+_[a-z_]*[a-z]\b", quoted)
        if name not in known | OF_OTHER_PROGRAMS
    ]
    assert offenders == []
