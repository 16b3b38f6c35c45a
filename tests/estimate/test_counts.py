"""Counts from the configuration alone, against the real module, torch's own counter and published figures."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.estimate.counts import count_parameters, flops_per_token
from kha_train.model.decoder import build_decoder

TINY = [
    "model=tiny",
    "model.layers=2",
    "model.hidden_size=64",
    "model.vocab_size=256",
    "model.seq_len=64",
    "data.global_batch_size=2",
    "engine.micro_batch_size=2",
]
EAGER = "attention.interaction.impl=eager"
VARIANTS = {
    "gqa": ["attention=gqa"],
    "kha_linear": ["attention=kha_linear", "attention.interaction.projections=[q,k,v]", EAGER],
    "kha_mlp": ["attention=kha_mlp", "attention.interaction.projections=[v]", EAGER],
    "kha_mlp_qkv": ["attention=kha_mlp", "attention.interaction.projections=[q,k,v]", EAGER],
}
GOLDEN = {
    "gqa": (6_102_268_416, 1_006_189_056),
    "kha_mlp": (6_103_153_152, 1_007_073_792),
    "kha_linear": (6_103_153_152, 1_007_073_792),
}


def tiny(variant: str, *overrides: str) -> RunConfig:
    return compose([*TINY, *VARIANTS[variant], *overrides])


def paper(variant: str) -> RunConfig:
    """The 6.1B model."""
    return compose(["model=moe_6b", *VARIANTS[variant]])


def component(name):
    parts = name.split(".")
    for key in ("interaction", "router", "experts"):
        if key in parts:
            return key
    if "norm" in name:
        return "norms"
    return "attention" if "attention" in parts else parts[0]


def real_counts(config):
    with torch.device("meta"):
        decoder = build_decoder(config)
    counts = Counter()
    for name, parameter in decoder.named_parameters():
        counts[component(name)] += parameter.numel()
    return counts


@pytest.mark.parametrize("variant", GOLDEN)
def test_the_6b_model_has_its_golden_number_of_parameters(variant):
    count = count_parameters(paper(variant))
    assert (count.total, count.active) == GOLDEN[variant]
    real = real_counts(paper(variant))
    assert sum(real.values()) == GOLDEN[variant][0] and real == Counter(count.by_component)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", ["per_head", "full_width", "none"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_equal_the_real_module_by_component(variant, qk_norm, tied):
    config = tiny(variant, f"attention.qk_norm={qk_norm}", f"model.tie_embeddings={tied}", "model.layers=3")
    count = count_parameters(config)
    assert Counter(count.by_component) == real_counts(config) and count.total == sum(count.by_component.values())
    idle = 3 * 6 * 3 * 64 * 128
    assert count.active == count.total - idle


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_equal_what_torch_counts_on_a_real_forward_and_backward(variant):
    config = tiny(variant, "attention.backend=eager", "moe.backend=loop")
    decoder, flops = build_decoder(config), flops_per_token(config)
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))
    # The eager backend computes the upper half of the scores as well, which is masked and which we do not count.
    with FlopCounterMode(display=False) as forward:
        decoder(tokens)
    assert forward.get_total_flops() == 128 * (flops.forward + flops.by_component["scores"])
    with FlopCounterMode(display=False) as training:
        decoder(tokens, tokens).loss_sum.backward()
    assert training.get_total_flops() == 128 * (flops.training + 3 * flops.by_component["scores"])


def test_the_6b_model_costs_what_arithmetic_says():
    flops = flops_per_token(paper("gqa"))
    matrices = 18 * (18_874_368 + 262_144 + 8 * 2_359_296) + 157_184 * 2048
    assert flops.mfu == 6 * matrices + 6 * 8192 * 32 * 128 * 18 == flops.training
    assert flops.mfu_palm == 6 * matrices + 12 * 8192 * 32 * 128 * 18
    assert flops.training == pytest.approx(9.661e9, rel=1e-4)
    assert flops.mfu_palm / flops.mfu == pytest.approx(1.375, abs=1e-3)


def test_knocking_costs_what_the_paper_says_and_is_left_out_of_mfu():
    plain, mlp, linear = (flops_per_token(paper(v)) for v in ("gqa", "kha_mlp", "kha_linear"))
    assert mlp.forward - plain.forward == 18 * 6 * 4 * 128**2
    assert linear.forward - plain.forward == 18 * 2 * (32 + 4 + 4) * 128**2
    assert (mlp.forward - plain.forward) / plain.forward == pytest.approx(0.00220, abs=1e-5)
    assert plain.mfu == mlp.mfu == linear.mfu and plain.mfu_palm == mlp.mfu_palm


def test_counting_needs_no_torch():
    code = "import sys, kha_train.estimate.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
