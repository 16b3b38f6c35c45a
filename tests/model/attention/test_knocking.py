"""Knocking heads: exactly the paper's formulas, at exactly the paper's place."""

from dataclasses import replace

import pytest
import torch

from kha_train.model.attention.backends import lay_out_documents
from kha_train.model.attention.base import RowContext, build_attention
from kha_train.model.decoder import build_decoder
from kha_train.model.device import resolve_on
from kha_train.model.init import initial_value
from kha_train.model.rope import Rotary, rotary_table

VARIANTS = ("kha_linear", "kha_mlp", "kha_mlp_qkv")
A_HEAD = ("linear_a_head", "mlp_a_head")
"""Every head has matrices of its own."""
TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))


def scramble(module, scale=0.3):
    """Away from the special initial point, on a fixed path."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def built_attention(config):
    attention = build_attention(config, resolve_on(config, torch.device("cpu")))
    with torch.no_grad():
        for prefix, module in attention.named_modules():
            for local, parameter in module.named_parameters(recurse=False):
                parameter.copy_(initial_value(module.initial[local], 0, f"{prefix}.{local}", tuple(parameter.shape)))
    return attention.double()


def rows_of(tokens, head_dim):
    cos, sin = rotary_table(tokens, head_dim, 10_000.0)
    return RowContext(Rotary(cos[None], sin[None]), lay_out_documents(1, tokens, torch.device("cpu")))


def knock(x, mixer, head):
    """KHA eq 5-9, from the matrices alone: those of all heads, or of this one."""
    named = {} if mixer is None else dict(mixer.named_parameters())
    match {name: value if value.ndim == 2 else value[head] for name, value in named.items()}:
        case {"weight": transform}:
            return x @ transform
        case {"up.weight": up, "gate.weight": gate, "down.weight": down}:
            return 2 * ((x @ up) * torch.sigmoid(x @ gate)) @ down
    return x


def normalise(x, weight):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * weight


def turn(x, rotary):
    half = x.shape[-1] // 2
    cos, sin = torch.cat([rotary.cos_BTR[0]] * 2, -1), torch.cat([rotary.sin_BTR[0]] * 2, -1)
    return x * cos + torch.cat((-x[:, half:], x[:, :half]), -1) * sin


def mixers_of(attention):
    maps = dict(getattr(attention.interaction, "maps", {}))
    return {projection: maps.get(projection) for projection in "qkv"}


def by_hand(attention, x, rows, order=("knock", "norm", "turn")):
    """One head at a time, q and k going through `order`: KHA eq 1-9 when the order is the paper's."""
    mixers, heads, groups, width = mixers_of(attention), 4, 2, 32
    outputs = []
    for head in range(heads):
        group = head // (heads // groups)
        part, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
        q, k = x @ attention.query.weight[part].T, x @ attention.key.weight[shared].T
        v = knock(x @ attention.value.weight[shared].T, mixers["v"], group)
        for step in order:
            if step == "knock":
                q, k = knock(q, mixers["q"], head), knock(k, mixers["k"], group)
            elif step == "norm":
                q, k = normalise(q, attention.query_norm.weight), normalise(k, attention.key_norm.weight)
            else:
                q, k = turn(q, rows.rotary), turn(k, rows.rotary)
        scores = (q @ k.T / width**0.5).masked_fill(~torch.ones(len(x), len(x)).tril().bool(), float("-inf"))
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, -1) @ attention.output.weight.T


