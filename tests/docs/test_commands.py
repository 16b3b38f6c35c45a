"""The commands of README and docs work as written, typed in order from an empty directory.

The info string of a block says what it is:

    ```sh                  typed; every command ends with 0
    ```sh exit=2           typed; the last command ends with 2
    ```sh needs=slurm      shown; cannot run without what it names, see `NEEDS`
    ```text                what the block before it prints, in order among its output; `...` stands for anything
    ```console exit=2      both: each line after `$ ` is typed and ends with 2 (0 unless named), the others are printed
    ```python              typed at an interpreter, as `sh` is at a shell

Blocks of a page share one shell: a variable or a directory that one sets is there for the next.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TYPED = ("README.md", "docs/launch.md", "docs/configuration.md", "docs/resume.md", "docs/export.md")
"""In this order, in one directory: later pages use the data that the first one makes."""
TUTORIAL = "docs/tutorial.md"
"""A page that begins by itself."""
LANGUAGES = ("sh", "text", "console", "python")

NEEDS = {
    "checkout": "files of a checkout, or an installation",
    "gpu": "a CUDA device",
    "network": "a download",
    "slurm": "a cluster",
}
FENCE = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1[ ]*$", re.MULTILINE | re.DOTALL)
MARK = "### "


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins in its page, the words of its info string, and its text."""

    line: int
    info: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        """The first word of the info string."""
        return self.info[0] if self.info else ""

    def option(self, name: str) -> str:
        """The value of `name=VALUE` in the info string; "" without."""
        return next((word.partition("=")[2] for word in self.info if word.startswith(f"{name}=")), "")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page's text, in order."""
    return [
        Block(page.count("\n", 0, found.start()) + 1, tuple(found[2].split()), found[3])
        for found in FENCE.finditer(page)
    ]


def script(page: Path, text: str) -> str:
    """The bash script that types the commands of the page's `text`. Before each block it prints `MARK` and the
    position. It ends with the code of the first command that fails, or with 1 if one has not failed as expected.
    """
    lines = ["set -eo pipefail", "export COLUMNS=120"]
    for block in blocks(text):
        if block.language == "text" or block.option("needs"):
            continue
        lines.append(f"echo {shlex.quote(f'{MARK}{page.name}:{block.line}')}")
        expected = block.option("exit")
        for command in _typed(block):
            lines += [command] if not expected else ["set +e", f"(\n{command}\n)", "ended=$?", "set -e"]
            if expected:
                lines.append(f'[ "$ended" = {expected} ] || {{ echo "ended with $ended, not {expected}"; exit 1; }}')
    return "\n".join([*lines, f"echo '{MARK}end'", ""])


def _typed(block: Block) -> list[str]:
    """What is typed of a block, in parts that end one by one."""
    if block.language == "console":
        return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    return [f"python - <<'END'\n{block.text}END" if block.language == "python" else block.text.rstrip()]


def unmet(text: str, output: str) -> list[str]:
    """The lines of `text` blocks that the output of `script` lacks, each with its place. A line may break anywhere, and
    others may stand between."""
    parts = dict(re.findall(rf"^{MARK}\S+?:(\d+)\n(.*?)(?=^{MARK})", output, re.MULTILINE | re.DOTALL))
    lacking, said = [], ""
    for block in blocks(text):
        if block.language != "text":
            said = re.sub(r"\s+", " ", parts.get(str(block.line), ""))
        if block.language not in ("text", "console") or not said:
            continue
        at = 0
        for line in block.text.splitlines():
            if line.startswith("$ ") or not line.strip():
                continue
            pattern = ".*?".join(map(re.escape, re.sub(r"\s+", " ", line.strip()).split("...")))
            found = re.compile(pattern).search(said, at)
            if found is None:
                lacking.append(f"line {block.line}: {line.strip()}")
            at = found.end() if found else at
    return lacking


