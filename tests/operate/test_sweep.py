"""Sweeps: the points of a grid, their directories, which are missing, and what may reach SLURM."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kha_train.cli.main import run
from kha_train.config.compose import compose, expand, quoted, shipped
from kha_train.errors import ConfigError, KhaError
from kha_train.estimate.counts import flops_per_token
from kha_train.operate.slurm import (
    VALUE,
    JobOptions,
    parse_sbatch,
    points_document,
    read_point,
    sbatch_command,
    start_missing,
    submit,
)
from kha_train.operate.status import run_status
from kha_train.operate.sweep import (
    checked_equal,
    default_name,
    load_sweep,
    plan_sweep,
    queued_labels,
    statuses,
    sweep_directory,
)
from kha_train.record import Marker, Record, set_marker
from kha_train.record.files import write_json

ROOT = Path(__file__).resolve().parents[2]
WILD = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12) | st.text(
    "ab'\"\\ \n$()`{}[],=~#%;&|<>*", max_size=8
)

FAKE_SBATCH = """#!/bin/bash
printf '%s\\0' "$@" > "$FAKE/arguments"
env -0 > "$FAKE/environment"
[[ -z "$FAKE_REFUSES" ]] || { echo "no such account" >&2; exit 1; }
echo "7;cluster"
"""
FAKE_SQUEUE = """#!/bin/bash
cat "$FAKE/queue"
"""


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a stand-in for sbatch writes what it was given, and one for squeue reads what to answer."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "queue").touch()
    for name, text in {"sbatch": FAKE_SBATCH, "squeue": FAKE_SQUEUE}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(folder))
    return folder


def arguments(fake_slurm: Path) -> list[str]:
    return (fake_slurm / "arguments").read_text().split("\0")[:-1]


def start(directory: Path, overrides: list[str], retry_failed: bool = False, **options: Any) -> list[str]:
    points = plan_sweep(directory, overrides)
    started = start_missing(directory, points, JobOptions(**options), equal="steps", retry_failed=retry_failed)
    return [point.label for point in started.points]


def test_a_grid_is_the_product_of_its_choices_and_one_value_with_commas_is_one_value() -> None:
    points = expand(["attention=gqa,kha_mlp", "run.seed=range(0,2)", "optim.betas=[0.9,0.95]", "run.name='a,b'"])
    assert [point[:2] for point in points] == [
        ["attention=gqa", "run.seed=0"],
        ["attention=gqa", "run.seed=1"],
        ["attention=kha_mlp", "run.seed=0"],
        ["attention=kha_mlp", "run.seed=1"],
    ]
    assert all(point[2:] == ["optim.betas=[0.9,0.95]", "run.name='a,b'"] for point in points)


def test_a_points_directory_follows_from_what_it_is_not_from_its_number(tmp_path: Path) -> None:
    wide = plan_sweep(tmp_path / "s", ["attention=gqa,kha_mlp", "seed=0,1,2"])
    narrow = plan_sweep(tmp_path / "s", ["seed=2,1", "attention=kha_mlp"])
    assert len({point.run_dir for point in wide}) == 6
    assert {point.run_dir for point in narrow} < {point.run_dir for point in wide}
    assert [point.label for point in wide[:2]] == ["gqa-s0", "gqa-s1"]
    rates = plan_sweep(tmp_path / "s", ["optim.lr=1e-3,3e-4"])
    assert [point.label for point in rates] == ["gqa-s0-lr0.001", "gqa-s0-lr0.0003"]
    for point in wide[-1:]:
        config = compose(point.overrides)
        assert (config.run.dir, config.run.name, config.telemetry.wandb.group) == (point.run_dir, point.label, "s")


@pytest.mark.parametrize(
    "overrides, word",
    [
        (["attention=gqa,kha_mpl"], "kha_mpl"),
        (["attention=gqa", "model.kv_heads=2,3"], "kv_heads"),
        (["attention=gqa,gqa"], "two points"),
        (["optim.weight_decay=0,0.0"], "two points"),
        (["data.train=a/train,./a/train/", "run.seed=0,1"], "two points"),
        (["run.dir=a,b"], "run.dir"),
        (["attention=gqa,(kha"], "override"),
    ],
)
def test_one_point_that_cannot_run_refuses_the_whole_sweep(tmp_path: Path, overrides: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        plan_sweep(tmp_path / "s", overrides)
    assert list(tmp_path.iterdir()) == []


def test_budgets_are_equal_in_what_was_asked_for(tmp_path: Path) -> None:
    grid = ["attention=gqa,kha_mlp", "run.steps=1000"]
    plain, knocking = plan_sweep(tmp_path / "s", grid, "flops")
    assert plain.steps == 1000 > knocking.steps
    for point in (plain, knocking):
        config = compose(point.overrides)
        spent = config.run.steps * config.data.global_batch_size * config.model.seq_len
        spent *= flops_per_token(config).training
        assert spent == pytest.approx(plain.flops, rel=1e-3)
    small, large = plan_sweep(tmp_path / "s", ["data.global_batch_size=8,16", "run.steps=1000"], "tokens")
    assert (small.steps, large.steps) == (1000, 500) and small.tokens == large.tokens
    grows = "data.batch_schedule=[],[{start_step: 101, global_batch_size: 24}]"
    constant, growing = plan_sweep(tmp_path / "s", ["data.global_batch_size=8", grows, "run.steps=1000"], "tokens")
    assert (constant.steps, growing.steps) == (1000, 400) and constant.tokens == growing.tokens
    with pytest.raises(ConfigError, match="run.steps"):
        plan_sweep(tmp_path / "s", ["run.steps=10,20"], "tokens")
    with pytest.raises(ConfigError, match="steps, tokens, flops"):
        checked_equal("hours")


def test_only_what_is_missing_is_submitted(tmp_path: Path, fake_slurm: Path) -> None:
    directory, grid = tmp_path / "s", ["attention=gqa,kha_linear,kha_mlp", "seed=0,1"]
    assert len(start(directory, grid)) == 6
    assert "--array=0-5" in arguments(fake_slurm)
    (fake_slurm / "queue").write_text("7_1\n7_5\n9_0\n")
    assert queued_labels(load_sweep(directory), {"7_1", "7_5", "9_0"}) == {"gqa-s1", "kha_mlp-s1"}
    for label, marker in {
        "gqa-s0": Marker.DONE,
        "kha_linear-s0": Marker.FATAL,
        "kha_linear-s1": Marker.REQUEUE,
    }.items():
        (directory / label).mkdir()
        set_marker(directory / label, marker)
    alive = Record.open(directory / "kha_mlp-s0")
    try:
        assert start(directory, grid) == ["kha_linear-s1"]
        assert start(directory, grid, retry_failed=True) == ["kha_linear-s0", "kha_linear-s1"]
    finally:
        alive.close()
    points = plan_sweep(directory, grid)
    states = {status.name: status.state for status in statuses(points, {"gqa-s1"})}
    assert states == {
        "gqa-s0": "done",
        "gqa-s1": "queued",
        "kha_linear-s0": "fatal",
        "kha_linear-s1": "requeue",
        "kha_mlp-s0": "new",
        "kha_mlp-s1": "new",
    }


def test_what_the_job_reads_is_what_was_planned(tmp_path: Path, fake_slurm: Path) -> None:
    start(tmp_path / "s", ["attention=gqa,kha_mlp", "run.steps=5"])
    script, points_file = arguments(fake_slurm)[-2:]
    assert Path(script) == shipped("launch") / "sweep.sbatch"
    for index, point in enumerate(plan_sweep(tmp_path / "s", ["attention=gqa,kha_mlp", "run.steps=5"])):
        assert read_point(Path(points_file), index) == [point.run_dir, *point.overrides]
    with pytest.raises(ConfigError, match="2 points"):
        read_point(Path(points_file), 2)
    given_environment = (fake_slurm / "environment").read_text().split("\0")
    assert f"KHA_PYTHON={sys.executable}" in given_environment


def test_a_refusal_of_sbatch_is_told_and_leaves_nothing_submitted(
    tmp_path: Path, fake_slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_REFUSES", "1")
    with pytest.raises(SystemExit) as ended:
        run(["sweep", "attention=gqa,kha_mlp", "--dir", str(tmp_path), "--name", "s"])
    assert ended.value.code == 1
    assert "no such account" in capsys.readouterr().err
    assert load_sweep(tmp_path / "s")["submissions"] == []


def test_a_batch_that_does_not_deal_out_to_the_ranks_of_a_job_is_refused_before_anything_is_submitted(
    tmp_path: Path, fake_slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default batch is 8 rows, in micro-batches of 4."""

    def refused(*grid: str, **options: object) -> bool:
        points = plan_sweep(tmp_path / "s", grid)
        try:
            start_missing(tmp_path / "s", points, JobOptions(**options), equal="steps", retry_failed=False)
        except ConfigError as error:
            assert error.field == "data.global_batch_size"
            assert not (fake_slurm / "arguments").exists() and not (tmp_path / "s").exists()
            return True
        shutil.rmtree(tmp_path / "s")
        (fake_slurm / "arguments").unlink()
        return False

    site = tmp_path / "site.env"
    site.write_text("# KHA_NPROC=1\nexport KHA_NPROC=2\n")
    assert refused("attention=gqa", nodes=8, gpus_per_node=8)
    assert refused("data.global_batch_size=256,100", nodes=8, gpus_per_node=8), "one of two points"
    assert not refused("data.global_batch_size=256", nodes=8, gpus_per_node=8)
    assert refused("attention=gqa", nodes=3) and not refused("attention=gqa", nodes=2), "a node has one rank at least"
    assert not refused("attention=gqa", gpus_per_node=8, site=str(site)), "what the site sets counts, as in the job"
    assert not refused("engine=zero3", "engine.hpz_partition_size=8", nodes=2), "nobody knows how large a node is"
    monkeypatch.setenv("KHA_NPROC", "8")
    assert refused("attention=gqa")


