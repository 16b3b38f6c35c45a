"""`auto` takes the fastest backend that computes the right numbers, and all ranks take the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kha_train.config.compose import compose
from kha_train.model.attention import measured
from kha_train.model.attention.backends import BACKENDS, sdpa
from kha_train.model.attention.measured import candidates, fastest, settle

CPU = torch.device("cpu")
SHAPE = ["model.seq_len=64", "engine.micro_batch_size=2", "attention.backend=auto"]


def times(**seconds: float):
    """A timer that runs what it is given, once, and answers by the backend under way."""
    names = iter(seconds)

    def timer(run, device):
        run()
        return seconds[next(names)]

    return timer


@pytest.mark.parametrize("isolated", ["true", "false"])
def test_the_fastest_is_taken_and_all_that_was_measured_is_told(isolated):
    config = compose([*SHAPE, f"data.isolate_documents={isolated}"])
    name, told = fastest(config, ["sdpa", "eager"], CPU, torch.float32, times(sdpa=2e-3, eager=1e-3))
    assert name == "eager" and "eager 1.00 ms, sdpa 2.00 ms" in told


def test_one_that_computes_wrong_numbers_is_never_taken_however_fast(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cudnn", lambda q, k, v, documents, scale: sdpa(q, k, v, documents, 2 * scale))
    name, told = fastest(compose(SHAPE), ["cudnn", "sdpa"], CPU, torch.float32, times(sdpa=1e-3))
    assert name == "sdpa" and "cudnn failed" in told and "wrong numbers" in told


def test_one_that_fails_is_left_out_and_sdpa_remains(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setitem(BACKENDS, "varlen", broken)
    name, told = fastest(compose(SHAPE), ["varlen"], CPU, torch.float32, times())
    assert name == "sdpa" and "varlen failed: no kernel image" in told and "available" not in told


def test_only_backends_that_compute_the_same_thing_are_candidates():
    assert candidates(compose(SHAPE), CPU, torch.float32) == ["sdpa"]
    assert candidates(compose([*SHAPE, "attention=talking_heads"]), CPU, torch.float32) == []


def test_a_cpu_and_a_named_backend_are_left_as_they_are():
    for overrides in (SHAPE, [*SHAPE, "attention.backend=eager"]):
        config = compose(overrides)
        assert settle(config, CPU, torch.float32, lambda text: pytest.fail("nothing to agree on")) == (config, "")


def test_every_rank_takes_what_the_first_measured(monkeypatch):
    config = compose(SHAPE)
    monkeypatch.setattr(measured, "candidates", lambda *arguments: ["sdpa", "varlen"])
    monkeypatch.setattr(measured, "fastest", lambda *arguments: ("sdpa", "measured here"))
    cuda = torch.device("cuda")
    settled, told = settle(config, cuda, torch.bfloat16, lambda text: "varlen measured on rank 0")
    assert settled == replace(config, attention=replace(config.attention, backend="varlen"))
    assert told == "measured on rank 0"


@pytest.mark.gpu
def test_on_cuda_a_backend_is_taken_for_whole_and_for_split_rows():
    device = torch.device("cuda", torch.cuda.current_device())
    for isolated, amount in (("true", 2), ("false", 2)):
        overrides = ["model=moe_6b", "attention.backend=auto", "engine.micro_batch_size=1"]
        config = compose([*overrides, f"data.isolate_documents={isolated}"])
        assert len(candidates(config, device, torch.bfloat16)) >= amount
        settled, told = settle(config, device, torch.bfloat16, lambda text: text)
        assert settled.attention.backend in candidates(config, device, torch.bfloat16) and " ms" in told