def _type(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Type the commands of `page` in `folder`, with this interpreter's environment first in PATH and no terminal."""
    kept = {name: value for name, value in os.environ.items() if name != "KHA_LAUNCH" and "WANDB" not in name}
    environment = {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch")]),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        ["bash", "-c", script(page, page.read_text())],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.timeout(3000)
def test_the_commands_of_readme_and_docs_run_in_order_from_an_empty_directory(tmp_path: Path) -> None:
    """As far as possible without GPU and SLURM: other blocks say what they need."""
    for name in TYPED:
        _check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.minutes
@pytest.mark.timeout(1800)
def test_the_tutorial_leads_from_text_to_an_answer_in_an_empty_directory(tmp_path: Path) -> None:
    _check(TUTORIAL, tmp_path)


def _check(name: str, folder: Path) -> None:
    """Type the page `name` in `folder`."""
    page = ROOT / name
    ended = _type(page, folder)
    place = re.findall(f"^{MARK}(.*)$", ended.stdout, re.MULTILINE)[-1:]
    assert ended.returncode == 0, f"{name}, block at {place}:\n{ended.stdout[-4000:]}"
    assert unmet(page.read_text(), ended.stdout) == []


@pytest.mark.parametrize("name", [*TYPED, TUTORIAL])
def test_every_block_says_what_it_is_and_what_it_needs(name: str) -> None:
    found = blocks((ROOT / name).read_text())
    assert any(block.language in ("sh", "console") and not block.option("needs") for block in found)
    for block in found:
        assert block.language in LANGUAGES, f"{name}:{block.line}"
        options = {word.partition("=")[0] for word in block.info[1:]}
        assert options <= {"needs", "exit"}, f"{name}:{block.line}"
        assert block.option("needs") in ("", *NEEDS), f"{name}:{block.line}"


def _page(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    page = folder / "page.md"
    page.write_text(text)
    return _type(page, folder)


def test_a_command_that_breaks_ends_the_page_at_its_block(tmp_path: Path) -> None:
    text = "```sh\nmkdir a\n```\nThen\n```sh\ncd a\nkha_no_such_command\ntouch after\n```\n```sh\ntouch later\n```\n"
    ended = _page(tmp_path, text)
    assert ended.returncode == 127 and ended.stdout.count(MARK) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "page.md"]


@pytest.mark.parametrize(("code", "expected"), [(2, 0), (3, 1), (0, 1)])
def test_a_block_must_end_with_the_code_that_its_page_names(tmp_path: Path, code: int, expected: int) -> None:
    assert _page(tmp_path, f"```sh exit=2\nexit {code}\n```\n").returncode == expected


def test_what_cannot_run_here_is_left_out_and_blocks_share_a_shell(tmp_path: Path) -> None:
    left_out = "```sh needs=gpu\nfalse\n```\n```text\nfalse\n```\n"
    ended = _page(tmp_path, f"```sh\nA=1\n```\n{left_out}```sh\necho $A\n```\n")
    assert ended.returncode == 0 and "\n1\n" in ended.stdout


def test_a_text_block_is_held_against_what_was_printed(tmp_path: Path) -> None:
    text = "```sh\nprintf 'one 1.25\\nother\\ntwo\\n'\n```\n```text\none ...\ntwo\n```\n"
    ended = _page(tmp_path, text)
    assert unmet(text, ended.stdout) == []
    assert unmet(text.replace("two\n```", "three\n```"), ended.stdout) == ["line 4: three"]


def test_each_line_of_a_console_block_ends_with_its_code_and_prints_what_follows(tmp_path: Path) -> None:
    text = "```console exit=3\n$ echo one; exit 3\none\n$ echo two; exit 3\nt...o\n```\n"
    ended = _page(tmp_path, text)
    assert ended.returncode == 0 and unmet(text, ended.stdout) == []
    assert unmet(text.replace("\none", "\nother"), ended.stdout) == ["line 1: other"]
    assert _page(tmp_path, text.replace("two; exit 3", "two")).returncode == 1
