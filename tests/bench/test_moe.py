"""The benchmark of experts measures what it names: all contenders compute the same function, on the reported loads."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from kha_train.bench import moe as bench
from kha_train.bench.peers import Problem, load_adapters
from kha_train.cli.main import app
from kha_train.config.compose import compose
from kha_train.errors import ConfigError

SHAPE = [
    "engine.device=cpu",
    "engine.micro_batch_size=2",
    "model.hidden_size=32",
    "model.head_dim=8",
    "model.seq_len=32",
    "moe.expert_width=24",
    "moe.experts=8",
    "moe.top_k=2",
]
PEERS = Path(__file__).resolve().parents[1] / "peers"
AGAINST = load_adapters(PEERS, ["transformers"] if find_spec("transformers") else [])


def problems() -> dict[str, Problem]:
    given = (compose(SHAPE), torch.device("cpu"), torch.float32)
    return {"balanced": bench.balanced(*given), "router": bench.routed(*given)}


@pytest.mark.parametrize("routing", ["balanced", "router"])
def test_all_contenders_compute_the_same_sum_and_the_same_gradients(routing: str) -> None:
    problem = problems()[routing]
    arms, _ = bench.implementations(compose(SHAPE), torch.device("cpu"), torch.float32, AGAINST)
    assert {"grouped", "loop", "torch grouped_mm"} <= arms.keys()
    answers = {}
    for name, bind in arms.items():
        contender = bind(problem)
        out = contender.forward()
        grads = torch.autograd.grad(out, contender.leaves, problem.grad_ND)
        answers[name] = (out, grads[0], grads[-1], sum(grad.square().sum() for grad in grads[1:-1]))
    for name, answer in answers.items():
        for found, expected in zip(answer, answers["loop"], strict=True):
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_one_router_is_even_and_the_other_is_not() -> None:
    loads = {name: problem.routing.load_E for name, problem in problems().items()}
    assert loads["balanced"].tolist() == [16] * 8
    assert loads["router"].sum() == 128 and loads["router"].max() > 1.5 * 16
    for problem in problems().values():
        assert all(len(set(row)) == 2 for row in problem.routing.expert_NJ.tolist())


def test_the_command_tells_time_padding_and_what_is_kept_with_the_protocol() -> None:
    answer = CliRunner().invoke(app, ["bench", "moe", *SHAPE, "--blocks", "3", "--clock", "process", "--json"])
    assert answer.exit_code == 0, answer.output
    found = json.loads(answer.stdout)
    assert found["protocol"] == {"blocks": 3, "warmup": 3, "clock": "process", "base": "grouped"}
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert "megablocks" in found["missing"] or find_spec("megablocks")
    assert found["routings"]["balanced"]["tile_padding"] == 8.0
    for figures in found["routings"].values():
        arms = figures["arms"]
        assert arms["grouped"]["against_base"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
        for arm in arms.values():
            flops = 9 * 128 * 32 * 48
            assert arm["flops_per_second"] * arm["seconds"] == pytest.approx(flops) and len(arm["block_seconds"]) == 3
        # Of every copy gate and up, its place and the way back; and where the 8 experts end.
        assert arms["grouped"]["kept_bytes_per_token"] == 2 * (4 * 48 + 8 + 8) + 8 * 4 / 64
        assert arms["loop"]["kept_bytes_per_token"] > 2 * arms["grouped"]["kept_bytes_per_token"]
    assert "TF/s" in bench.format_measured(found)


def test_a_model_without_experts_is_refused() -> None:
    dense = ["model=dense_0_61b"]
    with pytest.raises(ConfigError, match="no experts"):
        bench.measure(dense)
