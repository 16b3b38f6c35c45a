"""The benchmark of the step measures what it claims: the named arms, the same tokens, ratios block by block."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kha_train.bench import protocol, step
from kha_train.bench.peers import load_adapters
from kha_train.bench.step import measure
from kha_train.cli.main import app
from kha_train.config.compose import compose
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.errors import ConfigError
from kha_train.estimate.counts import flops_per_token
from kha_train.model.decoder import build_decoder
from kha_train.telemetry.throughput import Peak

SHAPE = [
    "engine.device=cpu",
    "model.layers=2",
    "model.hidden_size=32",
    "model.head_dim=8",
    "model.seq_len=32",
    "model.vocab_size=256",
    "moe.expert_width=32",
    "data.global_batch_size=4",
    "engine.micro_batch_size=2",
    "telemetry.peak_tflops=0.1",
]


PEERS = Path(__file__).resolve().parents[1] / "peers"


@pytest.fixture
def adapter() -> Any:
    """That of transformers."""
    return load_adapters(PEERS, ["transformers"])["transformers"]


def test_arms_take_turns_in_an_order_that_turns_round():
    calls: list[str] = []
    arms = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = protocol.interleave(arms, blocks=2, steps=2, warmup=1, device=torch.device("cpu"))
    assert "".join(calls) == "ab" + "aabb" + "bbaa"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_taken_within_each_block_and_its_interval_holds_it():
    drift = np.linspace(1, 9, 40)
    noise = np.random.default_rng(1).normal(1.02, 0.004, 40)
    found = protocol.compare(list(drift * noise), list(drift))
    assert found.low <= found.ratio <= found.high and found.high - found.low < 0.01
    assert abs(found.ratio - 1.02) < 0.004
    assert protocol.compare([2.0] * 6, [1.0] * 6) == protocol.Ratio(2.0, 2.0, 2.0)


def test_a_ratio_of_few_blocks_has_no_interval():
    found = protocol.compare([2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 5)
    assert found == protocol.Ratio(4.0, None, None)
    assert protocol.shown(protocol.plain(found), 5) == "4.000 (no interval: 5 blocks, 6 needed)"
    assert protocol.compare([3.0], [3.0]) == protocol.Ratio(1.0, 1.0, 1.0)


@pytest.mark.parametrize(("blocks", "low", "high"), [(6, 1, 6), (8, 1, 8), (9, 2, 8), (20, 6, 15), (50, 18, 33)])
def test_the_interval_of_a_median_ratio_is_that_of_the_tables_of_the_sign_test(blocks, low, high):
    found = protocol.compare([float(number) for number in range(1, blocks + 1)], [1.0] * blocks)
    assert (found.low, found.high) == (low, high)


def test_the_command_tells_every_arm_with_versions_protocol_and_both_kinds_of_mfu():
    arms = ["--arm", "attention=gqa", "--arm", "attention=kha_mlp engine.zero_stage=2"]
    answer = CliRunner().invoke(app, ["bench", "step", *SHAPE, *arms, "--blocks", "3", "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)["given"]
    assert list(found["arms"]) == [arms[1], arms[3]] and found["base"] == arms[1]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["protocol"] == {"blocks": 3, "steps": 1, "warmup": 2, "clock": "wall"}
    base, other = found["arms"].values()
    assert base["against_base"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    ratios = np.array(other["block_seconds"]) / np.array(base["block_seconds"])
    assert other["against_base"]["ratio"] == pytest.approx(np.median(ratios))
    assert other["mfu"] < other["mfu_palm"] and base["config"] != other["config"]
    assert "knocking_mlp" in other["chosen"][0]


def test_arms_run_on_the_backend_that_training_would_take_and_auto_is_settled_once(monkeypatch):
    asked: list[str] = []

    def answer(config, device, earlier=""):
        asked.append(earlier)
        return ("eager " if config.attention.backend == "auto" else f"{config.attention.backend} ") + "measured"

    monkeypatch.setattr(step.measured, "measure", answer)
    arms = ["attention=gqa", "attention.backend=sdpa", "attention=kha_mlp", "attention=gqa"]
    found = measure([*SHAPE, "attention.backend=auto"], arms, blocks=3, warmup=1)["arms"]
    assert list(found) == ["attention=gqa (arm 1)", *arms[1:3], "attention=gqa (arm 4)"], "measured against itself"
    assert [arm["backend"] for arm in found.values()] == ["eager", "sdpa", "eager", "eager"]
    assert asked == ["", *["eager"] * 3] and "backend eager" in found["attention=gqa (arm 1)"]["chosen"][0]


def test_attention_by_documents_counts_the_pairs_they_have():
    rows_BW = np.zeros((2, 33), dtype=np.int64)
    whole = Batch(np.arange(2), rows_BW, Layout(np.array([0, 32, 64]), np.array([], dtype=int)))
    cut = Batch(np.arange(2), rows_BW, Layout(np.array([0, 8, 32, 64]), np.array([], dtype=int)))
    assert step.attended_share([whole]) == 1
    assert step.attended_share([whole, cut]) == (3 * 32**2 + 8**2 + 24**2) / (4 * 32**2)
    config = compose(SHAPE)
    flops = flops_per_token(config)
    seconds, peak = [32 * 4 / 1e6] * 3, Peak(1e12, "a test")
    arm = step.Arm(lambda batch: None, config, 0, {})
    found = step._figures(arm, seconds, seconds, 32 * 4, peak, 0.25)
    without = flops.mfu - 3 * flops.by_component["scores"]
    assert found["mfu_documents"] == pytest.approx((without + 0.25 * 3 * flops.by_component["scores"]) * 1e6 / 1e12)


def test_the_peer_is_the_fastest_of_its_implementations_and_trains_on_the_same_loss(adapter):
    pytest.importorskip("transformers")
    shape = [*SHAPE, "data.isolate_documents=false"]
    found = measure(shape, ["attention=gqa"], against=["transformers"], peers=PEERS, blocks=3)
    peer = found["arms"]["transformers"]
    times = {name: time for name, time in peer["experts_tried"].items() if isinstance(time, float)}
    assert set(times) == set(adapter.EXPERTS) and peer["experts"] == min(times, key=times.get)
    assert math.isfinite(peer["against_base"]["ratio"])


def test_experts_of_the_peer_that_do_not_fit_the_device_are_left_out(adapter, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    train, lacking = adapter.Peer.step, {"grouped_mm", "eager"}

    def step_or_not(peer: Any, batch: Batch) -> float:
        if peer.experts in lacking:
            raise torch.OutOfMemoryError
        return train(peer, batch)

    monkeypatch.setattr(adapter.Peer, "step", step_or_not)
    config = compose(SHAPE)
    batch = Batch(np.arange(4), np.ones((4, 33), dtype=np.uint16), Layout(np.arange(5) * 32, np.empty(0, np.int64)))
    peer, tried = adapter.fastest(config, batch, torch.device("cpu"), torch.float32)
    assert peer.experts == "batched_mm" and "memory" in tried["eager"]
    lacking.add("batched_mm")
    with pytest.raises(ConfigError, match="fits"):
        adapter.fastest(config, batch, torch.device("cpu"), torch.float32)


def theirs(name: str) -> str:
    """Qwen3-MoE's name for one of our parameters."""
    words = {
        "blocks.": "model.layers.",
        "attention_norm.": "input_layernorm.",
        "feed_forward_norm.": "post_attention_layernorm.",
        "attention.": "self_attn.",
        "query_norm.": "q_norm.",
        "key_norm.": "k_norm.",
        "query.": "q_proj.",
        "key.": "k_proj.",
        "value.": "v_proj.",
        "output.": "o_proj.",
        "feed_forward.router.": "mlp.gate.",
        "feed_forward.experts.gate_up": "mlp.experts.gate_up_proj",
        "feed_forward.experts.down": "mlp.experts.down_proj",
    }
    for ours, peer in words.items():
        name = re.sub(rf"(?<![a-z_]){re.escape(ours)}", peer, name)
    return {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(name, name)


def test_the_peer_of_our_weights_has_our_loss_on_rows_of_documents_and_then_trains(adapter):
    """Documents cut inside rows, last labels masked: shifted labels or attention across documents would differ."""
    pytest.importorskip("transformers")
    config = compose([*SHAPE, "moe.renormalize=true", "moe.score=softmax", "moe.routed_scaling=1"])
    rows_BW = np.random.default_rng(0).integers(0, 256, (4, 33))
    layout = Layout(np.array([0, 32, 64, 80, 96, 128]), np.array([5, 79]))
    batch = Batch(np.arange(4), rows_BW, layout)
    peer = adapter.Peer(config, torch.device("cpu"), torch.float32, "eager")
    ours = build_decoder(config)
    with torch.no_grad():
        # Far from a uniform guess, so that what a token attends to and is to foretell changes its loss.
        for parameter in ours.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
        parameters = dict(peer.model.named_parameters())
        for name, parameter in ours.named_parameters():
            target = parameters.pop(theirs(name))
            # Experts lie transposed there.
            target.copy_(parameter.transpose(-1, -2) if parameter.dim() == 3 else parameter)
    assert not parameters
    loss = ours(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen).loss_sum
    losses = [float(peer.step(batch)) for _ in range(6)]
    assert losses[0] == pytest.approx(loss.item() / batch.label_count, rel=1e-5)
    assert losses[-1] < losses[0]


def test_a_shape_the_peer_does_not_have_is_refused(adapter):
    with pytest.raises(ConfigError, match="Qwen3-MoE"):
        adapter.check(compose([*SHAPE, "moe.shared_experts=1"]))


@pytest.mark.gpu
def test_on_cuda_arms_have_a_peak_of_their_own_and_the_peer_trains_in_bf16() -> None:
    pytest.importorskip("transformers")
    shape = [text for text in SHAPE if not text.startswith("engine.device")]
    shape += ["engine.device=cuda", "data.isolate_documents=false"]
    found = measure(shape, against=["transformers"], peers=PEERS, blocks=3)
    assert found["shape"]["dtype"] == "bfloat16" and len(found["arms"]) == 4
    assert all(arm["peak_gib"] > 0 and arm["seconds"] > 0 for arm in found["arms"].values())
