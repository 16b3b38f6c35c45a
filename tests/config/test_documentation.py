"""docs/configuration.md and the README are correct."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kha_train import compose
from kha_train.config.build import flatten, to_plain
from kha_train.config.compose import STUDIES, shipped
from kha_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
PRESETS = {
    group.name: sorted(path.stem for path in group.glob("*.yaml"))
    for group in shipped("configs").iterdir()
    if group.is_dir() and group.name != STUDIES
}


def all_fields() -> set[str]:
    """The settings that any variant of attention or any optimiser has."""
    chosen = [f"{group}={name}" for group in ("attention", "optim") for name in PRESETS[group]]
    return {key for preset in chosen for key in flatten(to_plain(compose([preset])))}


def test_every_field_of_every_preset_is_described() -> None:
    table = PAGE.partition("## Every field")[2]
    described = set(re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)+)`", table))
    leaves = all_fields()
    assert leaves - described == set()


def test_no_field_is_described_that_is_not_there() -> None:
    first_cells = re.findall(r"^\| (`[^|]*`) \|", PAGE.partition("## Every field")[2], flags=re.MULTILINE)
    described = {key for cell in first_cells for key in re.findall(r"`([^`]+)`", cell)}
    leaves = all_fields()
    assert described - leaves == set()


@pytest.mark.parametrize("group", PRESETS)
def test_every_preset_is_listed(group: str) -> None:
    (row,) = re.findall(rf"^\| `{group}` \| (.*?) \|", PAGE, flags=re.MULTILINE)
    assert re.findall(r"`([^`]+)`", row) and set(re.findall(r"`([^`]+)`", row)) == set(PRESETS[group])


def test_the_messages_shown_are_those_that_are_printed() -> None:
    shown = re.findall(r"^\$ kha train (\S+)\n(configuration error: .*)$", PAGE, flags=re.MULTILINE)
    judged = [(override, line) for override, line in shown if not override.startswith("data.")]
    assert len(judged) >= 4
    for override, line in judged:
        with pytest.raises(ConfigError) as raised:
            compose([override])
        start, _, end = line.partition("...")
        assert raised.value.line().startswith(start) and raised.value.line().endswith(end)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    names = re.findall(r"`((?:kha_train|data_tools|configs|tests|launch|docs)/[\w./]+)`", text)
    missing += [name for name in names if not (ROOT / name).exists()]
    assert missing == []
