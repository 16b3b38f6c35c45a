"""`make null-gpu` computes what it counts, each time it is called."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tools.null_gpu import cases, matrix

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"


def test_a_run_of_an_earlier_call_is_made_again_and_a_resumed_one_continued(tmp_path: Path) -> None:
    for name in ("again", "resumed", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    cases = [
        ("again", ["train", "run.dir={folder}/runs/again"]),
        ("resume it", ["train", f"run.dir={tmp_path}/runs/resumed"]),
    ]
    matrix.forget([*cases, ("eval it", ["eval", "{folder}/runs/other"])], tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["other", "resumed"]


def test_no_case_writes_to_the_run_of_another() -> None:
    every = [*cases.commands(), *cases.of_two_ranks()]
    places = Counter(
        word
        for name, command in every
        for word in command
        if word.startswith("run.dir=") and not name.startswith("resume ")
    )
    assert len({name for name, _ in every}) == len(every)
    assert max(places.values()) == 1


def test_parts_are_all_cases_and_none_reads_a_run_of_another() -> None:
    every = [*cases.commands()]
    parts = [matrix.selected(every, "", f"{number}/7", set()) for number in range(1, 8)]
    assert sorted(name for part in parts for name, _ in part) == sorted(name for name, _ in every)
    for part in parts:
        paths = [(name, word) for name, command in part for word in command if "/runs/" in word]
        made = {word for name, word in paths if word.startswith("run.dir=") and not name.startswith("resume ")}
        assert {f"run.dir={word.partition('=')[2] or word}" for _, word in paths} <= made


def test_the_page_of_performance_counts_the_cases() -> None:
    count = len([*cases.commands(), *cases.of_two_ranks()])
    page = PAGE.read_text(encoding="utf-8")
    assert f"`make null-gpu` has {count} configurations" in page
