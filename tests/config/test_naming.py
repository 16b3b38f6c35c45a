"""A run without a given name is named after its settings: stable, distinct, and safe as a file name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train.config import compose as composing
from kha_train.config.build import flatten, to_plain, without_seeds
from kha_train.config.compose import compose, compose_at_home, dump, load, shipped
from kha_train.config.naming import old_name

NAMES = {
    "gqa-s0": [],
    "kha_mlp-s3": ["attention=kha_mlp", "run.seed=3"],
    "kha_mlp-s0-small": ["attention=kha_mlp", "model=small"],
    "gqa-s0-skip": ["stability=skip"],
    "mla-knocking_linear-s0": ["attention=mla", "interaction@attention.interaction=knocking_linear"],
    "kha_mlp-s0-projectionsq_v": ["attention=kha_mlp", "attention.interaction.projections=[q,v]"],
    "gqa-s0-lr0.001-steps400": ["run.steps=400", "optim.lr=1e-3"],
    "gqa-s0-decay0-schedulewsd": ["optim.schedule.name=wsd", "optim.schedule.decay=0"],
    "gqa-s0-base.kv_heads1": ["attention.base.kv_heads=1"],
    "gqa-s0-model.kv_heads1": ["model.kv_heads=1"],
    "gqa-s0-weight0.1": ["moe.auxiliary_loss={weight: 0.1}"],
    "kha_mlp-s0-provoked_instability": ["experiment=provoked_instability", "attention=kha_mlp"],
    "gqa-s0-provoked_instability-tiny": ["experiment=provoked_instability", "model=tiny"],
}
NAMED_BY_THE_BASELINE_ALONE = [
    ["model.layers=4"],
    ["model=tiny"],
    ["attention=gqa"],
    ["interaction@attention.interaction=none"],
    ["engine=zero3", "cluster=h100_8x8", "engine.device=cpu", "engine.micro_batch_size=2", "telemetry.console=quiet"],
    ["checkpoint.every_steps=7", "validation.rows=8", "run.max_minutes=3"],
    ["optim.weight_decay=0.10", "optim.schedule.final=1e-1", "data.train=./quickstart/shards/train/"],
]
CHOICES: dict[str, list[Any]] = {
    "attention": ["gqa", "kha_mlp", "kha_linear"],
    "model": ["tiny", "small"],
    "stability": ["observe", "skip"],
    "run.seed": [0, 1, 11],
    "data.seed": ["null", 0, 1, 2],
    "moe.routing_seed": ["null", 0, 1],
    "run.steps": [200, 100, 1000],
    "model.layers": [2, 4, 12],
    "model.seq_len": [256, 128],
    "optim.lr": [2e-3, 1e-3, 1e-5],
    "optim.eps": [1e-8, 1e-5],
    "optim.betas": ["[0.9,0.95]", "[0.9,0.98]", "[0.95,0.98]"],
    "optim.schedule.name": ["cosine", "wsd"],
    "optim.schedule.decay": [0.2, 0.1],
    "moe.score": ["sigmoid", "softmax"],
    "moe.routing_warmup_steps": [0, 10, 100],
    "data.train": ["quickstart/shards/train", "a/train", "b/a/train", "A/train", "'a b/train'", "s3://a/train"],
    "data.validation": ["quickstart/shards/validation", "a/validation"],
    "data.global_batch_size": [8, 16],
    "data.skip_windows": ["[]", "[[0,4]]", "[[0,4],[8,9]]"],
    "run.init_from": ["''", "runs/a", "runs/b"],
}
CHOSEN = st.fixed_dictionaries({}, optional={key: st.sampled_from(CHOICES[key]) for key in CHOICES})


@pytest.mark.parametrize("name", NAMES)
def test_a_name_tells_attention_seed_and_what_differs_from_the_presets(name: str) -> None:
    run = compose(NAMES[name]).run
    assert (run.name, run.dir) == (name, f"runs/{name}")


@pytest.mark.parametrize("overrides", NAMED_BY_THE_BASELINE_ALONE, ids=" ".join)
def test_what_a_resumed_run_may_change_is_no_other_run(overrides: list[str]) -> None:
    assert compose(overrides).run.name == "gqa-s0"


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.lists(CHOSEN, max_size=6))
def test_different_settings_have_different_names_that_are_safe_and_stable(chosen: list[dict[str, Any]]) -> None:
    named: dict[str, dict[str, Any]] = {}
    for choice in chosen:
        typed = [f"{key}={value}" for key, value in choice.items()]
        config = compose(typed)
        assert compose([*reversed(typed), *typed[:2]]).run == config.run
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,79}", config.run.name) and len(config.run.name) < 80
        plain = without_seeds(flatten(to_plain(config)))
        settled = {key: plain[key] for key in plain if key not in ("run.name", "run.dir", "model.name")}
        # Some file systems ignore case.
        assert named.setdefault(config.run.name.lower(), settled) == settled


@pytest.mark.parametrize(
    "spellings",
    [
        ("optim.weight_decay=0", "optim.weight_decay=0.0", "optim.weight_decay=0e5"),
        ("optim.weight_decay=1", "optim.weight_decay=1.0"),
        ("optim.betas=[0,0.95]", "optim.betas=[0.0,0.950]"),
        ("data.train=a/train", "data.train=a/train/", "data.train=./a/train", "data.train=a//train"),
        ("data.train=s3://a/train", "data.train=s3://a/train/"),
        ("'data.sources=[{name: a, path: a/b, weight: 1}]'", "'data.sources=[{name: a, path: ./a/b/, weight: 1.0}]'"),
    ],
    ids=lambda spellings: spellings[0],
)
def test_spellings_of_one_value_are_one_run(spellings: tuple[str, ...]) -> None:
    empty = ["data.train=''"] if "sources" in spellings[0] else []
    (name,) = {compose([*empty, text.strip("'")]).run.name for text in spellings}
    assert name != "gqa-s0"


def test_a_name_never_depends_on_what_a_resume_may_change() -> None:
    changed = ["run.steps=400", "model.layers=2"]
    for allowed in ("[run.steps]", "[run,model]"):
        assert compose([*changed, f"resume.allow_changes={allowed}"]).run == compose(changed).run


def test_a_name_without_room_for_all_settings_tells_rate_decay_and_steps() -> None:
    small = ["model.hidden_size=32", "model.head_dim=8", "data.global_batch_size=4", "engine.micro_batch_size=4"]
    name = compose([*small, "data.train=a/train", "run.steps=400", "optim.lr=0.001", "optim.weight_decay=0"]).run.name
    assert name.startswith("gqa-s0-lr0.001-weight_decay0-steps400-global_batch_size4-")


def test_a_given_name_or_directory_stays(tmp_path: Path) -> None:
    named = compose(["run.name=mine", "model.layers=2"])
    assert (named.run.name, named.run.dir) == ("mine", "runs/mine")
    placed = compose([f"run.dir={tmp_path}", "model.layers=2"])
    assert (placed.run.name, placed.run.dir) == ("gqa-s0-layers2", str(tmp_path))


def test_every_preset_of_attention_names_its_own_file() -> None:
    for path in (shipped("configs") / "attention").glob("*.yaml"):
        assert f"name: {path.stem}\n" in path.read_text()


def test_a_new_preset_that_is_a_copy_of_another_has_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shipped("configs"), tmp_path / "configs")
    baseline = tmp_path / "configs" / "attention" / "kha_mlp.yaml"
    shutil.copy(baseline, baseline.with_name("mine.yaml"))
    shutil.copy(tmp_path / "configs" / "interaction" / "none.yaml", tmp_path / "configs" / "interaction" / "own.yaml")
    monkeypatch.setattr(composing, "PACKAGE", tmp_path)
    mine = compose(["attention=mine"])
    assert (mine.attention.name, mine.run.name, mine.run.dir) == ("mine", "mine-s0", "runs/mine-s0")
    assert compose(["attention=mine", "attention.name=other"]).run.name == "other-s0"


SETTINGS = ["attention=kha_mlp", "model.layers=2", "data.train=a/train"]


class TestARunOfAnOlderRelease:
    """Such a release kept every run without a name in runs/VARIANT-sSEED."""

    @pytest.fixture(autouse=True)
    def begun(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        old = compose([*SETTINGS, "run.name=kha_mlp-s0"])
        assert old_name(old) == "kha_mlp-s0"
        Path(old.run.dir).mkdir(parents=True)
        Path(old.run.dir, "config.yaml").write_text(dump(old))

    def test_goes_on_by_the_same_command(self) -> None:
        for free in ([], ["engine=zero2"], ["data.train=./a/train/"]):
            run = compose_at_home([*SETTINGS, *free]).run
            assert (run.name, run.dir) == ("kha_mlp-s0", "runs/kha_mlp-s0"), free

    @pytest.mark.parametrize(
        "other",
        [
            "model.layers=3",
            "data.train=b/train",
            "run.steps=300",
            "run.steps=300 resume.allow_changes=[run.steps]",
            "run.seed=1",
        ],
    )
    def test_is_left_alone_by_other_settings(self, other: str) -> None:
        run = compose_at_home([*SETTINGS, *other.split()]).run
        assert run == compose([*SETTINGS, *other.split()]).run and run.dir != "runs/kha_mlp-s0"

    def test_keeps_its_name_where_its_directory_is_given(self) -> None:
        run = compose_at_home([*SETTINGS, "run.dir=runs/kha_mlp-s0"]).run
        assert (run.name, run.dir) == ("kha_mlp-s0", "runs/kha_mlp-s0")

    def test_is_passed_over_where_its_settings_cannot_be_read(self) -> None:
        Path("runs/kha_mlp-s0/config.yaml").write_text("[")
        assert compose_at_home(SETTINGS).run == compose(SETTINGS).run

    def test_is_not_looked_for_once_the_new_directory_is_there(self) -> None:
        new = Path(compose(SETTINGS).run.dir)
        new.mkdir()
        assert compose_at_home(SETTINGS).run.dir == str(new)
        assert load(Path("runs/kha_mlp-s0/config.yaml")).run.name == "kha_mlp-s0"