def test_a_local_sweep_is_checked_for_its_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["sweep", "attention=gqa", "--dir", str(tmp_path), "--local", "--processes", "4"])
    assert ended.value.code == 2 and "data.global_batch_size" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_the_site_file_prints_is_not_taken_for_the_jobs_number(tmp_path: Path, fake_slurm: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text("echo Loading cuda/13; echo 41\n")
    points = plan_sweep(tmp_path / "s", ["attention=gqa"])
    options = JobOptions(site=str(site))
    assert start_missing(tmp_path / "s", points, options, equal="steps", retry_failed=False).job == "7"
    (fake_slurm / "sbatch").write_text("#!/bin/bash\necho welcome\n")
    with pytest.raises(KhaError, match="'Loading cuda/13\\\\n41\\\\nwelcome'.*squeue"):
        submit(tmp_path / "s", points, options)


def test_a_directory_that_holds_another_run_is_not_submitted_into(tmp_path: Path, fake_slurm: Path) -> None:
    from kha_train.config.compose import dump

    (point,) = plan_sweep(tmp_path / "s", ["attention=gqa"])
    Path(point.run_dir).mkdir(parents=True)
    (Path(point.run_dir) / "config.yaml").write_text(dump(compose([*point.overrides, "engine.micro_batch_size=2"])))
    assert start(tmp_path / "s", ["attention=gqa"]) == ["gqa-s0"], "how a step is executed may change"
    with pytest.raises(ConfigError, match="optim.lr"):
        start(tmp_path / "s", ["attention=gqa", "optim.lr=0.5"])


@settings(max_examples=25, deadline=None)
@given(WILD)
@example("TRUE")
@example("null")
@example("NaN")
@example("inf")
@example(".5")
def test_any_text_passes_through_an_override_exactly_or_is_refused(text: str) -> None:
    try:
        override = f"run.name={quoted(text)}"
    except ConfigError:
        assert "${" in text
        return
    assert compose([override]).run.name == text
    assert expand([override]) == [[override]]


@settings(max_examples=100, deadline=None)
@given(WILD, WILD)
def test_security_no_text_becomes_a_second_option_of_sbatch(name: str, value: str) -> None:
    try:
        options = JobOptions(sbatch=parse_sbatch([f"{name}={value}"]))
        command = sbatch_command(Path("runs/s"), Path("points.json"), 2, options)
    except ConfigError:
        return
    name, _, value = f"{name}={value}".partition("=")
    plain = sbatch_command(Path("runs/s"), Path("points.json"), 2, JobOptions())
    (added,) = [argument for argument in command if argument not in plain]
    assert added == (f"--{name}={value}" if value else f"--{name}")
    assert not value or VALUE.fullmatch(value)


@pytest.mark.parametrize(
    "text", ["exclude=node[01-03]", "constraint=a100|h100", "comment=two words", "comment=a'\"$(id)`"]
)
def test_security_options_travel_to_sbatch_as_they_are(tmp_path: Path, fake_slurm: Path, text: str) -> None:
    start(tmp_path / "50% done", ["attention=gqa", "run.steps=5"], sbatch=parse_sbatch([text]))
    assert f"--{text}" in arguments(fake_slurm)
    assert f"--output={tmp_path}/50%% done/logs/%A_%a.out" in arguments(fake_slurm), "SLURM reads %% as %"


@pytest.mark.parametrize("text", ["if then", "cd /nowhere", "return 4", "KHA_NPROC=0", "KHA_NPROC='x[$(id)]'"])
def test_a_site_file_that_fails_submits_nothing(tmp_path: Path, fake_slurm: Path, text: str) -> None:
    (tmp_path / "site").write_text(f"{text}\n")
    with pytest.raises(ConfigError, match=r"--site|KHA_NPROC"):
        start(tmp_path / "s", ["attention=gqa", "run.steps=5"], site=str(tmp_path / "site"))
    assert not (fake_slurm / "arguments").exists() and not (tmp_path / "s").exists()


@pytest.mark.parametrize("name", ["a b", "$(id)", "x\n#SBATCH --wrap=id", "../up", "-n", "", "a'b", "`id`", "a%b"])
def test_a_sweeps_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        sweep_directory(Path("runs"), name)


@settings(max_examples=40, deadline=None)
@given(st.lists(WILD, max_size=4))
def test_points_survive_their_file_exactly(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    class Point:
        run_dir = "a b\n'$(x)'"
        overrides = tuple(texts)

    file = tmp_path_factory.mktemp("points") / "points.json"
    write_json(file, points_document([Point()]))
    assert read_point(file, 0) == [Point.run_dir, *texts]


def test_the_name_of_a_sweep_is_what_it_sweeps() -> None:
    assert default_name(["attention=gqa,kha_mlp", "seed=0,1", "run.steps=5"]) == "attention-seed"
    assert default_name(["attention=gqa"]) == "sweep"


def test_printing_shows_command_points_and_scripts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        grid = ["attention=gqa,kha_mlp", "data.global_batch_size=16"]
        run(["sweep", *grid, "--name", "s", "--nodes", "4", "--parallel", "1", "--print"])
    assert not ended.value.code
    said = capsys.readouterr().out
    for word in ("gqa-s0, kha_mlp-s0", "--array=0-1%1", "--nodes=4", "#SBATCH --requeue", "conclude()"):
        assert word in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_local_sweep_trains_every_point_and_again_only_what_is_missing(
    small: list[str], tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    grid = ["attention=gqa,kha_mlp", *small, "model.layers=1", "run.steps=3"]
    command = [sys.executable, "-c", "from kha_train.cli.main import run; run()", "sweep", *grid, "--name=s"]
    command += [f"--dir={tmp_path}", "--local", "--json"]

    def sweep(stderr: int | TextIO = subprocess.PIPE) -> list[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": stderr}
        done = subprocess.run(command, env=clean_environment, text=True, cwd=ROOT, check=False, **streams)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["started"]

    assert sweep() == ["gqa-s0", "kha_mlp-s0"]
    (tmp_path / "s" / "kha_mlp-s0" / "DONE").unlink()
    with open("/dev/full", "w") as full:
        assert sweep(full) == ["kha_mlp-s0"], "a table that cannot be shown ends nothing"
    assert sweep() == []


def test_a_sweep_that_lacks_a_point_says_so_and_ends_with_an_error(
    tmp_path: Path, fake_slurm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sweep(*options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(["sweep", "attention=gqa,kha_mlp", "--name=s", f"--dir={tmp_path}", *options])
        return ended.value.code or 0, *capsys.readouterr()

    for label, marker in (("gqa-s0", Marker.DONE), ("kha_mlp-s0", Marker.FATAL)):
        (tmp_path / "s" / label).mkdir(parents=True)
        set_marker(tmp_path / "s" / label, marker)
    for local in ([], ["--local"]):
        code, out, err = sweep(*local, "--json")
        answer = json.loads(out)
        assert code == 1 and answer["missing"] == {"kha_mlp-s0": "fatal"} and answer["started"] == []
        assert "1 of 2 points are missing: kha_mlp-s0 (fatal)" in err and "--retry-failed" in err
    assert sweep("--retry-failed")[0] == 0, "what waits in the queue is not missing"


@pytest.mark.slow
def test_a_point_that_fails_is_named_and_the_others_are_trained(
    small: list[str], tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    grid = ["run.seed=0,1", *small, "model.layers=1", "run.steps=2", "run.name=r"]
    command = [sys.executable, "-c", "from kha_train.cli.main import run; run()", "sweep", *grid, "--name=s"]
    command += [f"--dir={tmp_path}", "--local", "--json"]
    point = tmp_path / "s" / plan_sweep(tmp_path / "s", grid)[0].label
    (point / "checkpoints" / "step-00000002").mkdir(parents=True)
    done = subprocess.run(command, env=clean_environment, text=True, cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == 1 and point.name in done.stderr, done.stderr
    assert list(json.loads(done.stdout)["missing"]) == [point.name]
    assert run_status(point.with_name(point.name.replace("seed0", "seed1"))).state == "done"
