"""What runs on a device, decided from plain facts about it: no GPU needed, and one result for trainer and plan."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kha_train import compose
from kha_train.config.resolve import Device, planned_device, resolve, resolve_plan
from kha_train.errors import ConfigError
from kha_train.estimate.plan import make_plan
from kha_train.model import device as device_module
from kha_train.model.device import resolve_on

HOPPER, AMPERE, TURING = (Device("cuda", capability) for capability in ((9, 0), (8, 0), (7, 5)))
CPU = Device("cpu")
BARE = Device("cuda", (9, 0), lacks=lambda package: "not installed")

BACKENDS = [
    # The 6.1B preset on CUDA: what docs/attention.md says of `auto` and of each kernel.
    (HOPPER, [], "varlen"),
    (HOPPER, ["engine.precision=fp32"], "sdpa"),
    (HOPPER, ["data.isolate_documents=false"], "sdpa"),
    (HOPPER, ["attention.positions=alibi"], "sdpa"),
    (HOPPER, ["attention=talking_heads"], "eager"),
    (TURING, [], None),
    (TURING, ["engine.precision=fp32"], "sdpa"),
    (CPU, [], "sdpa"),
    (CPU, ["engine.precision=bf16"], "sdpa"),
    (HOPPER, ["attention.backend=flash_attn"], "flash_attn"),
    (BARE, ["attention.backend=flash_attn"], None),
    (TURING, ["attention.backend=flash_attn"], None),
    (TURING, ["attention.backend=varlen"], None),
    (CPU, ["attention.backend=varlen"], None),
    (HOPPER, ["attention.backend=cudnn", "data.isolate_documents=false"], "cudnn"),
    (AMPERE, ["attention.backend=cudnn", "data.isolate_documents=false"], None),
    (HOPPER, ["engine.kernels=triton"], "varlen"),
    (BARE, ["engine.kernels=triton"], None),
    (TURING, ["engine.kernels=triton"], None),
    (replace(HOPPER, nvidia=False), ["engine.kernels=triton"], None),
    (HOPPER, ["engine.kernels=triton", "engine.precision=fp32"], None),
    (CPU, ["engine.kernels=triton"], None),
    (replace(CPU, interpreted=True), ["engine.kernels=triton"], "sdpa"),
    (CPU, ["attention=kha_mlp", "model.head_dim=64", "attention.interaction.impl=triton"], None),
    (HOPPER, ["attention=kha_mlp", "model.head_dim=64", "attention.interaction.impl=triton"], "varlen"),
    (HOPPER, ["moe.backend=megablocks"], "varlen"),
    (BARE, ["moe.backend=megablocks"], None),
    (CPU, ["moe.backend=megablocks"], None),
    (HOPPER, ["moe.backend=megablocks", "engine.precision=fp32"], None),
]


@pytest.mark.parametrize(("device", "overrides", "expected"), BACKENDS)
def test_a_device_is_judged_by_its_kind_capability_and_packages(
    device: Device, overrides: list[str], expected: str | None
) -> None:
    settings = ["attention.backend=auto"]
    try:
        config = compose([*settings, *overrides])
        assert resolve(config, device).backend.name == expected
    except ConfigError as refused:
        assert expected is None and refused.exit_code == 2 and refused.fix


@pytest.mark.parametrize(("facts", "overrides", "expected"), [case for case in BACKENDS if case[0] in (HOPPER, CPU)])
def test_the_plan_of_such_a_machine_takes_what_the_trainer_takes_on_it(
    facts: Device, overrides: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(device_module, "device_facts", lambda device: facts)
    cluster = ["cluster=cpu"] if facts.kind == "cpu" else ["cluster=h100_1x1"]
    outcomes = []
    for judge in (
        lambda config: resolve_plan(config).backend,
        lambda config: resolve_on(config, torch.device(facts.kind)).backend,
    ):
        try:
            outcomes.append(judge(compose(["attention.backend=auto", *cluster, *overrides])))
        except ConfigError as refused:
            outcomes.append(str(refused))
    assert outcomes[0] == outcomes[1]


def test_a_plan_in_fp32_counts_the_masks_that_the_run_would_hold() -> None:
    """In fp32 no kernel reads the borders, so the scores need a mask: the 6.1B model does not fit where bf16 does."""
    overrides = ["model=moe_6b", "cluster=h100_8x8", "data.global_batch_size=64", "engine.micro_batch_size=1"]
    plans = {
        (precision, backend): make_plan(
            compose([*overrides, f"engine.precision={precision}", f"attention.backend={backend}"])
        ).memory.total
        for precision, backend in (("fp32", "auto"), ("fp32", "sdpa"), ("bf16", "auto"), ("bf16", "varlen"))
    }
    assert plans["fp32", "auto"] == plans["fp32", "sdpa"] and plans["bf16", "auto"] == plans["bf16", "varlen"]
    # Keys and values repeated for all query heads, and the mask: 8,192 numbers a token in each of 20 layers.
    assert plans["fp32", "auto"] - plans["bf16", "auto"] > 20 * 8192 * 8192 * 4


def test_the_device_of_the_engine_wins_over_that_of_the_cluster() -> None:
    here = planned_device(compose(["cluster=h100_8x8", "engine.device=cpu"]))
    assert here.kind == "cpu" and resolve_plan(compose(["cluster=h100_8x8", "engine.device=cpu"])).precision == "fp32"
    with pytest.raises(ConfigError, match="engine.device"):
        make_plan(compose(["cluster=cpu", "engine.device=cuda"]))


def test_clusters_say_the_capability_of_their_devices() -> None:
    found = {name: planned_device(compose([f"cluster={name}"])).capability for name in ("h200_1x8", "a100_8x8")}
    assert found == {"h200_1x8": (9, 0), "a100_8x8": (8, 0)}
    assert planned_device(compose([])).capability is None, "nobody named a machine"
    with pytest.raises(ConfigError, match="sm_90 alone"):
        make_plan(compose(["cluster=a100_8x8", "attention.backend=cudnn", "data.isolate_documents=false"]))


@pytest.fixture
def no_flash_attn() -> Iterator[None]:
    """None of the stand-ins is left imported."""
    yield
    forget_flash_attn()


def forget_flash_attn() -> None:
    """The next import finds what lies on the path then."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


