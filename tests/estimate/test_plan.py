"""`kha plan`: its stable keys, its arithmetic, when a run fits and what it recommends when it does not."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from data_tools.synthetic import write_dataset
from kha_train import compose
from kha_train.cli.main import run
from kha_train.config.schema import RunConfig
from kha_train.estimate.memory import GIB, plan_memory
from kha_train.estimate.plan import make_plan
from kha_train.variants.attention import HeadShape, InteractionOptions

SIX_BILLION = ["model=moe_6b", "data.global_batch_size=512", "engine.micro_batch_size=1"]


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict]:
    """Exit code and JSON answer of `kha plan`."""
    with pytest.raises(SystemExit) as ended:
        run(["plan", *arguments, "--json"])
    return ended.value.code or 0, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("attention", "total", "active"),
    [("gqa", 6_102_268_416, 1_006_189_056), ("kha_mlp", 6_103_153_152, 1_007_073_792)],
)
def test_the_stable_keys_of_the_6b_model(attention: str, total: int, active: int, capsys) -> None:
    code, answer = answered(capsys, "model=moe_6b", f"attention={attention}")
    assert code == 0
    assert (answer["params"]["total"], answer["params"]["active"]) == (total, active)
    assert sum(answer["params"]["by_component"].values()) == total
    assert answer["flops_per_token"]["training"] == 3 * answer["flops_per_token"]["forward"]
    overhead = {"parameters_percent", "flops_percent", "cache_percent"}
    assert answer["interaction_overhead"].keys() == overhead
    assert (answer["interaction_overhead"]["parameters_percent"] > 0) is (attention != "gqa")
    memory = answer["memory_per_rank"]
    assert sum(memory["terms"].values()) == memory["total_bytes"] and memory["by_stage"].keys() == {"1", "2", "3"}
    assert memory["fits"] is None, "no machine was named"


def test_a_batch_that_grows_is_summed_over_the_run_and_planned_at_its_largest(capsys) -> None:
    grows = "data.batch_schedule=[{start_step: 11, global_batch_size: 16}, {start_step: 900, global_batch_size: 4}]"
    shape = ["model.seq_len=64", "run.steps=100", "engine.micro_batch_size=2"]
    code, answer = answered(capsys, *shape, "data.global_batch_size=8", grows)
    assert code == 0
    assert answer["time"]["tokens"] == (10 * 8 + 90 * 16) * 64
    assert answer["time"]["batch_schedule"] == [
        {"start_step": 1, "rows": 8, "tokens_before": 0},
        {"start_step": 11, "rows": 16, "tokens_before": 10 * 8 * 64},
    ]
    _, largest = answered(capsys, *shape, "data.global_batch_size=16")
    for part in ("memory_per_rank", "communication"):
        assert answer[part] == largest[part]
    assert answer["time"]["tokens_per_step"] == largest["time"]["tokens_per_step"]


def test_the_6b_model_fits_an_h200_when_recomputed_and_one_h100_with_bf16_sums_and_moments_too(capsys) -> None:
    code, answer = answered(capsys, *SIX_BILLION, "cluster=h100_1x1", "engine.activation_checkpointing=full")
    assert code == 2 and answer["memory_per_rank"]["fits"] is False
    assert answer["together"].split() == ["engine.grad_accum_dtype=bf16", "engine.moment_dtype=bf16"]
    full = ("engine=zero2", "engine.activation_checkpointing=full")
    code, answer = answered(capsys, *SIX_BILLION, "cluster=h200_1x1", *full, "engine.micro_batch_size=1")
    assert code == 0 and answer["memory_per_rank"]["largest_micro_batch"] >= 1


@pytest.mark.parametrize("cluster", ["h100_1x8", "h100_8x8", "h200_1x8", "a100_8x8", "h100_512x8"])
def test_what_is_advised_is_enough(cluster: str) -> None:
    """With rows for 8 micro-batches of 16: nothing fits that without recomputation."""
    overrides = ["model=moe_6b", f"cluster={cluster}", "engine.micro_batch_size=16"]
    plan = make_plan(compose(overrides))
    assert plan.fits is False and plan.remedies and plan.together
    assert [remedy.total_bytes + remedy.saves_bytes for remedy in plan.remedies] == [plan.memory.total] * len(
        plan.remedies
    )
    assert make_plan(compose([*overrides, *plan.together.split()])).fits is True


@pytest.mark.parametrize("bound", ["engine.compile=block", "optim.betas=[0.9,0.999]"])
def test_what_is_advised_is_admitted_beside_the_other_settings(bound: str) -> None:
    """Compiled blocks refuse ZeRO 3, and a slow second moment refuses bf16."""
    overrides = ["model=moe_6b", "cluster=h100_8x8", "engine.micro_batch_size=16", bound]
    plan = make_plan(compose(overrides))
    assert plan.remedies
    for remedy in plan.remedies:
        compose([*overrides, remedy.overrides])
    if plan.together:
        compose([*overrides, *(text for text in plan.together.split())])


CHANGES = {
    "zero_stage": (1, 2, 3),
    "activation_checkpointing": ("none", "selective", "full"),
    "grad_accum_dtype": ("fp32", "bf16"),
    "moment_dtype": ("fp32", "bf16"),
    "micro_batch_size": (1, 16),
}


def fits(config: RunConfig, devices: int, **engine: object) -> bool:
    """Whether a rank's memory is enough with these settings on so many devices."""
    cluster = replace(config.cluster, devices=devices)
    changed = replace(config, engine=replace(config.engine, **engine), cluster=cluster)
    return plan_memory(changed).total <= (cluster.memory_gib - cluster.reserved_gib) * GIB


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster=h100_1x1", "engine.micro_batch_size=1"],
        ["cluster=h100_1x1", "engine.micro_batch_size=1", "model.seq_len=32768"],
        ["cluster=h100_1x1", "engine.micro_batch_size=16"],
        ["cluster=h100_1x8", "engine.micro_batch_size=16"],
        ["cluster=h100_1x8", "engine.micro_batch_size=16", "cluster.memory_gib=34"],
        ["cluster=h100_1x8", "engine.micro_batch_size=16", "cluster.memory_gib=20"],
    ],
)
def test_no_less_than_what_is_advised_is_enough(overrides: list[str]) -> None:
    """Neither one remedy fewer on as many devices, nor any remedies on fewer devices."""
    config = compose(["model=moe_6b", "data.global_batch_size=512", *overrides])
    plan = make_plan(config)
    assert plan.fits is False and plan.together
    advised = dict(part.removeprefix("engine.").split("=") for part in plan.together.split())
    devices = int(advised.pop("cluster.devices", config.cluster.devices))
    chosen = {name: int(value) if value.isdigit() else value for name, value in advised.items()}
    assert fits(config, devices, **chosen)
    for name in chosen:
        assert not fits(config, devices, **{key: value for key, value in chosen.items() if key != name})
    if devices > config.cluster.devices:
        fewer = devices - (1 if devices <= config.cluster.devices_per_node else config.cluster.devices_per_node)
        for values in itertools.product(*CHANGES.values()):
            assert not fits(config, fewer, **dict(zip(CHANGES, values, strict=True)))


