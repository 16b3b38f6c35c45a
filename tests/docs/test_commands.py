"""The code blocks of README and docs work as written, typed in order from an empty directory (tools/type_pages.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import git
from tools.type_pages import (
    FIRST_HOUR,
    LANGUAGES,
    MARK,
    NEEDS,
    PAGES,
    ROOT,
    Typed,
    blocks,
    counted,
    timed,
    type_page,
    unmet,
    without_network,
)

FOLLOWED = ("CONTRIBUTING.md",)
"""Pages whose blocks are typed by tests of their own: the recipes, by tests/recipes."""
COMMAND = re.compile(r"^(\$ |kha |pip |python |make |sbatch |for |cat |git |docker |spike-score )", re.MULTILINE)


@pytest.fixture(scope="module")
def typed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Typed]:
    """`typed(page)`: what came of typing it, with the packages of a clean clone, after the pages of `PAGES` that every
    other page builds on."""
    folder = tmp_path_factory.mktemp("typed")
    clone = tmp_path_factory.mktemp("clone") / "kha_train"
    git(clone.parent, "clone", "--quiet", str(checkout), str(clone))
    done: dict[str, Typed] = {}

    def ask(name: str) -> Typed:
        for page in dict.fromkeys((*PAGES[:2], name) if name != FIRST_HOUR else (name,)):
            if page not in done:
                done[page] = type_page(page, folder, clone)
        return done[name]

    return ask


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_work_as_typed(
    name: str, typed: Callable[[str], Typed], record_property: Callable[[str, Any], None]
) -> None:
    """The first hour begins in an empty directory. As far as possible without a GPU, SLURM and so on: other blocks say
    what they need."""
    page = typed(name)
    record_property("told", timed(page, commands=name == FIRST_HOUR))
    assert page.faults == []


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not without_network(), reason="this machine has no network namespaces")
def test_security_the_first_hour_needs_no_network(typed: Callable[[str], Typed], tmp_path: Path) -> None:
    """Every page is typed in a namespace whose only device is its loopback."""
    text = '```sh\npython -c "import socket; print(socket.if_nameindex())"\n```\n'
    assert "\n[(1, 'lo')]\n" in type_page("devices", tmp_path, text=text).output
    assert typed(FIRST_HOUR).faults == []


def test_every_block_of_every_page_is_typed_or_says_why_not(record_property: Callable[[str, Any], None]) -> None:
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in _pages()}
    assert {name for name, text in texts.items() if blocks(text)} == {*PAGES, *FOLLOWED}
    for name in PAGES:
        for block in blocks(texts[name]):
            place = f"{name}:{block.line}"
            assert block.language in LANGUAGES, place
            assert {word.partition("=")[0] for word in block.info[1:]} <= {"exit", "file"}, place
            assert block.needs in ("", *NEEDS), place
            assert block.language or not COMMAND.search(block.text), f"{place} has commands, but no language"
    record_property("told", [counted(texts[name] for name in PAGES)])


def _pages() -> list[Path]:
    """README, its neighbours, and what is below docs/."""
    return [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "kha_train").rglob("*.md")]


def _typed(folder: Path, text: str) -> Typed:
    return type_page("page.md", folder, text=text)


def test_a_command_that_breaks_ends_the_page_at_its_block(tmp_path: Path) -> None:
    text = "```sh\nmkdir a\n```\nThen\n```sh\ncd a\nkha_no_such_command\ntouch after\n```\n```sh\ntouch later\n```\n"
    page = _typed(tmp_path, text)
    assert page.code == 127 and page.output.count(MARK) == 2 and "page.md:5" in page.faults[0]
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["a"] and not [*(tmp_path / "a").iterdir()]


@pytest.mark.parametrize(("code", "expected"), [(2, 0), (3, 1), (0, 1)])
def test_a_block_must_end_with_the_code_that_its_page_names(tmp_path: Path, code: int, expected: int) -> None:
    assert _typed(tmp_path, f"```sh exit=2\nexit {code}\n```\n").code == expected


def test_what_cannot_run_here_is_left_out_and_counted_and_blocks_share_a_shell(tmp_path: Path) -> None:
    left_out = "```sh\n# needs a GPU: eight of them\nfalse\n```\n```text\nfalse\n```\n```\na layout\n```\n"
    text = f"```sh\nA=1\n```\n{left_out}```sh\necho $A\n```\n```yaml file=b/c.yaml\nd: 1\n```\n"
    page = _typed(tmp_path, text)
    assert page.code == 0 and "\n1\n" in page.output and (tmp_path / "b/c.yaml").read_text() == "d: 1\n"
    assert counted([text]) == ("6 blocks: 3 typed, 1 needs a GPU, 1 compared with output, 1 formulas and layouts")


def test_a_text_block_is_held_against_what_was_printed(tmp_path: Path) -> None:
    text = "```sh\nprintf 'one 1.25\\nother\\ntwo\\n'\n```\n```text\none ...\ntwo\n```\n"
    page = _typed(tmp_path, text)
    assert unmet(text, page.output) == []
    assert unmet(text.replace("two\n```", "three\n```"), page.output) == ["line 4: three"]


def test_each_line_of_a_console_block_ends_with_its_code_and_prints_what_follows(tmp_path: Path) -> None:
    text = "```console exit=3\n$ echo one; exit 3\none\n$ echo two; exit 3\nt...o\n```\n"
    page = _typed(tmp_path, text)
    assert page.code == 0 and unmet(text, page.output) == []
    assert unmet(text.replace("\none", "\nother"), page.output) == ["line 1: other"]
    assert _typed(tmp_path, text.replace("two; exit 3", "two")).code == 1


def test_the_seconds_of_a_command_stand_beside_it(tmp_path: Path) -> None:
    page = _typed(tmp_path, "```sh\nA=(1 2)\nsleep 0.6\necho ${A[1]}\n```\n")
    seconds = {command: took for command, took in page.seconds}
    assert seconds["sleep 0.6"] >= 0.6 and {"A=(1 2)", "echo ${A[1]}"} <= {*seconds}
    assert timed(page)[0].endswith(" s  sleep 0.6") and " s  in all: page.md (" in timed(page)[-1]
