"""Types the code blocks of README and docs, in order, in one directory that is empty at first, and without network.

    python tools/type_pages.py docs/tutorial.md      # the first hour; prints what each command took
    python tools/type_pages.py                       # all pages, in the order of `PAGES`
    python tools/type_pages.py --folder DIR PAGE     # on what earlier pages left in DIR

The info string of a block says what it is:

    ```sh                  typed; every command ends with 0
    ```sh exit=2           typed; the last command ends with 2
    ```text                what the block before it prints, in order among its output; `...` stands for anything
    ```console exit=2      both: each line after `$ ` is typed and ends with 2 (0 unless named), the others are printed
    ```python              typed at an interpreter, as `sh` is at a shell
    ```yaml file=a/b.yaml  becomes this file
    ```                    no code: a formula, or the layout of a directory

A block that cannot run here says why in its first line, where readers see it: `# needs SLURM`. `NEEDS` has the words.
Blocks of a page share one shell: a variable or a directory that one sets is there for the next.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST_HOUR = "docs/tutorial.md"
SUBJECTS = (
    "launch", "configuration", "resume", "export", "data", "attention", "evaluation", "evaluate", "tasks", "generation",
    "import", "heads", "compress", "analyze", "kernel_pca", "compare", "certify", "checkpoints", "record", "stability",
    "spike_score", "replay", "studies", "experiments", "performance", "model", "plan", "cost", "doctor",
)  # fmt: skip
WHEELS = {"kha_heads": "kha_train/heads", "spike_score": "kha_train/stability"}
"""Packages of their own, each made of a folder that has a README."""
PAGES = (
    FIRST_HOUR,
    "README.md",
    *(f"docs/{name}.md" for name in SUBJECTS),
    *(f"{at}/README.md" for at in WHEELS.values()),
)
"""All pages with code blocks. The first two make what all others use."""
LANGUAGES = ("sh", "text", "console", "python", "yaml", "")
NEEDS = {
    "a checkout": "files of a checkout, or an installation",
    "a GPU": "a CUDA device",
    "a download": "the network",
    "SLURM": "a cluster",
    "hours": "more time than a test has",
}
FENCE = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1[ ]*$", re.MULTILINE | re.DOTALL)
TAG = re.compile(r"# needs ([^\n:]+)")
MARK = "### "
LOOPBACK_ALONE = ("sh", "-c", 'ip link set lo up && exec "$@"', "sh")
NAMESPACES = (("unshare", "--net"), ("unshare", "--map-root-user", "--net"))
SHOWN = 0.5
"""Seconds that a command takes at least to be listed."""


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

    @property
    def needs(self) -> str:
        """What the block needs that is not here; "" if it can be typed."""
        found = TAG.match(self.text)
        return found[1] if found else ""

    def option(self, name: str) -> str:
        """The value of `name=VALUE` in the info string; "" without."""
        return next((word.partition("=")[2] for word in self.info if word.startswith(f"{name}=")), "")


@dataclass(frozen=True)
class Typed:
    """What came of typing a page: exit code, output, the seconds of each command in order, and the processor time."""

    page: str
    code: int
    output: str
    seconds: tuple[tuple[str, float], ...]
    processor: float

    @property
    def faults(self) -> list[str]:
        """What did not go as the page says."""
        if self.code:
            place = re.findall(f"^{MARK}(.*)$", self.output, re.MULTILINE)[-1:]
            return [f"{self.page} ended with {self.code}, block at {place}:\n{self.output[-4000:]}"]
        return [f"{self.page}, {line}" for line in unmet((ROOT / self.page).read_text(), self.output)]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page's text, in order."""
    return [
        Block(page.count("\n", 0, found.start()) + 1, tuple(found[2].split()), found[3])
        for found in FENCE.finditer(page)
    ]


def script(name: str, text: str) -> str:
    """The bash script that types the commands of a page. Before each block it prints `MARK` and the position, and
    before each command it writes the time and the command to the file `$TIMES`. It ends with the code of the first
    command that fails, or with 1 if one has not failed as expected.
    """
    note = 'printf "%s %s\\0" "$EPOCHREALTIME" "${BASH_COMMAND}" >>"$TIMES"'
    lines = ["set -eTo pipefail", "export COLUMNS=120", f"trap '{note}' DEBUG"]
    for block in blocks(text):
        if block.language in ("text", "") or block.needs:
            continue
        lines.append(f"echo {shlex.quote(f'{MARK}{name}:{block.line}')}")
        expected = block.option("exit")
        for command in _commands(block):
            lines += [command] if not expected else ["set +e", f"(\n{command}\n)", "ended=$?", "set -e"]
            if expected:
                lines.append(f'[ "$ended" = {expected} ] || {{ echo "ended with $ended, not {expected}"; exit 1; }}')
    return "\n".join([*lines, f"echo '{MARK}end'", ""])