@pytest.mark.usefixtures("no_flash_attn")
def test_a_package_whose_import_fails_in_any_way_is_no_backend_and_ends_no_run(tmp_path, monkeypatch) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").write_text("int(None)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "its import failed: int()" in (device_module.lacks("flash_attn_4") or "")


@pytest.mark.usefixtures("no_flash_attn")
def test_flash_attn_4_alone_is_not_the_package_whose_kernel_is_called(tmp_path, monkeypatch) -> None:
    """It is a namespace of the same name, with `flash_attn.cute` alone in it."""
    (tmp_path / "four" / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "four" / "flash_attn" / "cute" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "four")
    assert "flash_attn_varlen_func" in (device_module.lacks("flash_attn") or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = compose(["attention.backend=flash_attn"])
    with pytest.raises(ConfigError, match="flash-attn"):
        resolve_on(config, torch.device("cuda"))

    (tmp_path / "two" / "flash_attn").mkdir(parents=True)
    (tmp_path / "two" / "flash_attn" / "__init__.py").write_text("def flash_attn_varlen_func(): ...\n")
    monkeypatch.syspath_prepend(tmp_path / "two")
    forget_flash_attn()
    assert device_module.lacks("flash_attn") is None
    assert resolve_on(config, torch.device("cuda")).backend.name == "flash_attn"


@pytest.mark.usefixtures("no_flash_attn")
def test_flash_attn_built_for_another_torch_is_told_by_its_own_words(tmp_path, monkeypatch) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN2at')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "undefined symbol: _ZN2at" in device_module.lacks("flash_attn")
