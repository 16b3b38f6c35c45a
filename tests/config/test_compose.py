"""Composition: every preset, every mistake as one clear line, values that survive the way to disk and back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kha_train import RunConfig, compose
from kha_train.cli.main import run
from kha_train.config.build import build, flatten, to_plain
from kha_train.config.compose import STUDIES, dump, load, quoted, shipped
from kha_train.config.validate_ranks import validate_batch
from kha_train.errors import ConfigError, KhaError
from kha_train.estimate.counts import count_parameters

DATA = ["data.train=t", "data.validation=v"]
PRESETS = {
    group: sorted(path.stem for path in (shipped("configs") / group).glob("*.yaml"))
    for group in ("model", "attention", "data", "engine")
}


PROMISED = {
    "model": ["moe_6b", "tiny"],
    "attention": ["gqa", "kha_linear", "kha_mlp", "mha", "mqa"],
    "data": ["quickstart", "shards"],
    "engine": ["zero1", "zero2", "zero3"],
}


EVERY_PRESET = [
    f"{'interaction@attention.interaction' if path.parent.name == 'interaction' else path.parent.name}={path.stem}"
    for path in sorted(shipped("configs").glob("*/*.yaml"))
    if path.parent.name != STUDIES
]
FULL_WIDTH_MISFITS = {("olmoe", "gta"), ("olmoe", "mla")}


@pytest.mark.parametrize("group", PROMISED)
def test_the_promised_presets_are_there(group: str) -> None:
    assert set(PROMISED[group]) <= set(PRESETS[group])


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        pytest.param(*pair, marks=() if pair[0] == "tiny" else pytest.mark.slow)
        for pair in product(PRESETS["model"], PRESETS["attention"])
    ],
)
def test_every_model_composes_with_every_attention_but_those_that_cannot_be(model: str, attention: str) -> None:
    """Talking heads hold all scores, so long rows are refused; tied and latent keys have no full-width norm."""
    overrides = [f"model={model}", f"attention={attention}", "run.name=one"]
    if (attention == "talking_heads" and model not in ("tiny", "small")) or (model, attention) in FULL_WIDTH_MISFITS:
        with pytest.raises(ConfigError, match="attention"):
            compose(overrides)
        return
    config = compose(overrides)
    assert (config.model.name, config.attention.name) == (model, attention)


@pytest.mark.parametrize(
    "preset",
    [pytest.param(preset, marks=() if preset == "attention=kha_mlp" else pytest.mark.slow) for preset in EVERY_PRESET],
)
def test_every_field_can_be_typed_beside_every_preset(preset: str) -> None:
    config = compose([preset, *DATA])
    values = flatten(to_plain(config)).items()
    typed = [f"{key}={quoted(value) if isinstance(value, str) else json.dumps(value)}" for key, value in values]
    assert compose([preset, *typed]) == config


@pytest.mark.parametrize(("model", "attention"), list(product(PROMISED["model"], PROMISED["attention"])))
def test_the_heads_of_the_model_are_those_of_its_attention(model: str, attention: str) -> None:
    config = compose([f"model={model}", f"attention={attention}"])
    base, heads = config.attention.base, config.model.query_heads
    assert base.query_heads == heads and base.head_dim == config.model.head_dim
    assert base.kv_heads == {"mha": heads, "mqa": 1}.get(attention, config.model.kv_heads)


@pytest.mark.parametrize("engine", PRESETS["engine"])
def test_engine_presets_differ_in_the_stage_alone(engine: str) -> None:
    stage = int(engine[-1])
    zero1 = compose().engine
    assert compose([f"engine={engine}"]).engine == replace(zero1, zero_stage=stage)


@pytest.mark.parametrize("data", PRESETS["data"])
def test_data_presets_compose_once_their_directories_are_named(data: str) -> None:
    config = compose([f"data={data}", *DATA])
    assert (config.data.name, config.data.train) == (data, "t")


def test_interactions_are_those_of_the_paper() -> None:
    interaction = {name: compose([f"attention={name}"]).attention.interaction for name in PROMISED["attention"]}
    assert [interaction[name].name for name in ("gqa", "mha", "mqa")] == ["none"] * 3
    assert (interaction["kha_linear"].name, interaction["kha_linear"].projections) == ("knocking_linear", (*"qkv",))
    assert (interaction["kha_mlp"].name, interaction["kha_mlp"].projections) == ("knocking_mlp", ("v",))


@pytest.mark.parametrize(("attention", "total"), [("gqa", 6_102_268_416), ("kha_mlp", 6_103_153_152)])
def test_the_large_preset_has_the_published_number_of_parameters(attention: str, total: int) -> None:
    config = compose(["model=moe_6b", f"attention={attention}"])
    assert count_parameters(config).total == total
    model, moe = config.model, config.moe
    assert (model.layers, model.hidden_size, model.query_heads, model.kv_heads) == (18, 2048, 32, 4)
    assert (moe.experts, moe.top_k, moe.expert_width) == (128, 8, 384)


def test_the_tiny_preset_has_four_layers_of_eight_experts() -> None:
    config = compose(["model=tiny"])
    assert (config.model.layers, config.model.hidden_size, config.model.seq_len) == (4, 128, 256)
    assert (config.moe.experts, config.moe.top_k) == (8, 2)
    assert count_parameters(config).total < 3_000_000


def test_the_run_is_named_after_variant_and_seed() -> None:
    config = compose(["attention=kha_mlp", "run.seed=3"])
    assert (config.run.name, config.run.dir) == ("kha_mlp-s3", "runs/kha_mlp-s3")


def test_the_tree_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        compose().run.steps = 3


MISTAKES = {
    "unknown key": (["model.hiden_size=3"], "model.hiden_size", None, "model.layers, ", "model.hidden_size"),
    "unknown key at the top": (["modle.layers=3"], "modle.layers", None, "model", None),
    "added key": (["+model.dropout=0.1"], "model.dropout", None, "layers", None),
    "wrong type": (["run.steps=many"], "run.steps", "many", "int", None),
    "a whole number is asked": (["run.steps=1.5"], "run.steps", 1.5, "int", None),
    "no value": (["run.steps=null"], "run.steps", None, "int", None),
    "unknown preset": (["attention=kha_mpl"], "attention", "kha_mpl", "kha_linear", "kha_mlp"),
    "unknown variant": (
        ["attention=kha_mlp", "attention.interaction.name=knocking"],
        "attention.interaction.name",
        "knocking",
        "knocking_linear",
        "knocking_",
    ),
    "not an allowed value": (["engine.precision=fp16"], "engine.precision", "fp16", "auto, fp32, bf16", "bf16"),
    "a stage that is none": (["engine.zero_stage=4"], "engine.zero_stage", 4, "1, 2, 3", None),
    "too few values": (["optim.betas=[0.9]"], "optim.betas", [0.9], None, None),
    "a value for a list": (["telemetry.wandb.tags=one"], "telemetry.wandb.tags", "one", None, "[one]"),
    "a setting left open": (["data=shards"], "data.train", None, None, "data.train=VALUE"),
    "heads that do not divide": (["model.kv_heads=3"], "model.kv_heads", 3, "1, 2, 4", "model.kv_heads=2"),
    "an odd head width": (["model.head_dim=7"], "model.head_dim", 7, "even", None),
    "more chosen than there are": (["moe.top_k=9"], "moe.top_k", 9, None, "lower"),
    "fp32 with bf16 sums": (
        ["engine.precision=fp32", "engine.grad_accum_dtype=bf16"],
        "engine.grad_accum_dtype",
        "bf16",
        None,
        "engine.precision=bf16",
    ),
    "rows the grouped kernel cannot take": (["moe.expert_width=100"], "moe.expert_width", 100, "8", "moe.backend=loop"),
    "a schedule longer than the run": (
        ["optim.schedule.name=wsd", "optim.schedule.warmup=0.9"],
        "optim.schedule",
        None,
        None,
        "optim.schedule.decay=0.1",
    ),
    "nothing to do": (["run.steps=0"], "run.steps", 0, None, None),
    "not a number": (["optim.lr=nan"], "optim.lr", None, None, None),
    "a projection twice": (
        ["attention=kha_mlp", "attention.interaction.projections=[v,v]"],
        "attention.interaction.projections",
        ["v", "v"],
        "q, k, v",
        "[v]",
    ),
    "options of another variant": (
        ["attention.interaction.projections=[v]"],
        "attention.interaction.projections",
        None,
        "attention.interaction.name",
        None,
    ),
    "code": (["+run._target_=os.system"], "config.run._target_", None, None, None),
    "a resolver": (["run.name=${oc.env:HOME}"], "config.run.name", "${oc.env:HOME}", None, None),
    "a resolver in pieces": (["run.name=a${run.${oc.env:HOME}}"], "override", None, None, None),
    "a reference to nothing": (["run.name=${nothing}"], "override", None, None, None),
    "a reference to itself": (["run.name=${run.name}"], "override", None, None, None),
    "not an override": (["run.steps"], "override", "run.steps", None, None),
    "a bracket left open": (["run.steps=[1"], "override", None, None, None),
    "no preset": (["attention=null"], "attention", "null", "gqa", None),
    "two presets": (["model=[tiny,moe_6b]"], "model", "[tiny,moe_6b]", "tiny", None),
    "a group taken away": (["~engine"], "engine", "", "zero1", None),
    "Hydra's own settings": (["hydra.run.dir=/elsewhere"], "hydra.run.dir", None, None, None),
    "an unknown setting of a chosen variant": (
        ["attention=kha_linear", "attention.interaction.projection=[v]"],
        "attention.interaction.projection",
        None,
        "attention.interaction.projections",
        "did you mean attention.interaction.projections?",
    ),
    "a setting without its section": (["lr=1e-3"], "lr", None, None, "did you mean optim.lr?"),
    "a sweep": (["run.steps=1,2"], "run.steps", "1,2", None, "kha sweep run.steps=1,2 --local"),
    "presets of a sweep": (["attention=gqa,mha"], "attention", "gqa,mha", None, "kha sweep attention=gqa,mha --local"),
    "values without a list": (["optim.lr=interval(0,1)"], "optim.lr", "interval(0,1)", None, "give the values"),
    "presets without a list": (["attention=glob(*)"], "attention", "glob(*)", None, "give the values"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_field_value_allowed_and_fix(
    mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides, field, value, allowed, fix = MISTAKES[mistake]
    with pytest.raises(ConfigError) as raised:
        compose(overrides)
    error = raised.value
    assert error.field == field
    assert value is None or error.value == value
    assert allowed is None or allowed in (error.allowed or "")
    assert fix is None or fix in (error.fix or "")

    with pytest.raises(SystemExit) as ended:
        run(["train", *overrides])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err == f"{error.line()}\n" and error.line().startswith(f"configuration error: {error}")
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("arguments", [["trian"], ["quickstart", "--stps", "3"], ["compare"], ["data", "tokenize"]])
def test_a_mistyped_command_is_told_without_a_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(arguments)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Usage" in printed and "Traceback" not in printed


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_batch_that_does_not_divide_says_which_would(world_size: int) -> None:
    config = compose(["data.global_batch_size=18", "engine.micro_batch_size=4"])
    with pytest.raises(ConfigError, match="data.global_batch_size = 18") as raised:
        validate_batch(config, world_size)
    proposed = [int(word) for word in raised.value.fix.replace("=", " ").split() if word.isdigit()]
    for rows in proposed:
        validate_batch(replace(config, data=replace(config.data, global_batch_size=rows)), world_size)


@pytest.mark.parametrize("attention", PRESETS["attention"])
def test_a_saved_configuration_reads_back_equal(attention: str, tmp_path: Path) -> None:
    config = compose([f"attention={attention}", "optim.lr=0.1234567890123456789", "telemetry.wandb.tags=[a,'1',b c]"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config


def test_a_configuration_is_plain_data() -> None:
    plain = to_plain(compose())
    assert build(RunConfig, json.loads(json.dumps(plain))) == compose()


def test_a_saved_configuration_that_was_edited_is_judged_like_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    plain = to_plain(compose())
    for change, field in (({"moe": {**plain["moe"], "top_k": 9}}, "moe.top_k"), ({"modle": {}}, "modle")):
        path.write_text(yaml.safe_dump(plain | change))
        with pytest.raises(ConfigError, match=field):
            load(path)


def test_a_missing_saved_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "config.yaml")


def test_later_overrides_win() -> None:
    assert compose(["run.steps=1", "run.steps=2"]).run.steps == 2


def test_a_preset_does_not_undo_an_override_that_stands_before_it() -> None:
    assert compose(["model.layers=3", "model=moe_6b"]).model.layers == 3


def test_composing_does_not_touch_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose()
    assert Path.cwd() == tmp_path and list(tmp_path.iterdir()) == []


KEYS = sorted({*flatten(to_plain(compose(["attention=kha_mlp"]))), *PRESETS, "interaction@attention.interaction"})
VALUES = st.one_of(
    st.sampled_from(["null", "???", "{}", "[]", "[1,2]", "{a:1}", "nan", "-inf", "1e400", "true", "''", "0", "-1"]),
    st.sampled_from(["${run.seed}", "${model}", "${oc.env:HOME}", "${", "$", "kha_mlp", "gqa", "../tiny", "bf16"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12),
)
OVERRIDES = st.one_of(
    st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "~"]), st.sampled_from(KEYS), VALUES),
    st.builds("{}={}".format, st.sampled_from(KEYS).map(lambda key: key[:-1]), VALUES),
    st.text(max_size=24),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(OVERRIDES, min_size=1, max_size=3))
def test_whatever_is_typed_ends_in_a_configuration_or_a_configuration_error(overrides: list[str]) -> None:
    try:
        config = compose(overrides)
    except KhaError as error:
        assert isinstance(error, ConfigError) and error.exit_code == 2
        assert "\n" not in error.line()
    else:
        assert build(RunConfig, to_plain(config)) == config
