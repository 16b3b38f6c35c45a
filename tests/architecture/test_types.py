"""Types are checked by `make lint`, strictly; here stands what no type checker looks at: that nothing slips past it."""

from __future__ import annotations

import re
import tokenize
import tomllib
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]


def test_lint_checks_every_package_strictly() -> None:
    """`make lint` and not a test of ours runs the checker: its cache makes a second run a matter of a second."""
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert lint is not None and "$(BIN)/mypy\n" in lint[1]
    assert SETTINGS["strict"] is True
    assert set(SETTINGS["files"]) == {"kha_train", "data_tools"}


def test_no_room_is_exempt_and_only_programs_for_triton_are_checked_less_strictly() -> None:
    """Other exceptions are of packages without types, which enter through one place each."""
    ours = [override for override in SETTINGS["overrides"] if any(map(_is_ours, override["module"]))]
    assert not [override for override in SETTINGS["overrides"] if "ignore_errors" in override]
    assert len(ours) == 1
    assert all(re.fullmatch(r"kha_train\.model\.kernels\.(language|\w+_kernels)", name) for name in ours[0]["module"])


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in SETTINGS["files"]


def test_an_ignored_type_error_names_its_code_and_its_reason(sources) -> None:
    """The reason stands behind it on the line, or in a comment on the line above."""
    offenders = []
    for source in sources:
        lines = source.text.splitlines()
        for token in tokenize.generate_tokens(StringIO(source.text).readline):
            if token.type != tokenize.COMMENT or "type: ignore" not in token.string:
                continue
            row = token.start[0]
            coded = re.match(r"# type: ignore\[[a-z-]+\]", token.string)
            reasoned = re.search(r"\]  # \w+", token.string) or lines[row - 2].lstrip().startswith("# ")
            if not (coded and reasoned):
                offenders.append(f"{source.path}:{row}: {token.string}")
    assert offenders == []
