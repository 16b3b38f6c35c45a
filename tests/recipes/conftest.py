"""The recipes of CONTRIBUTING.md, followed as a newcomer follows them: in a copy of the tree, block by block.

A section that begins with `## How to add` is a recipe. Its fenced blocks say in their info string what is done with
them, so that page and test cannot part:

    ```python file=kha_train/optim/new.py                       a new file with this text
    ```python file=kha_train/registry.py below="OPTIMIZERS: "   these lines, below the one line that begins like that
    ```sh                                                       typed in the copy, in order

A test asks the fixture: `recipe = follow("an optimiser")`, then `recipe.touched()`, `recipe.type_commands()`,
`recipe.run("kha", "train", ...)` or `recipe.python("...")`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import git

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^## (?:How to add )?(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a recipe: its language, the options of its info string, its text."""

    language: str
    options: dict[str, str]
    text: str


@dataclass(frozen=True)
class Recipe:
    """A copy of the tree in which a recipe was followed."""

    tree: Path
    blocks: tuple[Block, ...]

    def touched(self) -> list[str]:
        """The files that differ from the checkout, as git sees them."""
        return sorted(line[3:] for line in git(self.tree, "status", "--porcelain", "-uall").splitlines())

    def type_commands(self) -> str:
        """Type the `sh` blocks in order, in one shell; returns what they print. The first that fails ends the test."""
        typed = "\n".join(block.text for block in self.blocks if block.language == "sh")
        assert typed, "the recipe has no commands"
        return self.run("bash", "-c", f"set -euo pipefail\n{typed}")

    def python(self, program: str) -> str:
        """Run `program`, with the packages of the copy; returns what it prints."""
        return self.run(sys.executable, "-c", program)

    def run(self, *command: str, code: int = 0) -> str:
        """Run `command` at the root of the copy, which must end with `code`; returns what it prints."""
        ended = subprocess.run(
            command, cwd=self.tree, env=self._environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == code, f"{shlex.join(command)} ended with {ended.returncode}:\n{ended.stdout[-6000:]}"
        return ended.stdout

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if "WANDB" not in name and "PYTEST" not in name}
        return {
            **kept,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{self.tree}:{self.tree / 'launch'}",
            "HOME": str(self.tree.parent),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONDONTWRITEBYTECODE": "1",
        }


def read_recipes(page: str) -> dict[str, tuple[Block, ...]]:
    """The blocks of each section `## How to add ...` of a page, by what is added."""
    found = {}
    for heading, following in zip(HEADING.finditer(page), [*HEADING.finditer(page)][1:] + [None], strict=True):
        if heading[0].startswith("## How to add "):
            section = page[heading.end() : following.start() if following else len(page)]
            found[heading[1]] = tuple(_read_block(*match.groups()) for match in FENCE.finditer(section))
    return found


def _read_block(info: str, text: str) -> Block:
    language, *words = shlex.split(info)
    return Block(language, dict(word.split("=", 1) for word in words), text)


def apply(block: Block, tree: Path) -> None:
    """Do in `tree` what the info string of `block` says."""
    path = tree / block.options["file"]
    below = block.options.get("below")
    if below is None:
        assert not path.exists(), f"{path} is there already: a block without below= is a new file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        return
    lines = path.read_text().splitlines(keepends=True)
    (at,) = (number for number, line in enumerate(lines) if line.startswith(below))
    path.write_text("".join([*lines[: at + 1], block.text, *lines[at + 1 :]]))


@pytest.fixture(scope="session")
def recipes() -> dict[str, tuple[Block, ...]]:
    """The recipes of CONTRIBUTING.md by what they add: "an optimiser", ..."""
    return read_recipes((ROOT / "CONTRIBUTING.md").read_text())


@pytest.fixture
def follow(recipes: dict[str, tuple[Block, ...]], checkout: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`follow("an optimiser")`: a copy of the tree in which the files of that recipe were written, or of several."""

    def copy(*added: str) -> Recipe:
        tree = tmp_path / "copy"
        git(tmp_path, "clone", "--quiet", str(checkout), str(tree))
        blocks = tuple(block for name in added for block in recipes[name])
        for block in blocks:
            if "file" in block.options:
                apply(block, tree)
        return Recipe(tree, blocks)

    return copy
