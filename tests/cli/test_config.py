"""`kha config` shows, explains and compares configurations, and makes nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from kha_train.config.build import to_plain
from kha_train.config.compose import compose, dump
from tests.conftest import Kha

OLD_RUN = next((Path(__file__).resolve().parents[1] / "fixtures" / "old_runs").rglob("config.yaml")).parent


def test_show_is_the_configuration_that_would_be_trained_and_the_one_of_a_run(kha: Kha, tmp_path: Path) -> None:
    typed = ["attention=kha_mlp", "run.steps=3"]
    code, out, _ = kha("config", "show", *typed)
    assert code == 0 and yaml.safe_load(out) == to_plain(compose(typed))
    assert json.loads(kha("config", "show", *typed, "--json")[1]) == to_plain(compose(typed))
    assert list(yaml.safe_load(kha("config", "show", "--section", "attention.base")[1])) == ["attention"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump(compose(typed)))
    assert yaml.safe_load(kha("config", "show", "run")[1]) == to_plain(compose(typed))
    assert kha("config", "show", "run", "--where")[0] == 2
    assert kha("config", "show", "--section", "nothing")[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_show_says_where_each_setting_was_set(kha: Kha) -> None:
    found = json.loads(kha("config", "show", "optim.lr=1e-3", "--where", "--section", "optim", "--json")[1])
    assert found["optim.lr"] == {"value": 1e-3, "set_at": "command line: optim.lr=1e-3"}
    assert found["optim.eps"]["set_at"].startswith("configs/optim/adamw.yaml:")


def test_explain_prints_what_it_knows_of_a_setting_and_the_settings_of_a_section(kha: Kha) -> None:
    code, out, _ = kha("config", "explain", "moe.z_loss_weight", "moe.z_loss_weight=0.1")
    assert code == 0 and "command line: moe.z_loss_weight=0.1" in out and "arXiv 2202.08906" in out
    assert "moe.z_loss_weight" in kha("config", "explain", "moe")[1]
    for key, default in (("data.seed", "null"), ("model.layers", "none: a preset gives the value")):
        assert re.search(rf"^default +{default}\s*$", kha("config", "explain", key)[1], re.MULTILINE)
    assert "did you mean optim.lr?" in kha("config", "explain", "optim.lrr")[2]


def test_diff_compares_settings_runs_and_files_and_says_what_a_difference_affects(kha: Kha, tmp_path: Path) -> None:
    (tmp_path / "saved.yaml").write_text(dump(compose(["run.steps=7", "checkpoint.every_steps=9"])))
    found = json.loads(kha("config", "diff", "", "saved.yaml", "--json")[1])["differences"]
    changed = {row["key"]: (row["first"], row["second"]) for row in found if not row["key"].startswith("run.")}
    assert changed == {"checkpoint.every_steps": (100, 9)}
    (steps,) = (row for row in found if row["key"] == "run.steps")
    assert (steps["first"], steps["second"]) == (200, 7) and "resume.allow_changes" in steps["affects"]
    found = json.loads(kha("config", "diff", "attention=gqa run.name=a", "attention=mla run.name=a", "--json")[1])
    widths = [row for row in found["differences"] if row["key"] == "attention.base.latent_width"]
    assert [(row["first"], row["second"]) for row in widths] == [("(absent)", 512)]
    assert "no difference" in kha("config", "diff", "run.steps=200", "")[1]
    # A run of an older release has the settings added since at the values from before.
    keys = {row["key"] for row in json.loads(kha("config", "diff", str(OLD_RUN), "", "--json")[1])["differences"]}
    assert "run.steps" in keys and "engine.kernels" not in keys
    assert kha("config", "diff", "nowhere", "")[0] == 2
    code, _, err = kha("config", "diff", "run.name=it's", "")
    assert code == 2 and "No closing quotation" in err


def test_list_marks_the_default_of_each_group(kha: Kha) -> None:
    out = kha("config", "list")[1]
    assert "tiny*" in out and "interaction@attention.interaction=" in out
    assert "OLMoE-1B-7B as published" in kha("config", "list", "model")[1]
    code, _, err = kha("config", "list", "modell")
    assert code == 2 and "allowed: attention" in err
