"""The documentation is a site without a broken link, with every page and every command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kha_train.cli.main import COMMANDS, HIDDEN
from tools import site_pages

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_every_page_and_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr[-3000:]
    pages = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("index.html")}
    sources = {path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {"contributing", "changelog", "security", *sources - {"decisions/README"}} <= pages
    reference = (tmp_path / "reference/cli/index.html").read_text()
    assert all(f">kha {name}<" in reference for name in COMMANDS if name not in HIDDEN)
    interface = (tmp_path / "reference/api/index.html").read_text()
    assert all(name in interface for name in ("build_decoder", "open_stream", "kha_train.heads.insert"))
    everything = [path.read_text() for path in tmp_path.rglob("*.html")]
    assert not [page for page in everything if "```" in page]
    assert not [page for page in everything if 'src="http' in page or '<link rel="stylesheet" href="http' in page]


@pytest.mark.parametrize(
    ("target", "source", "here", "expected"),
    [
        ("docs/data.md#limits", "README.md", "index.md", "[text](data.md#limits)"),
        ("../CONTRIBUTING.md", "docs/model.md", "model.md", "[text](contributing.md)"),
        ("../record.md", "docs/decisions/record.md", "decisions/record.md", "[text](../record.md)"),
        ("../kha_train/heads/README.md", "docs/heads.md", "heads.md", "[text](heads_package.md)"),
        ("https://arxiv.org/abs/2510.23052", "docs/heads.md", "heads.md", "[text](https://arxiv.org/abs/2510.23052)"),
        ("#options", "docs/export.md", "export.md", "[text](#options)"),
        ("docs/pictures/position-cpu.svg", "README.md", "index.md", "[text](pictures/position-cpu.svg)"),
        ("Makefile", "README.md", "index.md", "text"),
    ],
)
def test_links_of_the_repository_are_links_of_the_site(target: str, source: str, here: str, expected: str) -> None:
    assert site_pages.site_link("[text]", target, source, here) == expected


def test_a_block_keeps_its_language_and_file_and_no_word_that_a_site_does_not_know() -> None:
    page = '```sh exit=2\na\n```\n```python file=a/b.py below="x y"\n```\n```text\n```\n'
    shown = '```sh\na\n```\n```python title="a/b.py"\n```\n```text\n```\n'
    assert site_pages.INFO.sub(site_pages.site_info, page) == shown


def test_a_link_that_leads_nowhere_ends_the_build() -> None:
    with pytest.raises(FileNotFoundError, match=r"README.md links to docs/nothing.md"):
        site_pages.site_link("[text]", "docs/nothing.md", "README.md", "index.md")
