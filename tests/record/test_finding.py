"""Wherever a run is expected, folders, sweeps and globs of runs are accepted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

import pytest

from kha_train.cli.main import run as kha
from kha_train.errors import ConfigError
from kha_train.record import Record
from kha_train.record.finding import find_run, find_runs, runs_at

FIXTURE = "attention:\n  name: {name}\nrun:\n  name: {name}\n  seed: 0\n  steps: 3\n"


def make(path: Path, steps: int = 3) -> Path:
    """A run of `steps` steps whose variant is the name of its directory."""
    record = Record.open(path)
    record.begin_attempt(0)
    for step in range(1, steps + 1):
        record.step({"step": step, "train/loss": 3.0 - step / 10, "train/step_seconds": 0.1})
    record.close("stopped")
    (path / "config.yaml").write_text(FIXTURE.format(name=path.name))
    return path


def as_sweep(folder: Path, labels: list[str]) -> None:
    """Make `folder` a sweep of the points `labels`."""
    points = [
        {"label": label, "run_dir": str(folder / label), "overrides": [], "steps": 3, "tokens": 3, "flops": 1.0}
        for label in labels
    ]
    (folder / "sweep.json").write_text(json.dumps({"format": 1, "points": points}))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder of the runs `a`, `b` and `deep/c`, a file, an empty folder, one of logs, and a run of no step."""
    for name in ("b", "a", "deep/c"):
        make(tmp_path / "runs" / name)
    make(tmp_path / "runs" / "unborn", steps=0)
    (tmp_path / "runs" / "logs").mkdir()
    (tmp_path / "runs" / "logs" / "a.out").write_text("text")
    (tmp_path / "runs" / "notes.txt").write_text("text")
    return tmp_path / "runs"


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """`command(*words)`: `kha ...`; its exit code, standard output and standard error."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        # Each in a directory of its own: a report about some runs does not replace one about others.
        monkeypatch.chdir(mkdtemp(dir=tmp_path))
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        with pytest.raises(SystemExit) as ended:
            kha([str(word) for word in words])
        return ended.value.code or 0, *capsys.readouterr()

    return call


def names(found: list[Path], root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in found]


def test_a_folder_is_searched_for_its_runs_and_not_the_inside_of_a_run(runs: Path) -> None:
    make(runs / "a" / "inner")
    said: list[str] = []
    assert names(find_runs([runs], said.append), runs) == ["a", "b", "deep/c", "unborn"] and not said
    assert names(find_runs([runs / "b", runs], said.append), runs) == ["b", "a", "deep/c", "unborn"]
    assert names(find_runs([runs], said.append, trained=True), runs) == ["a", "b", "deep/c"]
    assert said == [f"skipped: {runs}/unborn: it has not recorded a step yet"]


def test_a_glob_that_the_shell_left_is_expanded_and_a_name_with_its_characters_is_not(runs: Path) -> None:
    said: list[str] = []
    assert names(find_runs([runs / "[ab]"], said.append), runs) == ["a", "b"]
    make(runs / "[ab]")
    assert names(find_runs([runs / "[ab]"], said.append), runs) == ["[ab]"]
    assert names(find_runs([runs / "*"], said.append), runs) == ["[ab]", "a", "b", "deep/c", "unborn"]
    assert said == [f"skipped: {runs}/logs: holds no run", f"skipped: {runs}/notes.txt: is a file"]


def test_the_runs_of_a_sweep_come_in_the_order_of_its_points(runs: Path) -> None:
    as_sweep(runs, ["b", "not-begun", "a"])
    assert names(find_runs([runs], print), runs) == names(find_runs([runs.parent], print), runs) == ["b", "a"]


def test_a_link_to_a_run_is_followed_and_a_circle_is_not(runs: Path) -> None:
    (runs / "linked").symlink_to(make(runs.parent / "elsewhere"))
    (runs / "deep" / "up").symlink_to(runs)
    assert names(find_runs([runs], print), runs) == ["a", "b", "deep/c", "linked", "unborn"]


def test_where_there_is_no_run_the_command_is_refused_and_names_those_nearby(runs: Path) -> None:
    for named in ([runs / "nowhere"], [runs / "logs", runs / "notes.txt"], [runs / "x*"]):
        with pytest.raises(ConfigError, match=r"no run here.*runs found in .*: a, b"):
            find_runs(named, print)


def test_one_run_is_found_in_a_folder_and_several_are_named(runs: Path) -> None:
    assert find_run(runs / "deep") == find_run(runs / "de*") == runs / "deep" / "c"
    assert find_run(runs / "logs") == runs / "logs"
    with pytest.raises(ConfigError, match=r"holds 4 runs; fix: name one of them: .*/a, .*/b"):
        find_run(runs)


@pytest.mark.parametrize("name", ["compare", "spikes", "status"])
def test_commands_about_runs_take_folders_sweeps_and_globs_and_say_what_they_pass_over(
    name: str, runs: Path, command: Callable
) -> None:
    steps = {"unborn"} if name == "status" else set()

    def labels(*words: str | Path) -> tuple[set[str], str]:
        code, out, err = command(name, *words, "--json")
        assert code == 0, err
        answer = json.loads(out)
        return {run.get("label", run.get("name")) for run in answer["runs"]}, err

    assert labels(runs)[0] == {"a", "b", "c"} | steps
    found, said = labels(*(child for child in runs.iterdir() if child.is_dir()))
    assert found == {"a", "b", "c"} | steps and "note: skipped" in said and "logs" in said
    assert labels(f"{runs}/*/")[0] == {"a", "b", "c"} | steps
    as_sweep(runs, ["b", "a"])
    assert labels(runs)[0] == {"a", "b"}
    code, out, err = command(name, runs / "logs", "--json")
    assert code == 2 and not out and "no run here" in err


def test_a_run_named_twice_is_refused_and_a_folder_beside_its_run_is_not(runs: Path, command: Callable) -> None:
    code, _, err = command("compare", runs / "a", runs / "a")
    assert code == 2 and "named twice" in err
    assert command("compare", runs / "b", runs)[0] == 0


def test_a_curve_in_a_file_stands_beside_runs(runs: Path, command: Callable) -> None:
    curve = runs.parent / "curve.csv"
    curve.write_text("step,loss\n1,3.0\n2,2.9\n")
    code, out, _ = command("spikes", curve, runs / "deep", "--reference", runs / "deep", "--json")
    assert code == 0 and [run["label"] for run in json.loads(out)["runs"]] == ["curve.csv", "c"]


@pytest.mark.parametrize("name", ["compare", "spikes", "status"])
def test_a_path_that_does_not_exist_is_refused_though_others_do(name: str, runs: Path, command: Callable) -> None:
    for missing in (runs / "aa", runs / "x*"):
        code, out, err = command(name, runs / "a", missing, "--json")
        assert code == 2 and not out and str(missing) in err and "no such run directory" in err


@pytest.mark.parametrize("name", ["compare", "spikes"])
@pytest.mark.parametrize("damage", ["metrics.jsonl", "run.json"])
def test_a_run_that_cannot_be_read_is_passed_over_unless_it_was_named(
    damage: str, name: str, runs: Path, command: Callable
) -> None:
    (runs / "a" / damage).write_text("[]\n{}\n")
    for named in (runs, f"{runs}/*"):
        code, out, err = command(name, named, "--json")
        assert code == 0, err
        assert "a" not in {run["label"] for run in json.loads(out)["runs"]}
        assert f"note: skipped: {runs / 'a'}: " in err and damage in err
    code, out, err = command(name, runs / "a", runs, "--json")
    assert code == 4 and damage in err
    assert bool(out) == (name == "compare"), "two whole runs are still compared"
    assert command(name, runs / "b", runs / "deep", "--json")[0] == 0


def test_a_run_that_was_imported_or_compressed_is_found_where_it_is_named_and_not_in_a_folder(tmp_path: Path) -> None:
    """It has never been started, so a folder's table of runs leaves it out."""
    made = tmp_path / "runs" / "half"
    (made / "checkpoints").mkdir(parents=True)
    (made / "config.yaml").write_text("run: {name: half}\n")
    assert runs_at(made) == [made] and find_runs([made], pytest.fail) == [made]
    assert runs_at(tmp_path / "runs") == []
