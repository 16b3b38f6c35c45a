"""Whatever happens to a run, its end agrees with its whole record: the last lines, and the running sums."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kha_train.errors import DataError
from kha_train.operate.status import run_status
from kha_train.record import (
    Record,
    read_discarded,
    read_last_metrics,
    read_metrics,
    read_metrics_at,
    read_run,
)
from kha_train.record.actions import count_actions
from kha_train.record.goodput import Goodput, goodput_of
from kha_train.record.jsonl import to_line
from kha_train.record.reader import read_metrics_after
from kha_train.record.totals import SHORT, TOTALS_FILE, _digest, known_totals, load_totals, save_totals, totals_of

SECONDS = st.floats(0.0, 1e6) | st.sampled_from([1e-320, 0.1, math.inf, math.nan])
TORN = st.sampled_from([b"", b"{", b'{"step": 9', b"\0\0\0", b'{"step": 99}', b"\n"])
ACTS = st.lists(
    st.tuples(st.just("step"), SECONDS, st.floats(0.0, 10.0), st.integers(0, 1))
    | st.tuples(st.just("save"), SECONDS)
    | st.tuples(st.just("divergence"))
    | st.tuples(st.just("rewind"), st.integers(0, 6))
    | st.tuples(st.just("kill"), TORN, st.integers(0, 6)),
    max_size=25,
)


def goodput(run_dir: Path) -> Goodput | None:
    """From the totals that were kept up, or from the whole record without them."""
    return goodput_of(known_totals(run_dir) or totals_of(run_dir), read_run(run_dir)["attempts"])


class Life:
    """A run that lives through acts; each begins an attempt anew where it has to."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.record = Record.open(run_dir)
        self.record.begin_attempt(0)

    def step(self, seconds: float, waited: float, skipped: int) -> None:
        step = self.record.last_step + 1
        line = {"step": step, "samples_first": 2 * step, "train/step_seconds": seconds, "data/wait_seconds": waited}
        self.record.step({**line, "train/skipped": skipped, "train/loss": 1.0 / step, "text": "x" * (7 * step % 50)})

    def save(self, seconds: float) -> None:
        self.record.event("checkpoint_saved", self.record.last_step, stall_seconds=seconds)

    def divergence(self) -> None:
        self.record.event("divergence", self.record.last_step, samples_first=2 * self.record.last_step)

    def rewind(self, back: int) -> None:
        self.record.rewind_to(max(0, self.record.last_step - back), "rewind 1 from step 9: why")

    def kill(self, torn: bytes, back: int) -> None:
        """Nothing is closed; the last write is torn, and the next start goes back some steps."""
        for name in ("_metrics", "_events"):
            getattr(self.record, name)._file.close()
        self.record._lock.close()
        with (self.run_dir / "metrics.jsonl").open("ab") as file:
            file.write(torn)
        self.record = Record.open(self.run_dir)
        self.record.begin_attempt(max(0, self.record.last_step - back))


