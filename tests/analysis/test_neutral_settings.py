"""Which settings a fair pair may differ in depends on the other settings, as on resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kha_train.analysis.compare import compare_runs
from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.record import Record


def make_run(path: Path, *overrides: str, dtype: str = "float32") -> Path:
    """A run directory of two steps, with a whole configuration."""
    record = Record.open(path)
    record.begin_attempt(0, facts={"data_content_id": "c0ffee", "dtype": dtype})
    config = to_plain(compose([*overrides, f"run.dir={path}"]))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    for step in (1, 2):
        record.step({"step": step, "samples_first": step, "samples_last": step, "tokens": step, "train/loss": 2.0})
    record.close("done")
    return path


BY_MICRO_BATCH = ("moe.auxiliary_loss.weight=0.1", "moe.auxiliary_loss.scope=micro_batch")


@pytest.mark.parametrize(
    ("common", "change", "named"),
    [
        (BY_MICRO_BATCH, "engine.micro_batch_size=2", "engine.micro_batch_size (8 and 2)"),
        (BY_MICRO_BATCH[:1], "engine.micro_batch_size=2", ""),
        (BY_MICRO_BATCH[1:], "engine.micro_batch_size=2", ""),
        (BY_MICRO_BATCH, "engine.zero_stage=2", ""),
        (("stability.policy=rewind",), "checkpoint.every_steps=7", "checkpoint.every_steps"),
        ((), "checkpoint.every_steps=7", ""),
    ],
)
def test_a_setting_that_changes_results_in_company_is_named_between_two_runs_that_have_the_company(
    common: tuple[str, ...], change: str, named: str, tmp_path: Path
) -> None:
    one = make_run(tmp_path / "one", "engine.micro_batch_size=8", *common)
    other = make_run(tmp_path / "other", "engine.micro_batch_size=8", "attention=kha_mlp", *common, change)
    found = compare_runs([one, other]).pairs[0].confounders
    assert len(found) == bool(named) and all(text.startswith(named) for text in found)


def test_precision_is_compared_by_what_auto_stood_for(tmp_path: Path) -> None:
    cpu = make_run(tmp_path / "cpu")
    named = make_run(tmp_path / "named", "engine.precision=fp32", "attention=kha_mlp")
    gpu = make_run(tmp_path / "gpu", "attention=kha_mlp", dtype="bfloat16")
    assert compare_runs([cpu, named]).pairs[0].confounders == ()
    assert compare_runs([cpu, gpu]).pairs[0].confounders == ("engine.precision (fp32 and bf16)",)


@pytest.mark.parametrize(
    "preset",
    [
        *("mha", "mqa", "gta", "mla", "talking_heads", "diff", "linear"),
        *("gated", "gated_headwise", "kha_gate", "mea"),
    ],
)
def test_what_a_preset_says_is_the_variant(preset: str, tmp_path: Path) -> None:
    reference = make_run(tmp_path / "gqa", "model.kv_heads=2")
    other = make_run(tmp_path / "other", "model.kv_heads=2", f"attention={preset}")
    assert compare_runs([reference, other]).pairs[0].caveats == ()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("attention.qk_norm=none", "attention.qk_norm (per_head and none)"),
        ("attention.positions=none", "attention.positions (rope and none)"),
        ("attention.base.kv_heads=1", "attention.base.kv_heads (2 and 1)"),
        ("attention.interaction.projections=[q]", ""),
        ("attention.interaction.impl=eager", ""),
        ("attention.base.output_gate=headwise", ""),
        ("attention.backend=eager", ""),
    ],
)
def test_an_attention_setting_beside_the_variant_is_named(override: str, named: str, tmp_path: Path) -> None:
    reference = make_run(tmp_path / "gqa", "model.kv_heads=2")
    other = make_run(tmp_path / "other", "model.kv_heads=2", "attention=kha_mlp", override)
    assert compare_runs([reference, other]).pairs[0].confounders == ((named,) if named else ())


def test_an_attention_setting_that_both_runs_override_alike_is_none(tmp_path: Path) -> None:
    shared = ("model.kv_heads=2", "attention.qk_norm=none")
    one, other = make_run(tmp_path / "a", *shared), make_run(tmp_path / "b", *shared, "attention=kha_mlp")
    assert compare_runs([one, other]).pairs[0].caveats == ()
    assert compare_runs([one, make_run(tmp_path / "c", "model.kv_heads=2", "attention=mla")]).pairs[0].caveats == ()
