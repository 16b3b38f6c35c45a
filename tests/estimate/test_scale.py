"""`kha plan --scale`: what binds on each number of devices, the MFU that is left, failures and goodput."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kha_train import compose
from kha_train.errors import ConfigError
from kha_train.estimate.scale import Size, Stage, goodput, scale
from tests.conftest import Kha

SIX_BILLION = [
    *("model=moe_6b", "cluster=h100_8x8", "cluster.mfu=0.35", "data.global_batch_size=512"),
    *("engine.micro_batch_size=1", "engine=zero1"),
]


BESIDE = 2 / 3 * (1 - 3 * 2 * 157_184 * 2048 / 9.660530688e9) * 17 / 18
"""The share of a micro-batch that computes beside gradients that leave: of its backward, 17 of 18 layers without the
head of 157,184 x 2048."""


def of(sizes: list[Size], devices: int, stage: int) -> Stage:
    (found,) = (each for size in sizes if size.devices == devices for each in size.stages if each.zero_stage == stage)
    return found


def test_the_mfu_that_is_left_of_the_6b_model_is_that_of_the_arithmetic_by_hand() -> None:
    """512 rows of 8192 tokens of 9.660530688 GFLOP, 989 TFLOP/s at 35 %; 6,102,268,416 parameters of 2 bytes on rings
    of 450 GB/s in a node and 50 GB/s outside: ZeRO 1 sends them twice, ZeRO 2 once and once a micro-batch. Gradients of
    17 of 18 layers hide behind what is left of the backward; 321,912,832 numbers are the embedding, 80,384 norms."""
    sizes = scale(compose(SIX_BILLION), [8, 64, 512])
    for devices, bandwidth in ((8, 450e9), (64, 50e9), (512, 50e9)):
        computed = 512 * 8192 * 9.660530688e9 / (devices * 989e12 * 0.35)
        ring = 2 * 6_102_268_416 * (devices - 1) / devices / bandwidth
        early = 2 * (6_102_268_416 - 321_912_832 - 80_384) * 17 / 18 * (devices - 1) / devices / bandwidth
        for stage, reductions in ((1, 1), (2, 512 // devices)):
            found = of(sizes, devices, stage)
            exposed = (reductions + 1) * ring - reductions * min(early, BESIDE * computed / (512 // devices))
            assert found.exposed_seconds == pytest.approx(exposed, rel=1e-6)
            assert found.mfu == pytest.approx(0.35 * computed / (computed + exposed), rel=1e-6)
            assert found.tokens_per_second == pytest.approx(512 * 8192 / (computed + exposed), rel=1e-6)
    assert [of(sizes, devices, 1).mfu for devices in (8, 64, 512)] == pytest.approx([0.349, 0.292, 0.133], abs=5e-4)
    assert [of(sizes, devices, 2).mfu for devices in (8, 64, 512)] == pytest.approx([0.346, 0.209, 0.133], abs=5e-4)
    assert [of(sizes, devices, 1).binds for devices in (8, 64, 512)] == ["computation", "computation", "network"]
    assert all(each.configured == (each.zero_stage == 1) for size in sizes for each in size.stages)
    assert [size.micro_batches for size in sizes] == [64, 8, 1] and sizes[1].best is of(sizes, 64, 1)


def test_experts_that_ranks_share_leave_the_mfu_of_the_arithmetic_by_hand() -> None:
    """666,450,432 parameters outside the experts, 5,435,817,984 in 128 of them, of which eight ranks hold an eighth
    each: the gradients of those travel among devices / 8 ranks, and 8 rows of 2048 bf16 a token and layer there and
    back, forward and backward, to seven eighths of them, beside two fp32 weights."""
    sizes = scale(compose([*SIX_BILLION, "engine.expert_parallel=8"]), [8, 64, 512])
    for devices, bandwidth in ((8, 450e9), (64, 50e9), (512, 50e9)):
        computed = 512 * 8192 * 9.660530688e9 / (devices * 989e12 * 0.35)
        whole = 2 * (6_102_268_416 - 5_435_817_984) * (devices - 1) / devices
        own = 2 * 5_435_817_984 / 8 * (devices / 8 - 1) / (devices / 8)
        rows = 512 * 8192 / devices * 18 * 8 * (4 * 2048 * 2 + 2 * 4) * 7 / 8
        (found,) = (size.stages[0] for size in sizes if size.devices == devices)
        held = 6_102_268_416 - 5_435_817_984 * 7 / 8
        early = (held - 321_912_832 - 80_384) / held * 17 / 18 * (whole + own) / bandwidth
        hidden = min(early, BESIDE * computed / (512 / devices))
        exposed = 2 * (whole + own) / bandwidth - hidden + rows / 450e9
        assert found.exposed_seconds == pytest.approx(exposed, rel=1e-6)
        assert found.mfu == pytest.approx(0.35 * computed / (computed + exposed), rel=1e-6)
    assert [size.stages[0].mfu for size in sizes] == pytest.approx([0.3005, 0.2918, 0.2391], abs=5e-4)


def test_what_ranks_send_that_share_rows_is_exposed_too() -> None:
    """Eight ranks share each row: 32 query heads and 8 repeated key heads of 128, queries, keys, values and outputs of
    18 layers, forward and backward in bf16, seven eighths of them to the seven others in the node."""
    config = compose([*SIX_BILLION, "engine.context_parallel=8"])
    (size,) = scale(config, [8])
    heads = config.attention.base.heads()
    numbers = 2 * (heads.query_heads + max(heads.kv_heads, 8)) * heads.key_width
    sent = 2 * 18 * 512 * 8192 / 8 * numbers * 2 * 7 / 8
    # The backward of one of 512 micro-batches is too short to hide all gradients.
    ring, hidden = 2 * 6_102_268_416 * 7 / 8, BESIDE * 512 * 8192 * 9.660530688e9 / (8 * 989e12 * 0.35) / 512
    assert of([size], 8, 1).exposed_seconds == pytest.approx((2 * ring + sent) / 450e9 - hidden, rel=1e-6)
    (size,) = scale(compose([*SIX_BILLION, "engine.context_parallel=16", "cluster.network_bandwidth_gb=0"]), [16])
    assert of([size], 16, 1).exposed_seconds is None


def test_devices_that_never_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="hours_between_failures"):
        scale(compose([*SIX_BILLION, "cluster.hours_between_failures=0"]), [8])


def test_only_stages_that_the_other_settings_admit_are_shown() -> None:
    """`engine.compile=block` is refused with ZeRO 3."""
    for changes, stages in (([], [1, 2, 3]), (["engine.compile=block"], [1, 2])):
        (size,) = scale(compose([*SIX_BILLION, *changes]), [64])
        assert [stage.zero_stage for stage in size.stages] == stages


@pytest.mark.parametrize(
    ("binds", "devices", "changes"),
    [
        ("memory", 8, ["cluster.memory_gib=20"]),
        ("batch", 1024, []),
        ("node links", 8, ["cluster.node_bandwidth_gb=1"]),
        ("failures", 64, ["cluster.hours_between_failures=2"]),
        ("unknown", 8, ["cluster.peak_tflops=0"]),
        ("unknown", 64, ["cluster.network_bandwidth_gb=0"]),
    ],
)
def test_what_binds_is_named(binds: str, devices: int, changes: list[str]) -> None:
    (size,) = scale(compose([*SIX_BILLION, *changes]), [devices])
    stage = of([size], devices, 1)
    assert stage.binds == binds
    if binds in ("batch", "unknown"):
        assert stage.step_seconds is None and stage.mfu is None and stage.goodput is None and size.best is None
    assert (size.batch_problem is None) == (binds != "batch")


@pytest.mark.parametrize(("between", "paused"), [(40_000.0, 0.0), (4_000.0, 20.0), (900.0, 0.0)])
def test_goodput_is_that_of_a_run_whose_failures_are_drawn(between: float, paused: float) -> None:
    """500 s of training, `paused` ones for the save, 400 s to restart, which a failure may hit too."""
    interval, restart, drawn = 500.0, 400.0, np.random.default_rng(0)
    wall, next_failure = 0.0, drawn.exponential(between)
    segments = 20_000
    for _ in range(segments):
        while wall + interval + paused > next_failure:
            wall, next_failure = next_failure, next_failure + drawn.exponential(between)
            while wall + restart > next_failure:
                wall, next_failure = next_failure, next_failure + drawn.exponential(between)
            wall += restart
        wall += interval + paused
    assert goodput(interval, between, restart, paused) == pytest.approx(segments * interval / wall, rel=0.02)


def test_devices_that_fail_more_often_than_a_checkpoint_is_reached_make_no_progress() -> None:
    assert goodput(1e6, 1.0, 300.0) == 0.0
    (size,) = scale(compose([*SIX_BILLION, "cluster.hours_between_failures=100"]), [512])
    assert size.failures_per_day == pytest.approx(512 * 24 / 100)
    assert size.hours_between_failures == pytest.approx(100 / 512)


def test_the_command_prints_every_size_and_answers_in_json(kha: Kha) -> None:
    code, out, _ = kha("plan", *SIX_BILLION, "--scale", "8,4096")
    assert code == 0 and "4,096" in out and "does not divide" in out and "failures a day" in out
    code, out, _ = kha("plan", *SIX_BILLION, "--scale", "8,4096", "--json")
    answer = json.loads(out)
    assert [size["devices"] for size in answer["sizes"]] == [8, 4096]
    assert [size["best"] for size in answer["sizes"]] == [1, None]
    assert answer["cluster"]["hours_between_failures"] == 50000.0 and answer["restart_seconds"] == 300.0
    for wrong in ("8,x", "0", "8,,64"):
        code, _, err = kha("plan", *SIX_BILLION, "--scale", wrong)
        assert code == 2 and "--scale" in err and "separated by commas" in err
