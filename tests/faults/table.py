"""Writes the table of faults in docs/resume.md from JUnit reports: `python tests/faults/table.py TEST.xml SOAK.xml`.

python -m pytest -m "not soak" tests/faults tests/checkpoint tests/train/test_resume.py --junitxml TEST.xml
python -m pytest -m soak --timeout 7200 tests/faults --junitxml SOAK.xml
"""

from __future__ import annotations

import sys
from collections import Counter
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).parents[2] / "docs" / "resume.md"
BEGIN, END = "<!-- faults: written by tests/faults/table.py -->", "<!-- end of faults -->"

FAULTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "F1": (
        "kill -9 of all ranks between steps",
        "curve and final checkpoint bit-equal to a run never hurt",
        (
            "test_a_run_killed_at_several_stages",
            "test_a_run_killed_twice",
            "test_two_ranks_killed",
            "test_the_full_grid",
        ),
    ),
    "F2": (
        "kill -9 at every stage of a save or a pruning",
        "as F1; the same step can be saved again",
        ("test_a_run_killed_at_several_stages", "test_a_kill_", "test_a_partial_directory", "test_the_full_grid"),
    ),
    "F3": (
        "damaged checkpoint: bits, length, missing file, foreign pickle",
        "named, set aside as `.corrupt`, the one before is used; `resume.strict=true`: exit 4",
        ("test_f3", "test_a_pickle_under"),
    ),
    "F4": (
        "disk full, read-only, file too large, on one rank",
        "training goes on; `checkpoint.max_failures` in a row, or the last save: 75 if an earlier one stands, else 4",
        ("test_f4", "test_a_save_that_fails_on_one_rank_fails", "test_a_snapshot_for_which"),
    ),
    "F5": ("NaN in one rank's gradient", "every rank skips the step; too many in a row: exit 5", ("test_f5",)),
    "F6": (
        "batches of noise, and a kill amid the rewind they cause",
        "back before them, on without their samples; the same state with the kill and without",
        ("test_f6",),
    ),
    "F7": ("data one rank cannot read", "all ranks end with its words: exit 4", ("test_f7",)),
    "F8": ("a rank hangs, or is stopped", "stacks of all that can, exit 75, exact restart", ("test_f8",)),
    "F9": ("kill -9 of one rank", "the others end by themselves, exact restart", ("test_f9",)),
    "alone": (
        "one rank alone cannot read its share, copy its state, or write the record",
        "all end together by its error (disk or memory: exit 75), exact restart",
        ("test_a_rank_that_cannot", "test_a_defect_of_one", "test_what_rank_0_alone", "test_what_fails_at_the_end"),
    ),
    "F10": ("SIGTERM or SIGUSR2 on one rank, and again", "step finished, saved, REQUEUE, exit 0", ("test_f10",)),
    "F11": ("time limit; clock set back", "stops in good order; nothing changes", ("test_f11",)),
    "F12": (
        "other world size, other ZeRO stage",
        "same samples, fp32 state bit for bit, losses within 1e-5",
        ("test_a_run_that_changes_ranks", "test_every_layout_takes_over"),
    ),
    "F13": ("a second job in the run directory", "exit 6 naming the owner, nothing touched", ("test_f13",)),
    "F14": (
        "W&B unreachable at the start, failing amid the run, not installed",
        "training does not notice: every line is in the record, one W&B run for all attempts",
        ("test_f14",),
    ),
    "F15": (
        "changed settings",
        "exit 3 with a table, unless in `resume.allow_changes`",
        ("test_f15", "test_data_may_move"),
    ),
    "F16": (
        "a bit flips in one rank's weights, or in what all ranks hold alike",
        "found before the step is applied, the rank named, exit 75",
        ("test_f16",),
    ),
    "F17": (
        "a device runs out of memory, at the first step or later",
        "told against the plan with what would help, exit 2 before the first update, later 75; the checkpoint is whole",
        ("test_f17",),
    ),
    "F18": (
        "pruning",
        "never the only valid, the resumed-from, or a marked one",
        ("test_what_stays_is", "test_a_kill_while_pruning"),
    ),
    "F19": ("many steps", "memory, files, threads stay", ("test_two_thousand", "test_hundreds_of_steps")),
    "F20": ("50 random faults in one directory", "ends with the clean curve", ("test_fifty",)),
}


def table(reports: list[Path]) -> str:
    """The Markdown table of what `reports` say of each fault."""
    results: dict[str, Counter[str]] = {fault: Counter() for fault in FAULTS}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        for fault, (_, _, tests) in FAULTS.items():
            if case.get("name", "").startswith(tests):
                states = {child.tag for child in case} & {"failure", "error", "skipped"}
                results[fault]["failed" if states & {"failure", "error"} else "skipped" if states else "passed"] += 1
    rows = [
        f"| {fault} | {what} | {promise} | {_told(results[fault])} |" for fault, (what, promise, _) in FAULTS.items()
    ]
    head = ["| | fault | what happens | cases |", "|---|---|---|---|"]
    return "\n".join([f"Run on {date.today()}.", "", *head, *rows])


def _told(result: Counter[str]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(result.items())) or "not run"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    written = table([Path(report) for report in sys.argv[1:]])
    PAGE.write_text(f"{before}{BEGIN}\n{written}\n{END}{after}", encoding="utf-8")
