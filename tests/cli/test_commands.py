"""The command imports what its sub-command needs, and nothing for the others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from kha_train.cli.main import COMMANDS, HIDDEN, build


def test_a_sub_command_imports_no_other() -> None:
    program = (
        "import sys\n"
        "from kha_train.cli.main import run\n"
        "try:\n    run(['plan', '--json'])\n"
        "except SystemExit:\n    pass\n"
        "found = [name for name in sys.modules if name.startswith('kha_train.cli.')]\n"
        "print(*sorted(found), 'torch' in sys.modules, file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    own = ["main", "options", "output", "plan", "train"]
    assert answer.stderr.split() == [*(f"kha_train.cli.{name}" for name in own), "False"]


def test_the_help_of_all_waits_for_no_large_library() -> None:
    program = (
        "import sys\n"
        "from kha_train.cli.main import run\n"
        "try:\n    run(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "large = {'torch', 'transformers', 'lm_eval', 'scipy', 'sklearn', 'matplotlib', 'wandb'}\n"
        "print(*sorted(large & set(sys.modules)), file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage: " in answer.stdout and answer.stderr == "\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_sub_command_keeps_its_name_alone_and_among_the_others(name: str) -> None:
    alone = CliRunner().invoke(build([name]), [name, "--help"])
    assert alone.exit_code == 0 and f"kha {name}" in alone.output


def test_the_help_lists_all_but_the_hidden() -> None:
    listed = typer.main.get_command(build(list(COMMANDS))).commands
    assert list(listed) == list(COMMANDS)
    assert {name for name, command in listed.items() if command.hidden} == set(HIDDEN)


def test_no_help_tells_users_which_class_an_error_has() -> None:
    """Docstrings of commands name it from "Raises" on; the text before is shown in full."""
    command = typer.main.get_command(build(list(COMMANDS)))
    helps = dict(_helps(command, "kha"))
    assert {"kha train", "kha data verify", "kha checkpoint verify", "kha bench step"} <= helps.keys()
    assert not [name for name, text in helps.items() if "Raises" in text or not text]
    assert helps["kha checkpoint verify"] == "Read every byte and compare it with its manifest."
    assert helps["kha data inspect"].endswith("document borders are shown as ‖.")


def _helps(command, name: str):
    yield name, command.help or ""
    for below, one in getattr(command, "commands", {}).items():
        yield from _helps(one, f"{name} {below}")
