"""Pages of the documentation site that are no files under docs/: README and its neighbours, the reference of commands
and of the Python interface. mkdocs calls these functions (`hooks` in mkdocs.yml).

So every page has one source: on a site, links between the pages of a repository lead to those of the site, and paths
that have no page are shown as paths.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.nav import Page

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "heads_package.md": "kha_train/heads/README.md",
}
"""Pages of the site -> files of the repository outside docs/."""
PAGES = {path: page for page, path in ELSEWHERE.items()}
LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
INFO = re.compile(r"^(```+\w+) ([^\n`]+)$", re.MULTILINE)
CODE = re.compile(r"^(```+).*?^\1[ ]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not under docs/."""
    from mkdocs.structure.files import File

    for page, path in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text(encoding="utf-8")))
    files.append(File.generated(config, "reference/cli.md", content=commands()))
    files.append(File.generated(config, "reference/api.md", content=interface()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository as links of the site, and info strings that its Markdown understands."""
    markdown = INFO.sub(site_info, markdown)
    here = page.file.src_uri
    source = ELSEWHERE.get(here, f"docs/{here}")
    code = [found.span() for found in CODE.finditer(markdown)]

    def rewritten(found: re.Match[str]) -> str:
        inside = any(start <= found.start() and found.end() <= end for start, end in code)
        return found[0] if inside else site_link(found[1], found[2], source, here)

    return LINK.sub(rewritten, markdown)


def site_info(found: re.Match[str]) -> str:
    """The beginning of a code block with its language, and the file that it names as its title. A site takes no other
    word: with one, what follows would not be Markdown any more.
    """
    file = re.search(r"\bfile=(\S+)", found[2])
    return found[1] + (f' title="{file[1]}"' if file else "")


def site_link(text: str, target: str, source: str, here: str) -> str:
    """A link with `text` (in brackets) and `target`, found in the file `source` of the repository, as the page `here`
    of the site has it. Raises FileNotFoundError if it leads nowhere.
    """
    path, _, anchor = target.partition("#")
    if not path or "://" in target or target.startswith("mailto:"):
        return f"{text}({target})"
    full = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if not (ROOT / full).exists():
        raise FileNotFoundError(f"{source} links to {target}, which does not exist")
    page = PAGES.get(full) or (
        full.removeprefix("docs/") if full.startswith("docs/") and full.endswith((".md", ".svg")) else None
    )
    if page is None:
        return text.strip("[]")
    relative = posixpath.relpath(page, posixpath.dirname(here) or ".")
    return f"{text}({relative}{'#' * bool(anchor)}{anchor})"


def commands() -> str:
    """The help of every command, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from kha_train.cli.main import COMMANDS, HIDDEN, build

    command = typer.main.get_command(build([name for name in COMMANDS if name not in HIDDEN]))
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="kha", title="Commands")


def interface() -> str:
    """The names that `kha_train` and `kha_train.heads` give to notebooks."""
    import kha_train
    from kha_train import heads

    own = [f"{kha_train._SURFACE[name]}.{name}" for name in sorted(kha_train.__all__)]
    theirs = [f"kha_train.heads.{name}" for name in sorted(heads.__all__)]
    pages = [("`kha_train`", own), ("`kha_train.heads`, also the package `kha_heads`", theirs)]
    parts = [f"## {title}\n\n" + "\n\n".join(f"::: {name}" for name in names) for title, names in pages]
    return "# Python interface\n\n" + "\n\n".join(parts) + "\n"
