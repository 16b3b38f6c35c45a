"""A machine that cannot run kernels gets an error that says what to change; a run says what it takes, once."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kha_train.config import resolve
from kha_train.config.compose import compose
from kha_train.config.resolve import Device
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.model import device as device_module
from kha_train.model.attention.base import build_attention
from kha_train.model.attention.cache import Cache
from kha_train.model.attention.choice import announce
from kha_train.model.decoder import build_decoder
from kha_train.model.device import device_facts, resolve_on
from kha_train.model.moe import megablocks
from kha_train.model.moe.experts import announce_experts

CPU, HOPPER = torch.device("cpu"), torch.device("cuda", 0)
SMALL = ["model=tiny", "engine.device=cpu"]


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says, as if the interpreter were off."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def said(config: RunConfig) -> list[str]:
    """What a run says on a CPU."""
    resolved = resolve_on(config, CPU)
    return [*announce(config, resolved, CPU), *announce_experts(config, resolved, CPU)]


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
        build_decoder(compose(chosen))
    assert refused.value.field == setting.partition("=")[0] and refused.value.fix == fix
    said(compose([*chosen, fix]))


def test_a_run_says_which_kernels_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels = [*SMALL, "attention=kha_mlp", "model.head_dim=16", "engine.kernels=triton"]
    line, of_experts = said(compose(kernels))
    assert "norm and rotation triton" in line and "interaction triton (chosen by engine.kernels)" in line
    assert of_experts.startswith("experts grouped")
    assert "permute, SwiGLU and combine triton (chosen by engine.kernels)" in of_experts


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("attention.qk_norm=full_width", "attention.qk_norm=full_width"),
        ("attention.positions=alibi", "attention.positions=alibi"),
        ("model.head_dim=24", "the head width 24 is not"),
        ("attention=gta", "gta does not rotate whole heads"),
    ],
)
def test_a_run_says_why_its_norms_stay_with_torch(monkeypatch: pytest.MonkeyPatch, setting: str, reason: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    config = compose([*SMALL, "model.head_dim=16", "engine.kernels=triton", setting])
    assert f"norm and rotation torch ({reason}" in said(config)[0]
    assert resolve_on(config, CPU).norm.name == "torch"


def test_a_run_says_that_other_experts_than_grouped_take_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(compose([*SMALL, "engine.kernels=torch"]))[1:] == ["experts grouped (chosen by moe.backend)"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    line = said(compose([*SMALL, "engine.kernels=triton", "moe.backend=loop"]))[1]
    assert line == "experts loop (chosen by moe.backend) | permute, SwiGLU and combine torch (for grouped, not loop)"


@pytest.mark.parametrize(
    ("capability", "precision", "reason"),
    [
        ((7, 5), "bf16", "compute capability 8.0"),
        ((9, 0), "fp32", "bf16"),
        ((9, 0), "bf16", None),
    ],
)
def test_a_device_is_judged_by_its_capability_and_the_precision(capability, precision, reason, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(resolve, "find_spec", lambda name: object())
    found = resolve.triton_problem(device_facts(HOPPER), precision)
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
        attention = build_attention(chosen, resolve.decide(chosen, Device("cuda", (9, 0))))
        ways[kernels] = (attention.interaction.fused, type(attention.query_norm).__name__)
    assert ways == {"auto": (False, "RmsNorm"), "torch": (False, "RmsNorm"), "triton": (True, "TurningNorm")}


def test_a_decoder_is_built_for_the_fp32_in_which_it_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "device_facts", lambda device: Device("cuda", (9, 0)))
    config = compose(["model=tiny", "model.layers=1", "attention.backend=auto"])
    assert resolve_on(config, HOPPER).backend.name == "varlen"
    decoder = build_decoder(config)
    assert decoder.resolved.precision == "fp32" and decoder.resolved.backend.name == "sdpa"
    with torch.no_grad():
        decoder(torch.zeros(1, 4, dtype=torch.int64), cache=Cache(8))
    with pytest.raises(ConfigError, match="computes in bf16, and parameters are fp32"):
        build_decoder(compose(["model=tiny", "attention.backend=varlen"]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=kha_mlp"],
        ["attention=kha_linear", "attention.interaction.impl=folded", "attention.positions=alibi"],
        ["attention=talking_heads", "attention.backend=auto", "moe.backend=loop"],
        ["attention=mla", "engine.activation_checkpointing=selective"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_built_decoder_asks_nothing_in_a_forward_a_backward_or_with_a_cache(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([*SMALL, "model.layers=1", "model.vocab_size=64", "model.seq_len=16", *overrides])
    decoder = build_decoder(config)

    def asked(*arguments: object, **named: object) -> None:
        raise AssertionError("a forward asks what runs")

    functions = {
        (module, name)
        for module in (resolve, device_module)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ in (resolve.__name__, device_module.__name__)
    }
    assert {name for _, name in functions} >= {"resolve", "decide", "implementation", "device_facts", "triton_problem"}
    for module, name in functions:
        monkeypatch.setattr(module, name, asked)
    options = [*type(config.attention.interaction).__mro__, *type(config.attention.base).__mro__]
    for cls in (cls for cls in options if "implementation" in vars(cls)):
        monkeypatch.setattr(cls, "implementation", asked)
    for module in (resolve, megablocks):
        monkeypatch.setattr(module, "find_spec", asked)
    tokens_BT = torch.zeros(2, 16, dtype=torch.int64)
    borders_S = torch.tensor([0, 5, 16, 32], dtype=torch.int32)
    decoder(tokens_BT, tokens_BT, cu_seqlens_S=borders_S).loss_sum.backward()
    with torch.no_grad():
        decoder(tokens_BT[:, :4], cache=Cache(8))
