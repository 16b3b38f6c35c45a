"""`auto` selects the fastest backend that computes correct numbers, and all ranks use the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kha_train.config.compose import compose
from kha_train.errors import ConfigError
from kha_train.model.attention import measured
from kha_train.model.attention.backends import BACKENDS, eager, lay_out_documents, sdpa
from kha_train.model.attention.measured import candidates, fastest, measure, settled

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


@pytest.mark.parametrize("kind", [RuntimeError, ImportError, TypeError])
def test_one_that_fails_in_whatever_way_is_left_out(monkeypatch, kind):
    def broken(*arguments):
        raise kind("no kernel image\nis available")

    monkeypatch.setitem(BACKENDS, "varlen", broken)
    name, told = fastest(compose(SHAPE), ["varlen", "sdpa"], CPU, torch.float32, times(sdpa=1e-3))
    assert name == "sdpa" and f"varlen failed: {kind.__name__}: no kernel image" in told and "available" not in told


def test_where_none_is_fit_the_run_ends_with_what_each_did(monkeypatch):
    monkeypatch.setitem(BACKENDS, "sdpa", lambda q, k, v, documents, scale: eager(q, k, v, documents, 2 * scale))
    with pytest.raises(ConfigError, match="sdpa failed: ConfigError: .*wrong numbers"):
        fastest(compose(SHAPE), ["sdpa"], CPU, torch.float32, times())


def test_one_that_lets_documents_see_each_other_is_never_taken(monkeypatch):
    def blind(q, k, v, documents, scale):
        return sdpa(q, k, v, lay_out_documents(*q.shape[:2], q.device), scale)

    monkeypatch.setitem(BACKENDS, "varlen", blind)
    config = compose([*SHAPE, "data.isolate_documents=true"])
    name, told = fastest(config, ["varlen", "sdpa"], CPU, torch.float32, times(sdpa=1e-3))
    assert name == "sdpa" and "varlen failed" in told and "rows of documents" in told


def test_a_run_that_goes_on_keeps_its_backend_while_that_is_fit(monkeypatch):
    timer = {"sdpa": 1e-3, "eager": 2e-3}
    name, told = fastest(compose(SHAPE), [*timer], CPU, torch.float32, times(**timer), earlier="eager")
    assert name == "eager" and "eager kept" in told
    name, told = fastest(compose(SHAPE), [*timer], CPU, torch.float32, times(**timer), earlier="varlen")
    assert name == "sdpa" and "kept" not in told


def test_only_backends_that_compute_the_same_thing_are_candidates():
    assert candidates(compose(SHAPE), CPU) == ["sdpa"]
    assert candidates(compose([*SHAPE, "attention=talking_heads"]), CPU) == []


def test_a_cpu_and_a_named_backend_are_left_as_they_are():
    for overrides in (SHAPE, [*SHAPE, "attention.backend=eager"]):
        config = compose(overrides)
        assert settled(config, measure(config, CPU, earlier="varlen")) == (config, "")


def test_every_rank_takes_what_the_first_measured_whatever_its_own_candidates_are(monkeypatch):
    config, cuda = compose(SHAPE), torch.device("cuda")
    answers = []
    for names in (["sdpa", "varlen"], ["sdpa"]):
        monkeypatch.setattr(measured, "candidates", lambda *arguments, names=names: names)
        monkeypatch.setattr(measured, "fastest", lambda *arguments: ("varlen", "measured here"))
        answers.append(measure(config, cuda))
    assert all(answers), "each rank has something to broadcast"
    varlen = replace(config, attention=replace(config.attention, backend="varlen"))
    assert settled(config, answers[0]) == (varlen, "measured here")


@pytest.mark.gpu
def test_on_cuda_a_backend_is_taken_for_whole_and_for_split_rows():
    device = torch.device("cuda", torch.cuda.current_device())
    for isolated, amount in (("true", 2), ("false", 2)):
        overrides = ["model=moe_6b", "attention.backend=auto", "engine.micro_batch_size=1"]
        config = compose([*overrides, f"data.isolate_documents={isolated}"])
        assert len(candidates(config, device)) >= amount
        taken, told = settled(config, measure(config, device))
        assert taken.attention.backend in candidates(config, device) and " ms" in told