@pytest.mark.slow
def test_the_page_of_the_plan_shows_where_the_6b_model_fits() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = page[page.index("| one H200 |") :].partition("\n\n")[0].splitlines()
    engines = (
        ["engine=zero1", "engine.micro_batch_size=1"],
        ["engine=zero2", "engine.micro_batch_size=2", "engine.activation_checkpointing=full"],
    )
    for row, cluster in zip(rows, ("h200_1x1", "h100_1x1", "h100_1x8", "h100_8x8"), strict=True):
        for cell, engine in zip(row.strip("| ").split(" | ")[1:], engines, strict=True):
            plan = make_plan(compose([*SIX_BILLION, f"cluster={cluster}", *engine]))
            assert f"{plan.memory.total / GIB:.1f} " in cell and ("fits" in cell) == plan.fits, (cluster, cell)
            assert plan.fits or f"enough are `{plan.together}`" in cell, cluster
            assert "up to" not in cell or f"up to {plan.largest_micro_batch} rows" in cell, cluster


def test_long_rows_of_the_6b_model_with_masks_need_two_h100() -> None:
    config = compose([*SIX_BILLION, "cluster=h100_1x1", "model.seq_len=32768", "attention.backend=sdpa"])
    assert "cluster.devices=2" in make_plan(config).together.split()