@pytest.fixture
def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read in pieces of less than a line, and totals kept every third line."""
    for module in ("kha_train.record.end", "kha_train.record.tail"):
        monkeypatch.setattr(f"{module}.PIECE", 64)
    monkeypatch.setattr("kha_train.record.record.SAVE_EVERY", 3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS, torn=TORN)
def test_the_end_of_a_record_tells_what_the_whole_tells(
    tmp_path_factory: pytest.TempPathFactory, tiny_pieces: None, acts: list[tuple[Any, ...]], torn: bytes
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    life = Life(run_dir)
    for name, *arguments in acts:
        getattr(life, name)(*arguments)
    file = run_dir / "metrics.jsonl"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes() + torn)

    lines = read_metrics(run_dir)
    assert json.dumps([read_last_metrics(run_dir, count) for count in (1, 2, 100)]) == json.dumps(
        [lines[-count:] for count in (1, 2, 100)]
    )
    for step in range(-1, len(lines) + 2):
        at = [line for line in lines if line["step"] == step]
        assert json.dumps(read_metrics_at(run_dir, step)) == json.dumps(at[0] if at else None)
        offset, after = read_metrics_after(run_dir, step)
        assert json.dumps(after) == json.dumps([line for line in lines if line["step"] > step])
        before = (run_dir / "metrics.jsonl").read_bytes()[:offset]
        assert before.count(b"\n") == len(lines) - len(after) and before[-1:] in (b"", b"\n")

    whole = totals_of(run_dir)
    assert (whole.lines, whole.undone) == (len(lines), len(read_discarded(run_dir)))
    kept = load_totals(run_dir)
    assert kept is None or kept == whole
    assert life.record._totals == whole
    assert bool(whole.diverged) == (count_actions(run_dir)["divergence"] > 0)
    assert goodput(run_dir) == goodput_of(whole, read_run(run_dir)["attempts"])
    os.truncate(file, size)
    life.record.close()
    assert load_totals(run_dir) == totals_of(run_dir)


def test_seconds_are_the_exact_sum_rounded_once(tmp_path: Path) -> None:
    values = [0.1, 1e-300, 1e15, 0.3, 2.0**-1074, 123.456]
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    for step, seconds in enumerate(values, start=1):
        record.step({"step": step, "train/step_seconds": seconds, "data/wait_seconds": 0.0, "train/skipped": 0})
    record.close()
    found = goodput(tmp_path)
    assert found is not None and found.productive == math.fsum(values)


LONG = 9 * 2**20
FILLER = "x" * 3000


@pytest.fixture(scope="module")
def long_and_short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stopped runs, of 9 MB and of 300 KB, with what a run keeps up."""
    made = []
    for name, steps in (("long", LONG // len(FILLER)), ("short", 100)):
        run_dir = tmp_path_factory.mktemp(name)
        record = Record.open(run_dir)
        record.begin_attempt(0)
        lines = [
            {"step": step, "attempt": 1, "time": 1e9 + step, "train/loss": 1.0, "filler": FILLER}
            | {"train/step_seconds": 0.5, "data/wait_seconds": 0.0, "train/skipped": 0}
            for step in range(1, steps + 1)
        ]
        (run_dir / "metrics.jsonl").write_bytes(b"".join(map(to_line, lines)))
        record.close()
        save_totals(run_dir, totals_of(run_dir))
        (run_dir / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
        made.append(run_dir)
    return made[0], made[1]


def bytes_read(act: Callable[[], Any]) -> int:
    """How many bytes this process reads from files in `act`, by the kernel's count."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    before = count()
    act()
    return count() - before


def start_and_end(run_dir: Path) -> None:
    """What a resume asks of the record, and a rewind, and the end."""
    record = Record.open(run_dir)
    record.begin_attempt(record.last_step)
    step = record.last_step
    for number in (1, 2, 3):
        record.step({"step": step + number, "train/step_seconds": 1.0, "data/wait_seconds": 0.0, "train/skipped": 0})
    record.rewind_to(step, "rewind 1")
    assert record.goodput() is not None
    record.close()


@pytest.mark.parametrize("act", [run_status, start_and_end, goodput, lambda run: read_metrics_at(run, 50)])
def test_what_is_asked_of_a_long_record_reads_no_more_than_of_a_short_one(
    long_and_short: tuple[Path, Path], act: Callable[[Path], Any]
) -> None:
    long, short = long_and_short
    act(short)
    few, many = bytes_read(lambda: act(short)), bytes_read(lambda: act(long))
    assert many < few + 400_000 < LONG / 4


def test_without_kept_sums_the_status_of_a_long_run_is_still_cheap_and_says_what_is_known(
    long_and_short: tuple[Path, Path],
) -> None:
    long, _ = long_and_short
    assert (long / "metrics.jsonl").stat().st_size > SHORT
    kept = (long / TOTALS_FILE).read_bytes()
    (long / TOTALS_FILE).unlink()
    try:
        assert bytes_read(lambda: run_status(long)) < LONG / 4
        assert run_status(long).goodput is None and run_status(long).step == len(read_metrics(long))
        assert goodput(long) is not None
    finally:
        (long / TOTALS_FILE).write_bytes(kept)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "sums": {"productive": "ff"}})),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "marks": [[1, 2], [0, 0], [0, 0]]})),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "lines": -1})),
        lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2})),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_kept_sums_that_are_damaged_or_foreign_are_passed_over(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    for start in (0, 1):
        record = Record.open(tmp_path)
        record.begin_attempt(start)
        record.step({"step": start + 1, "train/step_seconds": 0.5, "data/wait_seconds": 0.0, "train/skipped": 0})
        record.close()
    expected = goodput(tmp_path)
    damage(tmp_path / TOTALS_FILE)
    assert load_totals(tmp_path) is None
    assert goodput(tmp_path) == expected and expected is not None
    Record.open(tmp_path).close()


def test_damage_that_a_start_does_not_touch_is_left_for_the_end_to_tell(tmp_path: Path) -> None:
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    record.step({"step": 1, "train/step_seconds": 0.5, "data/wait_seconds": 0.0, "train/skipped": 0})
    record.close()
    events = tmp_path / "events.jsonl"
    events.write_bytes(b"[]\n" + events.read_bytes())
    record = Record.open(tmp_path)
    record.begin_attempt(1)
    record.step({"step": 2, "train/step_seconds": 0.5, "data/wait_seconds": 0.0, "train/skipped": 0})
    with pytest.raises(DataError, match="events.jsonl"):
        record.goodput()
    record.close()


def test_sums_that_cannot_be_kept_end_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path) -> tuple[int, int]:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("kha_train.record.totals._mark", stale)
    monkeypatch.setattr("kha_train.record.record.SAVE_EVERY", 1)
    with closing(Record.open(tmp_path)) as record:
        record.begin_attempt(0)
        record.step({"step": 1, "train/step_seconds": 0.5, "data/wait_seconds": 0.0, "train/skipped": 0})
    assert not (tmp_path / TOTALS_FILE).exists()


def test_a_line_that_is_damaged_at_the_end_of_a_long_record_is_named_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kha_train.record.end.PIECE", 64)
    good = [to_line({"step": step, "train/loss": 1.0}) for step in range(1, 101)]
    file = tmp_path / "metrics.jsonl"
    for bad, problem in ((b"nonsense\n", "not a JSON object"), (b'{"step": 98, "train/loss": "x"}\n', "not a number")):
        file.write_bytes(b"".join([*good[:97], bad, *good[98:]]))
        with pytest.raises(DataError, match=problem) as caught:
            read_last_metrics(tmp_path, 10)
        assert "metrics.jsonl:98" in str(caught.value)


def whole_answer(run_dir: Path) -> Any:
    return goodput_of(totals_of(run_dir), read_run(run_dir)["attempts"])


@pytest.fixture(scope="module")
def kept_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped run that went back a step, saved and diverged, with what it has kept up: everything in it is filled."""
    life = Life(tmp_path_factory.mktemp("kept"))
    for step in range(12):
        life.step(0.5, 0.1, int(step % 5 == 0))
    life.save(0.25)
    life.rewind(1)
    life.divergence()
    life.record.close()
    assert load_totals(life.run_dir) == totals_of(life.run_dir)
    return life.run_dir


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys and indices that lead to each value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in [(*at, key), *places(item, (*at, key))]]


WILD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    # Some that are of the right kind.
    | st.sampled_from(["f" * 600, "-1", "0", "inf", 0, 3, 2**53, 1e308, -1e308, [0, 0], [1, 2, 3], {}])
    | st.from_regex(r"-?[0-9a-f]{1,600}", fullmatch=True),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data(), signed=st.booleans())
def test_kept_sums_with_a_wild_value_are_passed_over_and_never_an_error(
    kept_up: Path, drawn: st.DataObject, signed: bool
) -> None:
    """Even with a digest that fits the wild value (`signed`), which may be believed, there is a result."""
    file = kept_up / TOTALS_FILE
    sound = file.read_bytes()
    content = json.loads(sound)
    *way, last = drawn.draw(st.sampled_from(places(content)))
    inside = content
    for key in way:
        inside = inside[key]
    inside[last] = drawn.draw(WILD)
    if signed:
        content["digest"] = _digest(content)
    try:
        file.write_text(json.dumps(content))
        assert run_status(kept_up).step == 11
        if not signed:
            assert load_totals(kept_up) in (None, totals_of(kept_up))
            assert goodput(kept_up) == whole_answer(kept_up)
            assert run_status(kept_up).diverged
    finally:
        file.write_bytes(sound)


@pytest.mark.parametrize(
    "edit",
    [
        {"lines": 3},
        {"sums": {"productive": "f" * 600}},
        {"sums": {"productive": "-1"}},
        {"attempts": {"1": {"first": 1e308, "began": 1e308, "last": 1e308}}},
        {"marks": [[0, 0], [0, 0], [0, 0]]},
        {"diverged": [[1, 2, 3]]},
    ],
    ids=str,
)
def test_an_unlikely_value_in_kept_sums_is_not_believed(kept_up: Path, tmp_path: Path, edit: dict[str, Any]) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(kept_up, run_dir)
    kept = json.loads((run_dir / TOTALS_FILE).read_text())
    new = {key: kept[key] | value if key == "sums" else value for key, value in edit.items()}
    assert load_totals(run_dir) is not None
    (run_dir / TOTALS_FILE).write_text(json.dumps({**kept, **new}))
    assert load_totals(run_dir) is None
    assert goodput(run_dir) == whole_answer(run_dir)


def test_steps_whose_sum_no_float_holds_have_a_status(tmp_path: Path) -> None:
    record = Record.open(tmp_path)
    record.begin_attempt(0)
    for step in (1, 2, 3):
        record.step({"step": step, "train/step_seconds": 1e308, "data/wait_seconds": 0.0, "train/skipped": 0})
    assert record.goodput() is not None
    record.close()
    assert load_totals(tmp_path) == totals_of(tmp_path) and totals_of(tmp_path).seconds("productive") == math.inf
    assert run_status(tmp_path).step == 3


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.discarded.jsonl", "events.jsonl"])
def test_an_edit_in_the_middle_of_a_short_record_that_keeps_its_size_is_noticed(
    kept_up: Path, tmp_path: Path, name: str
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(kept_up, run_dir)
    content = (run_dir / name).read_bytes()
    digit = content.index(b'"time": 1') + len(b'"time": ')
    (run_dir / name).write_bytes(content[:digit] + b"2" + content[digit + 1 :])
    assert load_totals(run_dir) is None
    assert goodput(run_dir) == whole_answer(run_dir)
