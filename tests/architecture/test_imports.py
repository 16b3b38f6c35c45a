"""Which room may import which, and where each third-party package is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.architecture.conftest import WHEELS

ROOT = Path(__file__).resolve().parents[2]

LAYERS = (
    {"interpreter", "literal", "metric", "output"},
    {"collectives", "errors", "heads", "stability"},
    {"foreign"},
    {"variants"},
    {"config"},
    {"distributed", "record"},
    {"data", "model", "optim"},
    {"checkpoint", "telemetry"},
    {"estimate"},
    {"engine"},
    {"decode"},
    {"evaluate"},
    {"analysis"},
    {"data_tools", "export"},
    {"train"},
    {"bench", "operate"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}

EVERYWHERE = {"numpy", "torch"}
WITHOUT_TORCH = {"kha_train", "errors", "metric", "stability", "variants", "config", "record", "cli"}
"""Rooms that never import torch themselves: settings, records and help must not wait for it."""

AT_THE_TOP = {
    "packaging": ("kha_train/operate/doctor/versions.py",),
    "typer": ("kha_train/cli/",),
    "rich": ("kha_train/cli/", "kha_train/telemetry/", "kha_train/analysis/"),
    "yaml": ("kha_train/foreign/documents.py", "kha_train/train/"),
    "safetensors": ("kha_train/checkpoint/", "kha_train/export/", "kha_train/heads/"),
}
BEHIND_A_DOOR = {
    "datasets": ("kha_train/evaluate/harness.py",),
    "deepspeed": ("kha_train/engine/deepspeed.py",),
    "flash_attn": ("kha_train/model/attention/backends.py",),
    "flash_attn_interface": ("kha_train/model/attention/backends.py",),
    "fsspec": ("kha_train/data/remote/store.py",),
    "gigatoken": ("kha_train/data/fast_encoder.py",),
    "hydra": ("kha_train/config/compose.py",),
    "huggingface_hub": ("kha_train/evaluate/harness.py", "kha_train/export/hugging_face.py"),
    "jinja2": ("kha_train/evaluate/harness.py",),
    "lm_eval": ("kha_train/evaluate/harness.py",),
    "matplotlib": ("kha_train/analysis/",),
    "megablocks": ("kha_train/model/moe/megablocks.py",),
    "omegaconf": ("kha_train/config/compose.py",),
    "scipy": ("kha_train/analysis/heads/assignment.py",),
    "sklearn": ("kha_train/analysis/kernel_pca/digits.py",),
    "pyarrow": ("data_tools/packed.py", "data_tools/parquet.py"),
    "sentencepiece": ("kha_train/data/sentencepiece_model.py",),
    "tokenizers": ("kha_train/data/tokenizer_json.py",),
    "tensorboard": ("kha_train/telemetry/tensorboard.py",),
    "transformers": ("kha_train/export/hugging_face.py",),
    "triton": ("kha_train/model/kernels/language.py",),
    "wandb": ("kha_train/telemetry/wandb.py",),
}
"""Imported inside a function, or guarded: none of them may be needed to import the package."""

FENCE = AT_THE_TOP | BEHIND_A_DOOR
BUILT_BY_USERS = {"flash_attn_interface"}
"""Modules that no index publishes: a user builds them."""
DISTRIBUTIONS = {"hydra-core": "hydra", "pyyaml": "yaml", "scikit-learn": "sklearn"}
"""Packages whose name to install differs from the name to import."""


def test_a_room_imports_only_from_rooms_below_it(sources) -> None:
    offenders = []
    for source in sources:
        for name, node in source.imports():
            room = _room(name)
            if room is None or room == source.room:
                continue
            if source.room == "kha_train" or room not in LEVEL or LEVEL[room] >= LEVEL[source.room]:
                offenders.append(f"{source.path}:{node.lineno}: {source.room} imports {name}")
    assert offenders == []


def test_every_room_stands_in_the_order(sources) -> None:
    assert {source.room for source in sources} - {"kha_train"} <= set(LEVEL)


@pytest.mark.parametrize("room", WHEELS)
def test_a_room_that_is_a_package_needs_nothing_of_the_trainer(room: str, sources) -> None:
    """`kha_train/heads` is built as kha_heads too, `kha_train/stability` as spike_score: they import what they say they
    need, and themselves only relatively.
    """
    offenders = []
    for source in sources:
        for node in ast.walk(source.tree) if source.room == room else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            allowed = sys.stdlib_module_names | WHEELS[room]
            offenders += [f"{source.path}: {name}" for name in names if name.partition(".")[0] not in allowed]
    assert offenders == []


def test_each_third_party_package_enters_through_its_own_door(sources) -> None:
    offenders = []
    for source in sources:
        for name, node in source.imports():
            package = _third_party(name)
            if package is None or package in EVERYWHERE:
                continue
            if not source.path.startswith(FENCE.get(package, ())):
                offenders.append(f"{source.path}:{node.lineno}: {package}")
    assert offenders == []


def test_packages_behind_a_door_are_imported_inside_functions_or_guarded(sources) -> None:
    offenders = []
    for source in sources:
        unguarded = {id(node) for node in _at_import_time(source.tree)}
        for name, node in source.imports():
            if _third_party(name) in BEHIND_A_DOOR and id(node) in unguarded:
                offenders.append(f"{source.path}:{node.lineno}: {name}")
    assert offenders == []


def test_matplotlib_has_one_place(sources) -> None:
    places = {source.path for source in sources for name, _ in source.imports() if _third_party(name) == "matplotlib"}
    assert len(places) == 1


def test_building_a_model_loads_no_kernel() -> None:
    program = (
        "import sys, kha_train.model.decoder\n"
        "from kha_train.model import device\n"
        "from kha_train.model.kernels import compiler, knocking_mlp, launch\n"
        "print('triton' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "False"


def test_settings_records_and_the_command_line_do_not_import_torch(sources) -> None:
    offenders = [
        f"{source.path}:{node.lineno}"
        for source in sources
        if source.room in WITHOUT_TORCH
        for name, node in source.imports()
        if _third_party(name) == "torch"
    ]
    assert offenders == []


def test_every_imported_package_is_a_declared_dependency_and_every_core_dependency_is_imported(sources) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = {_import_name(requirement) for requirement in project["dependencies"]}
    extra = {_import_name(name) for group in project["optional-dependencies"].values() for name in group}
    imported = {_third_party(name) for source in sources for name, _ in source.imports()} - {None}
    assert imported - core - extra - BUILT_BY_USERS == set()
    assert core - imported == set()


def test_importing_the_package_and_the_schema_loads_nothing_heavy() -> None:
    heavy = sorted({"torch", "numpy", "yaml", "rich", "typer", *BEHIND_A_DOOR})
    program = (
        "import sys, kha_train, kha_train.errors\n"
        "from kha_train.config import build, schema, validate\n"
        "from kha_train.variants import attention, registry\n"
        f"print(sorted(set({heavy}) & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == "[]"


def test_a_refused_configuration_needs_no_torch() -> None:
    program = (
        "import sys\n"
        "from kha_train.cli.main import run\n"
        "try:\n    run(['train', 'model=huge'])\n"
        "except SystemExit as ended:\n    print(ended.code, 'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.split() == ["2", "False"]


def _room(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] == "data_tools":
        return "data_tools"
    return parts[1] if parts[0] == "kha_train" and len(parts) > 1 else None


def _third_party(name: str) -> str | None:
    package = name.partition(".")[0]
    return None if package in sys.stdlib_module_names | {"kha_train", "data_tools"} else package


def _import_name(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower()
    return DISTRIBUTIONS.get(name, name.replace("-", "_"))


def _at_import_time(node: ast.AST) -> list[ast.stmt]:
    """Import statements that run when the module is imported, outside `try` and `if TYPE_CHECKING`."""
    found: list[ast.stmt] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            found.append(child)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.Lambda):
            found += _at_import_time(child)
    return found