def _commands(block: Block) -> list[str]:
    """What is typed of a block, in parts that end one by one."""
    if block.language == "console":
        return [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    if block.language == "yaml":
        file = shlex.quote(block.option("file"))
        return [f"mkdir -p $(dirname {file})\ncat >{file} <<'END'\n{block.text}END"]
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


@functools.cache
def without_network() -> tuple[str, ...]:
    """What to put before a command so that it reaches only its own loopback device; () where that is impossible."""
    for namespace in NAMESPACES:
        command = (*namespace, *LOOPBACK_ALONE)
        try:
            if subprocess.run([*command, "true"], check=False, capture_output=True).returncode == 0:
                return command
        except OSError:
            return ()
    return ()


def type_page(name: str, folder: Path, tree: Path = ROOT, text: str | None = None) -> Typed:
    """Type the commands of the page `name` in `folder`, with the packages of `tree`, with this interpreter's commands
    first in PATH, no terminal, and no network where this machine can do without."""
    kept = {key: value for key, value in os.environ.items() if key != "KHA_LAUNCH" and "WANDB" not in key}
    packages, times = _installed(folder, tree), folder / f".times-{Path(name).stem}"
    times.unlink(missing_ok=True)
    environment = {
        **kept,
        "PATH": f"{packages}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "launch"), str(packages)]),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_MODE": "offline",
        "TIMES": str(times),
    }
    before = _processor_seconds()
    ended = subprocess.run(
        [*without_network(), "bash", "-c", script(name, (ROOT / name).read_text() if text is None else text)],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    computed = _processor_seconds() - before
    return Typed(name, ended.returncode, ended.stdout, _seconds(times.read_text()), computed)


def _processor_seconds() -> float:
    """What the processes that this one has waited for have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _installed(folder: Path, tree: Path) -> Path:
    """A directory with the packages of `WHEELS` and their command, as their wheels would be installed."""
    packages = folder / ".packages"
    if not packages.exists():
        packages.mkdir()
        for name, room in WHEELS.items():
            (packages / name).symlink_to(tree / room)
        command = packages / "spike-score"
        command.write_text(f"#!{sys.executable}\nfrom spike_score.command import main\n\nmain()\n")
        command.chmod(0o755)
    return packages


def _seconds(times: str) -> tuple[tuple[str, float], ...]:
    """The first line of each command, and the time until the next one began."""
    began = [(float(at), command) for at, _, command in (line.partition(" ") for line in times.split("\0")[:-1])]
    following = [at for at, _ in began[1:]]
    return tuple(
        (command.partition("\n")[0], after - at) for (at, command), after in zip(began, following, strict=False)
    )


def timed(page: Typed, commands: bool = True) -> list[str]:
    """Lines for a reader: what each of the `commands` took, and the page."""
    lines = [f"{took:7.1f} s  {command[:110]}" for command, took in page.seconds if commands and took >= SHOWN]
    whole = sum(took for _, took in page.seconds)
    return [*lines, f"{whole:7.1f} s  in all: {page.page} ({page.processor:.0f} s of processor time)"]


def counted(texts: Iterable[str]) -> str:
    """One line: how many code blocks pages have, and what is done with them."""
    found: Counter[str] = Counter()
    for block in (block for text in texts for block in blocks(text)):
        kinds = {"text": "compared with output", "": "formulas and layouts"}
        found[f"needs {block.needs}" if block.needs else kinds.get(block.language, "typed")] += 1
    return f"{found.total()} blocks: " + ", ".join(f"{number} {kind}" for kind, number in found.most_common())


def main() -> int:
    """Type the pages that the command line names."""
    parser = argparse.ArgumentParser(description="Type the code blocks of pages, without network.")
    parser.add_argument("pages", nargs="*", default=PAGES)
    parser.add_argument("--folder", type=Path, help="where to type them; an empty directory unless set")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        folder = (chosen.folder or Path(empty)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        faults = []
        for name in chosen.pages:
            page = type_page(name, folder)
            print(*timed(page), *page.faults, sep="\n", flush=True)
            faults += page.faults
    print(counted((ROOT / name).read_text() for name in chosen.pages))
    print("without network" if without_network() else "with the network: this machine has no network namespaces")
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