@pytest.mark.parametrize("variant", ("gqa", *VARIANTS, *A_HEAD))
def test_attention_equals_the_formulas_one_head_at_a_time(variant, make_config):
    attention = built_attention(make_config(variant, model={"init_std": 0.2}))
    scramble(attention)
    rows, x = rows_of(9, 32), torch.randn(9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(attention(x[None], rows)[0], by_hand(attention, x, rows))


@pytest.mark.parametrize("order", [("norm", "knock", "turn"), ("norm", "turn", "knock")])
@pytest.mark.parametrize("variant", ("kha_linear", "kha_mlp_qkv"))
def test_knocking_after_the_norm_or_the_rotation_is_another_function(variant, order, make_config):
    attention = built_attention(make_config(variant, model={"init_std": 0.2}))
    scramble(attention)
    rows, x = rows_of(9, 32), torch.randn(9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    difference = (attention(x[None], rows)[0] - by_hand(attention, x, rows, order)).abs().max()
    assert difference > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_knocking_decoder_gives_the_very_logits_of_the_baseline(variant, dtype, make_config):
    baseline = build_decoder(make_config()).to(dtype)(TOKENS).logits_BTV
    assert torch.equal(build_decoder(make_config(variant)).to(dtype)(TOKENS).logits_BTV, baseline)


@pytest.mark.parametrize("qk_norm", ["per_head", "full_width", "none"])
def test_knocking_linear_is_absorbed_into_the_projections_exactly(qk_norm, make_config):
    knocking = build_decoder(make_config("kha_linear", attention={"qk_norm": qk_norm}))
    scramble(knocking, 0.05)
    plain = build_decoder(make_config("gqa", attention={"qk_norm": qk_norm}))
    missing = plain.load_state_dict(knocking.state_dict(), strict=False)
    assert all(".interaction." in name for name in missing.unexpected_keys) and not missing.missing_keys
    before = plain(TOKENS).logits_BTV
    with torch.no_grad():
        for knocked, block in zip(knocking.blocks, plain.blocks, strict=True):
            mixers, attention = mixers_of(knocked.attention), block.attention
            for projection, mixer in (
                (attention.query, mixers["q"]),
                (attention.key, mixers["k"]),
                (attention.value, mixers["v"]),
            ):
                weight_HKD = projection.weight.view(-1, 32, 64)
                absorbed = torch.einsum("hkd,ke->hed", weight_HKD.double(), mixer.weight.double())
                projection.weight.copy_(absorbed.flatten(0, 1))
    expected = knocking(TOKENS).logits_BTV
    torch.testing.assert_close(plain(TOKENS).logits_BTV, expected, rtol=1e-5, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_knocking_matrix_has_a_gradient_on_and_off_its_diagonal_from_the_start(variant, make_config):
    decoder = build_decoder(make_config(variant))
    decoder(TOKENS, TOKENS.roll(-1, 1)).loss_sum.backward()
    matrices = {name: p.grad for name, p in decoder.named_parameters() if ".interaction." in name}
    assert matrices
    for name, grad in matrices.items():
        off_diagonal = grad - grad.diag().diag()
        assert grad.isfinite().all() and grad.diag().abs().max() > 0 and off_diagonal.abs().max() > 0, name


def test_one_set_of_matrices_per_layer_serves_all_heads(make_config):
    decoder = build_decoder(make_config("kha_mlp"))
    shapes = {n: tuple(p.shape) for n, p in decoder.named_parameters() if ".interaction." in n}
    expected = {
        f"blocks.{i}.attention.interaction.maps.v.{m}.weight": (32, 32) for i in (0, 1) for m in ("up", "gate", "down")
    }
    assert shapes == expected


@pytest.mark.parametrize("impl", ["eager", "folded"])
@pytest.mark.parametrize("variant", A_HEAD)
def test_matrices_of_every_head_that_are_equal_are_the_shared_ones(variant, impl, make_config):
    own = make_config(variant, engine={"micro_batch_size": 2})
    interaction = replace(own.attention.interaction, impl=impl)
    shared = replace(own, attention=replace(own.attention, interaction=replace(interaction, share="heads")))
    own = replace(own, attention=replace(own.attention, interaction=interaction))
    attention, expected = built_attention(own), built_attention(shared)
    scramble(expected)
    state = expected.state_dict()
    attention.load_state_dict({name: state[name].expand(value.shape) for name, value in attention.state_dict().items()})
    rows, x = rows_of(9, 32), torch.randn(1, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(attention(x, rows), expected(x, rows), rtol=1e-11, atol=1e-13)
    heads = own.attention.base.heads()
    sizes = {"q": 4 * 32**2, "k": 2 * 32**2, "v": 2 * 32**2}
    factor = len(interaction.matrices)
    assert own.attention.interaction.parameters(heads) == factor * sum(sizes.values())
    assert own.attention.interaction.flops(heads) == shared.attention.interaction.flops(heads)


def test_attention_compiles_without_a_graph_break(make_config):
    config = make_config("kha_mlp_qkv")
    attention = built_attention(config)
    rows, x = rows_of(16, 32), torch.randn(1, 16, 64, dtype=torch.float64)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rows), attention(x, rows))