@pytest.mark.parametrize("memory", [20, 24])
def test_advice_of_more_devices_keeps_the_groups_that_share_rows(memory: int) -> None:
    shared = ["cluster=h100_1x8", "cluster.devices=2", f"cluster.memory_gib={memory}", "engine.context_parallel=2"]
    config = compose([*SIX_BILLION, "engine=zero2", *shared])
    (devices,) = (text for text in make_plan(config).together.split() if text.startswith("cluster.devices="))
    assert int(devices.partition("=")[2]) % 2 == 0


def test_what_no_devices_can_hold_gets_no_advice() -> None:
    overrides = ["cluster=h100_1x8", "cluster.memory_gib=6", "cluster.reserved_gib=5.9"]
    assert make_plan(compose([*SIX_BILLION, *overrides])).together is None


@dataclass(frozen=True, kw_only=True)
class Remembering(InteractionOptions):
    """An interaction that keeps a number of its own for every key head."""

    def cache_numbers(self, heads: HeadShape) -> int:
        return heads.kv_heads


def test_what_an_interaction_keeps_while_decoding_is_in_the_cache_and_in_its_overhead() -> None:
    config = compose(["model=moe_6b", "attention=gqa"])
    remembering = replace(config.attention, interaction=Remembering(name="remembering"))
    plain, more = (make_plan(c).to_dict() for c in (config, replace(config, attention=remembering)))
    assert plain["interaction_overhead"]["cache_percent"] == 0
    assert more["interaction_overhead"]["cache_percent"] == pytest.approx(100 * 4 / (2 * 4 * 128))
    assert more["cache_bytes_per_token"] - plain["cache_bytes_per_token"] == 18 * 4 * 2


def test_time_and_cost_are_tokens_over_speed() -> None:
    plan = make_plan(compose(["experiment=kha_paper_main", "data.train=x", "data.validation=y", "cluster=h100_8x8"]))
    tokens = 238_419 * 512 * 8192
    flops = 9.661e9
    speed = 64 * 989e12 * 0.25 / flops
    assert plan.time["tokens"] == tokens
    assert plan.time["hours"] == pytest.approx(tokens / speed / 3600, rel=1e-3)
    assert plan.time["cost"] == pytest.approx(plan.time["hours"] * 64 * 2.5)
    assert plan.data == {"tokens": None, "epochs": None}


@pytest.mark.parametrize("cluster", ["h100_8x8", "h200_1x1", "b200_8x8"])
@pytest.mark.parametrize("name", ["main", "ablation"])
def test_the_paper_s_experiments_name_what_runs_them_and_fit(name: str, cluster: str) -> None:
    config = compose([f"experiment=kha_paper_{name}", "data.train=x", "data.validation=y", f"cluster={cluster}"])
    plan = make_plan(config)
    assert plan.accepted and plan.fits
    assert config.engine.precision == plan.resolved.precision == "bf16"
    assert config.attention.backend == "auto" and plan.resolved.backend.name == "varlen"


def test_283_h100_days_at_40_percent_for_a_trillion_tokens() -> None:
    overrides = ["experiment=kha_paper_main", "attention=gqa", "data.train=x", "data.validation=y"]
    plan = make_plan(compose([*overrides, "cluster=h100_1x1", "cluster.mfu=0.4"]))
    assert plan.time["device_hours"] / 24 == pytest.approx(283, abs=1)


def test_traffic_by_stage_for_rings_and_its_slowest_link() -> None:
    plan = make_plan(compose([*SIX_BILLION, "cluster=h100_8x8", "engine.micro_batch_size=2"]))
    once = 2 * 6_102_268_416 * 63 // 64
    # Of each forward under ZeRO 3 half a billion parameters stay for the backward.
    gathered = 12 * once - 4 * 2 * 500_000_000 * 63 // 64
    assert [volume.bytes_per_step for volume in plan.communication] == pytest.approx([2 * once, 5 * once, gathered])
    assert plan.communication[0].seconds_per_step == pytest.approx(2 * once / 50e9)
    inside = make_plan(compose([*SIX_BILLION, "cluster=h100_1x8"])).communication[0]
    assert inside.seconds_per_step == pytest.approx(inside.bytes_per_step / 450e9)


