"""`engine.kernels=auto` selects a kernel only if it agrees with torch and is faster, and otherwise torch."""

from __future__ import annotations

import os

import pytest
import torch

from kha_train.config.compose import compose
from kha_train.config.resolve import Choice, Device, decide
from kha_train.distributed import World
from kha_train.model import kernel_choice
from kha_train.model.device import resolve_on
from kha_train.model.kernel_choice import (
    Answer,
    agreed_kernels,
    as_text,
    candidates,
    fastest_kernels,
    from_text,
    kernels_of,
    measure_kernels,
    with_kernels,
)
from kha_train.model.moe.grouped import KERNELS

CPU = torch.device("cpu")
SMALL = ["attention=kha_mlp", "model.head_dim=64", "model.seq_len=32", "engine.micro_batch_size=1"]


def times(**seconds: float):
    """A timer that runs what it is given, and answers with the kernel's time, then with torch's."""
    answers = iter([seconds["triton"], seconds["torch"]] * 3)

    def timer(run, device):
        run()
        return next(answers)

    return timer


@pytest.fixture
def experts(monkeypatch):
    """`fastest_kernels` for the experts' kernels, which torch's operators stand in for, changed as given."""

    def choose(seconds, earlier=None, **changed):
        monkeypatch.setitem(KERNELS, "triton", KERNELS["torch"]._replace(**changed))
        config = compose(SMALL)
        resolved = resolve_on(config, CPU)
        kernels = {"expert_kernels": resolved._replace(expert_kernels=Choice("triton", "a stand-in"))}
        return fastest_kernels(config, resolved, kernels, CPU, seconds, earlier or {})

    return choose


def test_the_faster_of_two_that_agree_is_selected_and_both_times_are_told(experts) -> None:
    answer = experts(times(triton=1e-3, torch=2e-3))
    assert answer.selected == {"expert_kernels": "triton"}
    assert "permute, SwiGLU and combine triton (triton 1.00 ms, torch 2.00 ms)" in answer.told
    assert experts(times(triton=3e-3, torch=2e-3)).selected == {"expert_kernels": "torch"}


@pytest.mark.parametrize("part", ["permute", "combine", "activate", "activate_backward"])
def test_a_kernel_that_computes_wrong_numbers_or_gradients_is_never_selected(experts, part: str) -> None:
    right = getattr(KERNELS["torch"], part)

    def wrong(*arguments):
        found = right(*arguments)
        return found._replace(**{found._fields[-1]: 2 * found[-1]}) if part == "activate_backward" else 1.1 * found

    answer = experts(times(triton=1e-9, torch=2e-3), **{part: wrong})
    assert answer.selected == {"expert_kernels": "torch"} and "off by" in answer.told


def test_a_kernel_that_fails_leaves_torch_and_its_first_line_is_told(experts) -> None:
    def broken(*arguments):
        raise RuntimeError("no kernel image\nis available")

    answer = experts(times(triton=1e-9, torch=2e-3), combine=broken)
    assert answer.selected == {"expert_kernels": "torch"}
    assert "failed: RuntimeError: no kernel image" in answer.told and "available" not in answer.told
    assert answer.failed == {"expert_kernels"} and not experts(times(triton=3e-3, torch=2e-3)).failed


def test_a_continued_run_keeps_its_kernels_while_they_work(experts) -> None:
    slow = times(triton=3e-3, torch=2e-3)
    assert experts(slow, {"expert_kernels": "triton"}).selected == {"expert_kernels": "triton"}
    fast = times(triton=1e-3, torch=2e-3)
    assert experts(fast, {"expert_kernels": "torch"}).selected == {"expert_kernels": "torch"}


def test_parts_that_have_a_kernel_on_the_device_are_candidates(monkeypatch) -> None:
    facts = Device("cuda", (9, 0))
    monkeypatch.setattr(kernel_choice, "device_facts", lambda device: facts)
    cuda = torch.device("cuda")

    def found(*overrides: str) -> list[str]:
        config = compose([*SMALL, *overrides])
        return [*candidates(config, decide(config, facts), cuda)]

    assert found() == ["interaction", "norm", "expert_kernels"]
    assert found("attention=gqa") == ["norm", "expert_kernels"]
    assert found("attention=gqa", "attention.qk_norm=none", "moe.backend=loop") == []
    for off in ("engine.kernels=torch", "engine.kernels=triton", "engine.compile=block", "engine.precision=fp32"):
        assert found(off) == []


def test_every_rank_takes_the_selection_and_a_cpu_measures_nothing(monkeypatch) -> None:
    config = compose(SMALL)
    resolved = resolve_on(config, CPU)
    assert measure_kernels(config, resolved, CPU, {"norm": "triton"}) == Answer({}, "")
    assert with_kernels(config, resolved, {}, CPU) == resolved
    selected = {"norm": "triton", "expert_kernels": "torch"}
    chosen = with_kernels(config, resolved, from_text(as_text(selected)), CPU)
    assert kernels_of(chosen) == {"interaction": resolved.interaction.name, **selected}
    assert chosen.norm.why == chosen.expert_kernels.why == "measured, see below"
    assert from_text("") == {}


def test_a_kernel_that_fails_on_any_rank_is_used_on_none(monkeypatch) -> None:
    resolved, world = resolve_on(compose(SMALL), CPU), World.single()
    mine = Answer({"norm": "triton", "expert_kernels": "triton"}, "norm and rotation triton")
    assert agreed_kernels(mine, resolved, world) == mine
    # Another rank's kernel of the norm failed.
    monkeypatch.setattr(World, "max_ints", lambda self, *values: (0, 1, 0))
    agreed = agreed_kernels(mine, resolved, world)
    assert agreed.selected == {"norm": "torch", "expert_kernels": "triton"}
    assert "norm and rotation torch, because the kernel failed on another rank" in agreed.told


def test_ranks_that_share_rows_measure_their_part_of_the_tokens() -> None:
    config = compose([*SMALL, "engine.context_parallel=2"])
    output, *_ = kernel_choice._run_of("norm", config, resolve_on(config, CPU), CPU)()
    assert output.shape[:2] == (1, 16)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by kernels/test_interpreted.py")
def test_every_kernel_passes_the_comparison_that_precedes_its_selection() -> None:
    config = compose(SMALL)
    resolved = resolve_on(config, CPU)
    kernels = candidates(config, resolved, CPU)
    answer = fastest_kernels(config, resolved, kernels, CPU, times(triton=1e-3, torch=2e-3), {})
    assert answer.selected == dict.fromkeys(kernel_choice.PARTS, "triton"), answer.told
