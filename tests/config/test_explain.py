"""Where a setting comes from and what it is: each answer is held against the file or the schema that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kha_train.config.build import flatten, to_plain
from kha_train.config.compose import compose, shipped
from kha_train.config.constants import FREE_TO_CHANGE, may_differ
from kha_train.config.explain import explain, groups, meanings
from kha_train.config.origins import origins
from kha_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TYPED = (
    (),
    ("attention=kha_mlp", "optim.lr=1e-3"),
    ("attention=mla", "interaction@attention.interaction=knocking_linear", "engine=zero3", "cluster=h100_1x8"),
    ("experiment=kha_paper_main", "data.train=a", "data.validation=b", "stability=rewind"),
    ("model=moe_6b", "optim.schedule={name: wsd, decay: 0.4}", "+evaluation.tasks=[context]"),
)


@pytest.mark.parametrize("overrides", TYPED, ids=" ".join)
def test_the_line_that_set_a_value_holds_it(overrides: tuple[str, ...]) -> None:
    config = compose(overrides)
    values, places = flatten(to_plain(config)), origins(config, overrides)
    assert places.keys() == values.keys()
    for key, origin in places.items():
        if origin.where.startswith("command line: "):
            assert origin.where.removeprefix("command line: ") in overrides
            continue
        if not origin.where:
            continue
        file, _, line = origin.where.partition(":")
        text = (ROOT / file).read_text().splitlines()[int(line) - 1].strip()
        name = key.rpartition(".")[2]
        assert text.startswith(f"{name}:"), (key, origin)
        written = yaml.safe_load(text)[name]
        if not isinstance(written, str) or ("${" not in written and key != "run.name"):
            assert written == values[key], (key, origin)
        elif written != values[key]:
            assert origin.written == written


def test_what_is_typed_wins_over_every_file_and_a_preset_over_the_schema() -> None:
    typed = ("attention=kha_mlp", "model.layers=2", "model.layers=3", "optim.schedule={name: wsd}")
    places = origins(compose(typed), typed)
    assert places["model.layers"].where == "command line: model.layers=3"
    assert places["optim.schedule.name"].where == "command line: optim.schedule={name: wsd}"
    assert places["attention.name"].where == "command line: attention=kha_mlp"
    share = places["attention.interaction.share"]
    assert share.where.startswith("configs/interaction/knocking_mlp.yaml:")
    assert share.chosen_by in ("configs/attention/gqa.yaml", "configs/attention/kha_mlp.yaml")
    assert places["run.dir"].written == "runs/${run.name}"
    (routing,) = explain("moe.router_precision", ["experiment=kha_paper_main", "data.train=a", "data.validation=b"])
    file, _, line = routing.declared_at.partition(":")
    assert (ROOT / file).read_text().splitlines()[int(line) - 1].strip().startswith("router_precision:")


def test_every_setting_of_every_attention_is_explained() -> None:
    for preset in ("gqa", "mla", "mea", "talking_heads", "kha_gate"):
        overrides = [f"attention={preset}"]
        values = flatten(to_plain(compose(overrides)))
        for section in sorted({key.partition(".")[0] for key in values}) if preset == "gqa" else ["attention"]:
            for one in explain(section, overrides):
                assert one.meaning and one.type and one.section and one.value == values[one.key], one.key
                file, _, line = one.declared_at.partition(":")
                name = one.key.rpartition(".")[2]
                assert (ROOT / file).read_text().splitlines()[int(line) - 1].strip().startswith(f"{name}: ")
                free = "a resumed run may change it" in one.affects
                assert free == may_differ(one.key, FREE_TO_CHANGE, values), one.key


@pytest.mark.parametrize(
    ("key", "kind", "allowed", "default", "source"),
    [
        ("optim.lr", "float", "above 0", None, "Loshchilov and Hutter 2019"),
        ("model.layers", "int", "at least 1, at most 100,000", None, None),
        ("moe.score", "choice", "sigmoid, softmax", "sigmoid", "arXiv 2412.19437"),
        ("data.seed", "int or null", "0 or more", None, None),
        ("optim.betas", "list of 2: float, float", "", [0.9, 0.95], "Loshchilov and Hutter 2019"),
        ("telemetry.wandb.tags", "list of text", "", [], None),
        ("data.sources", "list of {name: text, path: text, weight: float}", "", [], None),
        ("attention.interaction.share", "choice", "heads, none", "heads", "arXiv 2510.23052"),
        ("attention.base.name", "text", "gqa, gta, mla, diff, linear, talking_heads", None, None),
        ("engine.name", "text", "deepspeed, plain", "deepspeed", None),
        ("telemetry.sinks", "list of text", "tensorboard, wandb", ["wandb"], None),
    ],
)
def test_type_range_default_and_source_are_those_of_the_schema_and_the_papers(
    key: str, kind: str, allowed: str, default: object, source: str | None
) -> None:
    (one,) = explain(key, ["attention=kha_mlp"])
    assert (one.key, one.type, one.allowed, one.default) == (key, kind, allowed, default)
    assert any(source in text for text in one.sources) if source else True


def test_a_default_of_null_is_one_and_a_setting_without_any_says_so() -> None:
    found = {one.key: (one.default, one.required) for section in ("data", "model") for one in explain(section, [])}
    assert found["data.seed"] == (None, False) and found["data.cache_gib"] == (100.0, False)
    assert found["model.layers"] == (None, True)


def test_a_comment_of_a_preset_that_names_the_paper_is_a_source() -> None:
    (rate,) = explain("moe.bias_update", ["experiment=kha_paper_main", "data.train=a", "data.validation=b"])
    assert any("updated loss-free balancing (Su 2025)" in text for text in rate.sources)
    assert rate.set_at.startswith("configs/experiment/kha_paper_main.yaml:")


def test_an_unknown_key_names_the_nearest_and_a_key_of_another_variant_names_the_variant() -> None:
    with pytest.raises(ConfigError, match="did you mean model.hidden_size"):
        explain("model.hiden_size", [])
    with pytest.raises(ConfigError, match="another attention") as refused:
        explain("attention.base.latent_width", [])
    assert refused.value.fix is not None and explain("attention.base.latent_width", [refused.value.fix])


def test_groups_list_every_file_and_the_default_that_composes() -> None:
    found, config = groups(), compose()
    assert {name: set(one.presets) for name, one in found.items()} == {
        folder.name: {path.stem for path in folder.glob("*.yaml")}
        for folder in shipped("configs").iterdir()
        if folder.is_dir() and folder.name != "study"
    }
    assert found["model"].default == config.model.name and found["attention"].default == config.attention.name
    assert found["experiment"].default is None and found["interaction"].typed == "interaction@attention.interaction"
    assert found["model"].presets["olmoe"] == "OLMoE-1B-7B as published (arXiv 2409.02060)"


def test_meanings_have_no_links_left() -> None:
    assert len(meanings()) > 150 and not [text for text in meanings().values() if re.search(r"\]\(", text)]