def test_checkpoints_hold_12_bytes_a_parameter_at_young_s_interval() -> None:
    saved = make_plan(compose([*SIX_BILLION, "cluster=h100_8x8", "checkpoint.keep_last=3"])).checkpoint
    assert saved["bytes"] == 12 * 6_102_268_416 and saved["kept_bytes"] == 3 * saved["bytes"]
    assert saved["host_bytes"] == saved["bytes"]
    ring = make_plan(compose([*SIX_BILLION, "cluster=h100_8x8", "checkpoint.keep_last=3", "checkpoint.ring_steps=4"]))
    assert ring.checkpoint["kept_bytes"] == (3 + 4) * saved["bytes"]
    assert ring.checkpoint["host_bytes"] == (1 + 2) * saved["bytes"]
    forever = ["run.steps=2500", "checkpoint.keep_last=3", "checkpoint.keep_every_steps=1000"]
    kept = make_plan(compose([*SIX_BILLION, "cluster=h100_8x8", *forever])).checkpoint["kept_bytes"]
    assert kept == (3 + 2) * saved["bytes"], "2,500 steps keep those of 1,000 and 2,000 for good"
    write = saved["bytes"] / 20e9
    assert saved["sensible_every_seconds"] == pytest.approx(math.sqrt(2 * write * 50_000 * 3600 / 64))


def test_epochs_are_counted_when_the_dataset_is_here(dataset: Path) -> None:
    config = compose([f"data.train={dataset}/train", f"data.validation={dataset}/validation", "run.steps=100"])
    data = make_plan(config).data
    assert data["epochs"] == pytest.approx(100 * 8 * 256 / data["tokens"])


def test_epochs_of_several_sources_count_all_their_tokens(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, vocab_size=256, documents=100, seed=3)
    paths = [f"{dataset}/train", f"{tmp_path}/train"]
    sources = ",".join(f"{{name: s{i}, path: '{path}', weight: 1.0}}" for i, path in enumerate(paths))
    both = make_plan(compose(["data.train=''", f"data.sources=[{sources}]", "data.validation=v"])).data["tokens"]
    single = [make_plan(compose([f"data.train={path}"])).data["tokens"] for path in paths]
    assert both == sum(single)


def test_a_batch_that_does_not_deal_out_is_said() -> None:
    plan = make_plan(compose(["model=moe_6b", "cluster=h100_8x8", "data.global_batch_size=100"]))
    assert plan.batch_problem and "data.global_batch_size = 100" in plan.batch_problem
    assert make_plan(compose([*SIX_BILLION, "cluster=h100_8x8"])).batch_problem is None


def test_the_table_names_the_verdict_and_every_term(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["plan", "model=moe_6b", "attention=kha_mlp", "cluster=h100_1x8", "engine.micro_batch_size=6"])
    text = capsys.readouterr().out
    assert ended.value.code == 2
    for word in ("6,103,153,152", "1,007,073,792", "DOES NOT FIT on h100_1x8", "optimizer", "1. engine.", "enough:"):
        assert word in text


def test_the_plan_of_an_engine_that_it_does_not_estimate_says_so(capsys) -> None:
    assert make_plan(compose([])).warning == ""
    code, answer = answered(capsys, "engine.name=plain")
    assert code == 0 and answer["warning"].startswith("engine.name = plain") and "deepspeed" in answer["warning"]


def test_fp32_on_a_gpu_says_of_which_precision_the_peak_must_be() -> None:
    """The data sheet's 67 TFLOP/s of an H100 in fp32 are a fifteenth of its 989 in bf16."""
    on = [*SIX_BILLION, "cluster=h100_8x8", "data.global_batch_size=64", "engine.micro_batch_size=1"]
    assert make_plan(compose(on)).warning == ""
    assert "is that of fp32" in make_plan(compose([*on, "engine.precision=fp32"])).warning


@pytest.mark.parametrize(
    ("devices", "group", "link"), [(64, 8, 450), (64, 4, 450), (24, 6, 50), (64, 16, 50), (6, 3, 450), (8, 8, 450)]
)
def test_groups_that_reach_into_the_next_node_have_the_network(devices: int, group: int, link: float) -> None:
    """Of 24 ranks in nodes of 8, the second six are 6 to 11."""
    cluster = compose([*SIX_BILLION, "cluster=h100_8x8"]).cluster
    assert replace(cluster, devices=devices).bandwidth_gb(group) == link


def test_a_plan_needs_no_torch() -> None:
    program = (
        "import sys\nfrom kha_train.cli.main import run\n"
        "try:\n    run(['plan', 'model=moe_6b', 'cluster=h100_8x8', 'engine.micro_batch_size=1'])\n"
        "except SystemExit:\n    print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split()[-1] == "False"
