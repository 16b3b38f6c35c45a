"""A machine that cannot run kernels gets an error that says what to change."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kha_train.config.compose import compose
from kha_train.errors import ConfigError
from kha_train.model.attention.base import build_attention
from kha_train.model.attention.choice import announce
from kha_train.model.kernels import availability
from kha_train.model.kernels.knocking_mlp import knocking_mlp
from kha_train.model.moe.experts import announce_experts
from kha_train.model.norm import norm_turns

CPU, HOPPER = torch.device("cpu"), torch.device("cuda", 0)
SMALL = ["model=tiny", "engine.device=cpu"]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says, as if the interpreter were off."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    ("setting", "fix"),
    [
        ("attention.interaction.impl=triton", "attention.interaction.impl=auto"),
        ("engine.kernels=triton", "engine.kernels=torch"),
    ],
)
def test_a_run_on_a_cpu_is_refused_when_it_starts_and_the_fix_mends_it(setting: str, fix: str) -> None:
    chosen = [*SMALL, "attention=kha_mlp", setting]
    with pytest.raises(ConfigError, match="needs a CUDA device, and this is cpu") as refused:
        announce(compose(chosen), CPU, torch.float32)
    assert refused.value.field == setting.partition("=")[0] and refused.value.fix == fix
    announce(compose([*chosen, fix]), CPU, torch.float32)


def test_a_run_says_which_kernels_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = [*SMALL, "attention=kha_mlp", "model.head_dim=16", "engine.kernels=triton"]
    line = announce(compose(kernels), CPU, torch.float32)[0]
    assert "norm and rotation triton" in line and "interaction triton (chosen by engine.kernels)" in line
    (line,) = announce_experts(compose(kernels), CPU, torch.float32)
    assert (
        line.startswith("experts grouped") and "permute, SwiGLU and combine triton (chosen by engine.kernels)" in line
    )


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("attention.qk_norm=full_width", "attention.qk_norm=full_width"),
        ("attention.positions=alibi", "attention.positions=alibi"),
        ("model.head_dim=24", "heads of 24"),
        ("attention=gta", "gta rotates only a part of each head"),
    ],
)
def test_a_run_says_why_its_norms_stay_with_torch(monkeypatch: pytest.MonkeyPatch, setting: str, reason: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = compose([*SMALL, "model.head_dim=16", "engine.kernels=triton", setting])
    assert f"norm and rotation torch ({reason}" in announce(config, CPU, torch.float32)[0]
    assert not norm_turns(config)


def test_a_run_says_that_other_experts_than_grouped_take_no_kernels() -> None:
    (line,) = announce_experts(compose([*SMALL, "engine.kernels=triton", "moe.backend=loop"]), CPU, torch.float32)
    assert "experts loop" in line and "for grouped, not loop" in line
    assert announce_experts(compose([*SMALL, "engine.kernels=torch"]), CPU, torch.float32) == [
        "experts grouped (chosen by moe.backend)"
    ]


def test_a_kernel_called_on_a_cpu_names_the_fix() -> None:
    x = torch.zeros(1, 1, 1, 16)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        knocking_mlp(x, torch.eye(16), torch.eye(16), None)


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.bfloat16, "compute capability 8.0"),
        ((9, 0), torch.float32, "bf16"),
        ((9, 0), torch.bfloat16, None),
    ],
)
def test_a_device_is_judged_by_its_capability_and_the_dtype(capability, dtype, reason, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(availability, "find_spec", lambda name: object())
    found = availability.missing(HOPPER, dtype)
    assert found is None if reason is None else reason in found


def test_without_the_package_the_door_names_what_to_install() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from kha_train.errors import ConfigError\n"
        "try:\n    import kha_train.model.kernels.language\n"
        "except ConfigError as refused:\n    print(refused.fix)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install triton" in answer.stdout


def test_auto_leaves_kernels_aside_until_they_are_asked_for() -> None:
    config = compose([*SMALL, "attention=kha_mlp", "model.head_dim=16"])
    ways = {}
    for kernels in ("auto", "torch", "triton"):
        chosen = replace(config, engine=replace(config.engine, kernels=kernels))
        attention = build_attention(chosen)
        ways[kernels] = (attention.interaction.fused, type(attention.query_norm).__name__)
    assert ways == {"auto": (False, "RmsNorm"), "torch": (False, "RmsNorm"), "triton": (True, "TurningNorm")}
