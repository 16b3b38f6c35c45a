"""What each variant promises beyond the contract: its formula by hand, what it refuses and why, its cost in the
papers.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kha_train.config.compose import compose
from kha_train.config.resolve import Device, implementation, resolve
from kha_train.errors import ConfigError
from kha_train.estimate.counts import cache_bytes_per_token, count_parameters, flops_per_token
from kha_train.model import decoder as decoder_module
from kha_train.model.attention.backends import lay_out_documents
from kha_train.model.attention.base import RowContext, build_attention
from kha_train.model.attention.choice import announce
from kha_train.model.attention.linear import features
from kha_train.model.decoder import build_decoder
from kha_train.model.device import resolve_on
from kha_train.model.init import initial_values
from kha_train.model.rope import Rotary, rotary_table

PAPER = ("model=moe_6b", "model.layers=18", "model.hidden_size=1536", "moe.experts=64", "moe.top_k=4")
"""The KHA paper's exploratory model, A0.8-6.6B: 18 layers of width 1536, 64 experts of width 1152, 4 of them active."""
ACTIVE = {
    "gta": (("model.query_heads=32", "model.kv_heads=4"), 868),
    "mqa": (("model.query_heads=32",), 859),
    "gqa 8 of 16": (("model.query_heads=16", "model.kv_heads=8"), 795),
    "gqa 4 of 32": (("model.query_heads=32", "model.kv_heads=4"), 880),
    "mha": (("model.query_heads=16",), 852),
}
"""Table 3 of the paper: heads, and active parameters in millions."""
CPU = torch.device("cpu")


def scrambled(*overrides, layer=0):
    config = compose([*overrides, "model.hidden_size=32", "model.head_dim=8", "model.seq_len=12"])
    attention = build_attention(config, resolve_on(config, CPU), layer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for owner, local, _, value in initial_values(attention, 0):
            fresh = value()
            getattr(owner, local).copy_(fresh + 0.3 * torch.randn(fresh.shape, generator=generator))
    return attention.double().requires_grad_(False)


def rows_of(width):
    cos, sin = rotary_table(9, width, 10_000.0)
    return RowContext(Rotary(cos[None], sin[None]), lay_out_documents(1, 9, CPU))


def turn(x, rows):
    half = x.shape[-1] // 2
    cos, sin = torch.cat([rows.rotary.cos_BTR[0]] * 2, -1), torch.cat([rows.rotary.sin_BTR[0]] * 2, -1)
    return x * cos + torch.cat((-x[:, half:], x[:, :half]), -1) * sin


def normalise(x, weight, eps=1e-6):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def heads_of(projection, x):
    return (x @ projection.weight.T).unflatten(-1, (projection.heads, -1)).unbind(1)


def softmax(scores):
    return scores.masked_fill(~torch.ones_like(scores).tril().bool(), float("-inf")).softmax(-1)


X = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("components", [0, 1, 3])
@pytest.mark.parametrize(("impl", "after"), [("eager", False), ("folded", False), ("eager", True)])
def test_explicit_attention_is_equations_10_to_17_one_head_at_a_time(impl, after, components):
    settings = (f"attention.interaction.impl={impl}", f"attention.interaction.mix_after_rope={after}".lower())
    settings += (f"attention.interaction.component_heads={components}",)
    attention, rows = scrambled("attention=mea", *settings), rows_of(8)
    mix = {name: matrix.weight for name, matrix in attention.interaction.compose.items()}
    keys, values = heads_of(attention.key, X), heads_of(attention.value, X)

    def composed(heads, matrix):
        assert matrix.shape == (len(heads), 2) and len(heads) == (components or 2)
        return [sum(matrix[i, o] * head for i, head in enumerate(heads)) for o in range(2)]

    def placed(heads):
        return [turn(normalise(head, attention.key_norm.weight), rows) for head in heads]

    keys = composed(placed(keys), mix["k"]) if after else placed(composed(keys, mix["k"]))
    values, outputs = composed(values, mix["v"]), []
    for head, query in enumerate(heads_of(attention.query, X)):
        query = turn(normalise(query, attention.query_norm.weight), rows)
        out = softmax(query @ keys[head // 2].T / math.sqrt(8)) @ values[head // 2]
        outputs.append(normalise(out, attention.interaction.norm.weight, eps=1e-5))
    torch.testing.assert_close(attention(X[None], rows)[0], torch.cat(outputs, -1) @ attention.output.weight.T)


def fresh(*overrides):
    """The attention of `overrides` as it starts."""
    config = compose([*overrides, "model.hidden_size=32", "model.head_dim=8", "model.seq_len=12"])
    attention = build_attention(config, resolve_on(config, CPU))
    for owner, local, _, value in initial_values(attention, 0):
        getattr(owner, local).data.copy_(value())
    return attention.double()


@pytest.mark.parametrize("impl", ["eager", "folded"])
@pytest.mark.parametrize(
    ("base", "width", "alone"),
    [("gqa", 8, "attention.interaction.compose=[k,v]"), ("gta", 4, "attention.interaction.compose=[v]")],
)
def test_fewer_components_start_as_attention_with_so_many_key_value_heads(base, width, alone, impl):
    explicit = (f"attention={base}", "interaction@attention.interaction=explicit", alone, "model.query_heads=8")
    settings = ("attention.interaction.head_norm=false", f"attention.interaction.impl={impl}", "model.kv_heads=4")
    for components in (1, 2):
        composed = fresh(*explicit, *settings, f"attention.interaction.component_heads={components}")
        plain = fresh(f"attention={base}", "model.query_heads=8", f"model.kv_heads={components}")
        expected = plain(X[None], rows_of(width))
        torch.testing.assert_close(composed(X[None], rows_of(width)), expected, rtol=1e-9, atol=1e-12)


def test_more_components_start_as_sums_of_the_size_of_one():
    """Six components of two heads: each head is the sum of three, by the root of three."""
    attention = fresh("attention=mea", "model.kv_heads=2", "attention.interaction.component_heads=6")
    root = 3**-0.5
    expected = torch.tensor([[root, 0], [root, 0], [root, 0], [0, root], [0, root], [0, root]], dtype=torch.float64)
    for matrix in attention.interaction.compose.values():
        torch.testing.assert_close(matrix.weight, expected, rtol=1e-7, atol=0)


def test_projections_of_low_rank_over_heads_are_held_by_fewer_components_exactly():
    """MEA app. F, eq 36-38: of the SVD of a weight [d K, H], U[:, :h'] are virtual heads and S V^T composes them."""
    full = fresh("attention=gqa", "model.query_heads=8", "model.kv_heads=4")
    settings = ("attention.interaction.component_heads=2", "attention.interaction.head_norm=false")
    small = fresh("attention=mea", "model.query_heads=8", "model.kv_heads=4", *settings)
    generator = torch.Generator().manual_seed(1)
    state = {name: value for name, value in full.state_dict().items() if name in small.state_dict()}
    with torch.no_grad():
        for kind, name in (("k", "key"), ("v", "value")):
            low = torch.randn(4, 2, generator=generator).double() @ torch.randn(2, 8 * 32, generator=generator).double()
            full.get_submodule(name).weight.copy_(low.view(4 * 8, 32))
            u, s, vh = torch.linalg.svd(low.T, full_matrices=False)
            state |= {f"{name}.weight": u[:, :2].T.reshape(2 * 8, 32)}
            state |= {f"interaction.compose.{kind}.weight": s[:2, None] * vh[:2]}
    small.load_state_dict(state)
    assert small.key.weight.numel() == full.key.weight.numel() // 2
    torch.testing.assert_close(small(X[None], rows_of(8)), full(X[None], rows_of(8)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ((), 2 * 8 + 2 * 8),
        (("attention.qk_norm=none",), 2 * 8 + 2 * 8),
        (("attention.interaction.mix_after_rope=true",), 2 * 8 + 2 * 8),
        (("attention.interaction.compose=[k]",), 2 * 8 + 4 * 8),
        (("attention.interaction.compose=[v]",), 4 * 8 + 2 * 8),
        (("attention.interaction.component_heads=4",), 4 * 8 + 4 * 8),
        (("attention.interaction.component_heads=6", "attention.qk_norm=none"), 4 * 8 + 4 * 8),
    ],
    ids=str,
)
def test_decoding_caches_the_components_where_composing_them_later_is_the_same(settings, kept):
    shape = ("model.layers=3", "model.query_heads=8", "model.kv_heads=4", "model.head_dim=8")
    config = compose(["attention=mea", *shape, "attention.interaction.component_heads=2", *settings])
    assert cache_bytes_per_token(config, 1) == 3 * kept


def test_grouped_tied_attention_shares_one_state_between_values_and_half_of_the_keys():
    attention, rows = scrambled("attention=gta"), rows_of(4)
    states = heads_of(attention.tied, X)
    turned = turn(normalise(heads_of(attention.rotary_key, X)[0], attention.rotary_key_norm.weight), rows)
    outputs = []
    for head, query in enumerate(heads_of(attention.query, X)):
        query, state = normalise(query, attention.query_norm.weight), states[head // 2]
        key = torch.cat((normalise(state[:, :4], attention.key_norm.weight), turned), -1)
        query = torch.cat((query[:, :4], turn(query[:, 4:], rows)), -1)
        outputs.append(softmax(query @ key.T / math.sqrt(8)) @ state)
    torch.testing.assert_close(attention(X[None], rows)[0], torch.cat(outputs, -1) @ attention.output.weight.T)


@pytest.mark.parametrize("impl", ["eager", "folded"])
@pytest.mark.parametrize("value_only", [True, False])
@pytest.mark.parametrize("name", ["knocking_linear", "knocking_mlp", "knocking_gate"])
def test_on_a_tied_state_knocking_reaches_the_keys_too_or_the_values_alone(name, value_only, impl):
    settings = [f"attention.interaction.value_only={value_only}".lower(), "attention.interaction.projections=[v]"]
    settings += [] if name == "knocking_gate" else [f"attention.interaction.impl={impl}"]
    if name == "knocking_mlp" and not value_only and impl == "folded":
        with pytest.raises(ConfigError, match="key as well as value"):
            scrambled("attention=gta", f"interaction@attention.interaction={name}", *settings)
        return
    attention, rows = scrambled("attention=gta", f"interaction@attention.interaction={name}", *settings), rows_of(4)
    matrices = list(attention.interaction.maps["v"].parameters())

    def knocked(state):
        if name == "knocking_linear":
            return state @ matrices[0]
        if name == "knocking_gate":
            return 2 * state * torch.sigmoid(state @ matrices[0])
        up, gate, down = matrices
        return 2 * ((state @ up) * torch.sigmoid(state @ gate)) @ down

    turned = turn(normalise(heads_of(attention.rotary_key, X)[0], attention.rotary_key_norm.weight), rows)
    states = heads_of(attention.tied, X)
    values = [knocked(state) for state in states]
    keys = states if value_only else values
    outputs = []
    for head, query in enumerate(heads_of(attention.query, X)):
        query = normalise(query, attention.query_norm.weight)
        query = torch.cat((query[:, :4], turn(query[:, 4:], rows)), -1)
        key = torch.cat((normalise(keys[head // 2][:, :4], attention.key_norm.weight), turned), -1)
        outputs.append(softmax(query @ key.T / math.sqrt(8)) @ values[head // 2])
    torch.testing.assert_close(attention(X[None], rows)[0], torch.cat(outputs, -1) @ attention.output.weight.T)


def test_talking_heads_mix_scores_and_weights():
    attention, rows = scrambled("attention=talking_heads"), rows_of(8)
    keys = [turn(normalise(key, attention.key_norm.weight), rows) for key in heads_of(attention.key, X)]
    queries = [turn(normalise(query, attention.query_norm.weight), rows) for query in heads_of(attention.query, X)]
    scores = [query @ keys[head // 2].T / math.sqrt(8) for head, query in enumerate(queries)]
    before, after, values = attention.score_mix.weight, attention.weight_mix.weight, heads_of(attention.value, X)
    weights = [softmax(sum(before[i, h] * scores[i] for i in range(4))) for h in range(4)]
    outputs = [sum(after[i, h] * weights[i] for i in range(4)) @ values[h // 2] for h in range(4)]
    torch.testing.assert_close(attention(X[None], rows)[0], torch.cat(outputs, -1) @ attention.output.weight.T)


@pytest.mark.parametrize("layer", [0, 3])
def test_differential_attention_is_the_normalised_difference_of_two_maps_one_pair_at_a_time(layer):
    attention, rows = scrambled("attention=diff", "model.query_heads=8", "model.kv_heads=4", layer=layer), rows_of(8)
    start, second = 0.8 - 0.6 * math.exp(-0.3 * layer), attention.second
    weight = math.exp(second.a_1 @ second.b_1) - math.exp(second.a_2 @ second.b_2) + start
    queries = [turn(normalise(query, attention.query_norm.weight), rows) for query in heads_of(attention.query, X)]
    keys = [turn(normalise(key, attention.key_norm.weight), rows) for key in heads_of(attention.key, X)]
    values, outputs = heads_of(attention.value, X), []
    for pair in range(4):
        group, place = divmod(pair, 2)
        one, other = (
            softmax(queries[4 * group + 2 * part + place] @ keys[2 * group + part].T / math.sqrt(8)) for part in (0, 1)
        )
        out = (one - weight * other) @ torch.cat((values[2 * group], values[2 * group + 1]), -1)
        outputs.append((1 - start) * normalise(out, attention.head_norm.weight, eps=1e-5))
    torch.testing.assert_close(attention(X[None], rows)[0], torch.cat(outputs, -1) @ attention.output.weight.T)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_linear_attention_is_a_ratio_of_sums_over_earlier_tokens_forward_and_backward(positions, backend):
    """In chunks of 2, 9 tokens of two documents: one begins inside a chunk and goes on over two borders."""
    settings = (f"attention.positions={positions}", f"attention.backend={backend}", "attention.base.chunk_tokens=2")
    attention = scrambled("attention=linear", *settings)
    borders = [0, 3, 9]
    rows = rows_of(8)._replace(documents=lay_out_documents(1, 9, CPU, torch.tensor(borders, dtype=torch.int32)))
    if positions == "none":
        rows = rows._replace(rotary=None)
    moved = (lambda x: turn(x, rows)) if rows.rotary else (lambda x: x)

    def feature(x):
        return torch.where(x > 0, x + 1, x.exp())

    def formula(x):
        keys = [feature(normalise(key, attention.key_norm.weight)) for key in heads_of(attention.key, x)]
        outputs, values = [], heads_of(attention.value, x)
        for head, query in enumerate(heads_of(attention.query, x)):
            query, key, value = (
                feature(normalise(query, attention.query_norm.weight)),
                keys[head // 2],
                values[head // 2],
            )
            turned_query, turned_key, out = moved(query), moved(key), []
            for t in range(9):
                seen = range(max(border for border in borders if border <= t), t + 1)
                over = sum((turned_query[t] @ turned_key[s]) * value[s] for s in seen)
                out.append(over / sum(query[t] @ key[s] for s in seen))
            outputs.append(torch.stack(out))
        return torch.cat(outputs, -1) @ attention.output.weight.T

    x, along = X.clone().requires_grad_(), torch.linspace(-1, 1, X.numel(), dtype=X.dtype).view_as(X)
    found, expected = attention(x[None], rows)[0], formula(x)
    torch.testing.assert_close(found, expected)
    found, expected = (torch.autograd.grad((out * along).sum(), x)[0] for out in (found, expected))
    torch.testing.assert_close(found, expected)


def test_features_of_very_negative_numbers_are_positive_in_half_precision_too():
    """elu(x) + 1 would be 0 there, and a denominator of such features too."""
    x = torch.tensor([-30.0, -8.0, 0.0, 2.0], dtype=torch.bfloat16)
    torch.testing.assert_close(features(x).float(), torch.tensor([9.36e-14, 3.35e-4, 1.0, 3.0]), rtol=4e-3, atol=0)


def test_the_operations_of_chunks_are_counted_and_grow_with_the_row_alone():
    base = compose(["attention=linear", "attention.base.chunk_tokens=4"]).attention.base
    attention = scrambled("attention=linear", "model.seq_len=64", "attention.base.chunk_tokens=4")
    heads = attention.heads
    for tokens in (4, 32, 64):
        cos, sin = rotary_table(tokens, 8, 10_000.0)
        rows = RowContext(Rotary(cos[None], sin[None]), lay_out_documents(1, tokens, CPU))
        with FlopCounterMode(display=False) as counter:
            attention(torch.randn(1, tokens, 32, dtype=torch.float64), rows)
        sums = 2 * (heads.query_heads + heads.kv_heads) * 8 * 8 + 4 * heads.kv_heads * 8 if tokens > 4 else 0
        base = replace(base, query_heads=heads.query_heads, kv_heads=heads.kv_heads, head_dim=8)
        pairs = 4 * (base.pair_flops() + 2 * heads.kv_heads)
        assert base.score_flops(tokens) == pairs // 2 + sums
        # The real chunk computes its masked half too.
        assert counter.get_total_flops() == tokens * (base.token_flops(32) + pairs + sums)


@pytest.mark.parametrize(("kind", "width"), [("headwise", 1), ("elementwise", 8)])
def test_the_output_gate_multiplies_each_head_by_a_sigmoid_of_the_layers_input(kind, width):
    attention, rows = scrambled("attention=gqa", f"attention.base.output_gate={kind}"), rows_of(8)
    keys = [turn(normalise(key, attention.key_norm.weight), rows) for key in heads_of(attention.key, X)]
    outputs, values = [], heads_of(attention.value, X)
    for head, query in enumerate(heads_of(attention.query, X)):
        query = turn(normalise(query, attention.query_norm.weight), rows)
        gate = 1 / (1 + torch.exp(-X @ attention.gate.weight[head * width : (head + 1) * width].T))
        outputs.append(softmax(query @ keys[head // 2].T / math.sqrt(8)) @ values[head // 2] * gate)
    torch.testing.assert_close(attention(X[None], rows)[0], torch.cat(outputs, -1) @ attention.output.weight.T)


def test_the_gate_is_twice_the_value_times_a_sigmoid():
    attention = scrambled("attention=kha_gate")
    value, gate = torch.randn(3, 5, 2, 8, dtype=torch.float64), attention.interaction.maps["v"].gate.weight
    *_, found = attention.interaction(value, value, value)
    torch.testing.assert_close(found, 2 * value * torch.sigmoid(value @ gate))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["attention=mla", "interaction@attention.interaction=knocking_mlp"], "4.2.3"),
        (["attention=mla", "interaction@attention.interaction=knocking_gate"], "4.2.3"),
        (["attention=gta", "interaction@attention.interaction=knocking_linear"], "no keys of its own"),
        (["attention=gta", "interaction@attention.interaction=explicit"], "no keys of its own"),
        (["attention=gta", "attention.qk_norm=full_width"], "no full width"),
        (["attention=gta", "attention.positions=alibi"], "rotary key of its own"),
        (["attention=mla", "attention.qk_norm=per_head"], "normalises its latents"),
        (["attention=mla", "attention.positions=none"], "rotary key of its own"),
        (["attention=talking_heads", "model.seq_len=4096"], "holds all scores"),
        (["attention=talking_heads", "attention.backend=sdpa"], "only the formula itself"),
        (
            ["attention=kha_mlp", "attention.interaction.projections=[k]", "attention.interaction.impl=folded"],
            "reaches",
        ),
        (["attention=mea", "attention.interaction.mix_after_rope=true", "attention.interaction.impl=folded"], "after"),
        (["attention=kha_linear", "attention.interaction.impl=triton"], "nothing is left to compute"),
        (["attention=kha_mlp", "model.head_dim=24", "attention.interaction.impl=triton"], "16, 32, 64, 128"),
        (
            ["attention=kha_mlp", "attention.interaction.share=none", "attention.interaction.impl=triton"],
            "every head has its own",
        ),
        (["attention=kha_mlp", "attention.interaction.value_only=true"], "values of its own"),
        (
            [
                *("attention=gta", "interaction@attention.interaction=knocking_linear"),
                *("attention.interaction.value_only=true", "attention.interaction.projections=[v]"),
                *("attention.interaction.impl=folded", "attention.base.output_gate=elementwise"),
            ],
            "does not reach the output",
        ),
        (
            [
                "attention=gta",
                "interaction@attention.interaction=knocking_mlp",
                "attention.interaction.value_only=true",
                "attention.interaction.projections=[q]",
            ],
            "values are not mapped",
        ),
        (["attention=mea", "attention.interaction.compose=[q]"], "eq 11"),
        (
            ["attention=mea", "attention.interaction.compose=[]", "attention.interaction.component_heads=1"],
            "nothing is composed",
        ),
        (
            [
                "attention=mea",
                "attention.qk_norm=full_width",
                "attention.interaction.component_heads=1",
                "attention.interaction.mix_after_rope=true",
            ],
            "before they are composed",
        ),
        (["attention=diff", "attention.positions=alibi"], "different slopes"),
        (["attention=diff", "model.kv_heads=1"], "pairs of heads"),
        (["attention=linear", "attention.positions=alibi"], "linear attention has none"),
        (["attention=linear", "attention.backend=sdpa"], "computes a softmax, and linear has none"),
        (["attention=linear", "attention.base.chunk_tokens=0"], "at least 1"),
        (["attention.backend=chunked"], "gqa has a softmax"),
        (["attention=kha_gate", "attention.interaction.init.kind=scaled_identity"], "nothing to scale"),
        (
            ["attention=kha_mlp", "attention.base.output_gate=elementwise", "attention.interaction.impl=folded"],
            "a gate of every dimension",
        ),
        (["attention.backend=varlen", "engine.device=cpu"], "CUDA alone"),
        (["attention.backend=cudnn"], "only unsplit causal rows"),
        (["attention.backend=flash_attn", "engine.precision=fp32"], "bf16"),
        (["attention.backend=flash_attn", "attention.positions=alibi"], "no bias"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_combinations_that_cannot_be_are_refused_with_the_reason(overrides, reason):
    with pytest.raises(ConfigError, match=reason) as refused:
        compose(overrides)
    assert refused.value.exit_code == 2 and refused.value.field.startswith(("attention.", "model."))


@pytest.mark.parametrize("backend", ["varlen", "flash_attn", "cudnn"])
def test_a_backend_that_is_missing_here_says_what_is_missing(backend):
    config = compose([f"attention.backend={backend}", "data.isolate_documents=false"])
    with pytest.raises(ConfigError, match="needs a CUDA device, and this is cpu"):
        resolve_on(config, CPU)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "sdpa"),
        (["data.isolate_documents=false"], "sdpa"),
        (["attention.positions=alibi"], "sdpa"),
        (["attention=talking_heads"], "eager"),
    ],
)
def test_auto_names_what_it_takes_on_a_cpu(overrides, name):
    config = compose([*overrides, "attention.backend=auto"])
    resolved = resolve_on(config, CPU)
    line, *_ = announce(config, resolved, CPU)
    assert f"backend {name} ({resolved.backend.why})" in line


def test_rows_of_documents_have_a_mask_only_where_the_kernel_does_not_read_their_borders(monkeypatch):
    small = ("model.layers=1", "model.vocab_size=64", "model.seq_len=12")
    given = []
    laid_out = decoder_module.lay_out_documents
    monkeypatch.setattr(decoder_module, "lay_out_documents", lambda *all: given.append(laid_out(*all)) or given[-1])
    tokens, borders_S = torch.zeros(2, 12, dtype=torch.int64), torch.tensor([0, 4, 12, 24], dtype=torch.int32)
    for name, masked in (("auto", False), ("sdpa", True), ("eager", True)):
        config = compose([*small, f"attention.backend={name}"])
        decoder = build_decoder(config, resolve(config, Device("cuda", (9, 0))))
        for block in decoder.blocks:
            block.attention.attend = lambda q, k, v, documents, scale: v.repeat_interleave(q.shape[2] // v.shape[2], 2)
        decoder(tokens, cu_seqlens_S=borders_S)
        assert (given.pop().mask_BJTU is not None) == masked


def test_auto_gives_the_numbers_of_what_it_takes():
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    small = ("model.layers=1", "model.vocab_size=64", "model.seq_len=12")
    logits = [
        build_decoder(compose([*small, f"attention.backend={name}"]))(tokens).logits_BTV for name in ("auto", "sdpa")
    ]
    assert torch.equal(*logits)


def test_folding_is_taken_when_the_tokens_of_a_forward_outweigh_the_weights():
    few = ("attention=kha_linear", "model.seq_len=64", "engine.micro_batch_size=1")
    many = ("attention=kha_linear", "model.seq_len=256", "engine.micro_batch_size=4")
    assert implementation(compose(few)).name == "eager" and implementation(compose(many)).name == "folded"
    assert "interaction folded (folding" in announce(compose(many), resolve_on(compose(many), CPU), CPU)[0]


def test_knocking_on_queries_and_keys_warns_of_its_cost():
    costly = compose(["attention=kha_mlp", "attention.interaction.projections=[q,k,v]"])
    assert announce(costly, resolve_on(costly, CPU), CPU)[1].startswith("warning: knocking_mlp on q and k")
    usual = compose(["attention=kha_mlp"])
    assert len(announce(usual, resolve_on(usual, CPU), CPU)) == 1


@pytest.mark.parametrize("variant", ["kha_linear", "kha_mlp", "kha_gate", "mea"])
def test_matrices_start_as_asked(variant):
    scale = ("attention.interaction.init.kind=scaled_identity", "attention.interaction.init.scale=0.5")
    random = ("attention.interaction.init.kind=random",)
    orthogonal = ("attention.interaction.init.kind=random_orthogonal",)
    small = (f"attention={variant}", "model.layers=1", "model.vocab_size=64", "model.seq_len=12")
    for overrides in (random, orthogonal) if variant == "kha_gate" else (scale, random, orthogonal):
        decoder = build_decoder(compose([*small, *overrides]))
        matrices = [p for name, p in decoder.named_parameters() if ".interaction." in name and p.ndim == 2]
        first = matrices[0]
        if overrides is scale:
            assert torch.equal(first, 0.5 * torch.eye(len(first)))
        elif overrides is orthogonal:
            assert all((matrix @ matrix.T - torch.eye(len(matrix))).abs().max() < 1e-6 for matrix in matrices)
        else:
            # Vectors leave such a matrix about as large as they came.
            assert all(0.3 < matrix.square().sum(0).mean().sqrt() < 2.0 for matrix in matrices)


def test_learned_positions_are_added_to_the_embedding_and_counted():
    small = ("model.layers=1", "model.vocab_size=64", "model.seq_len=12", "attention.positions=learned")
    decoder = build_decoder(compose(small))
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    places = torch.tensor([[0, 1, 0, 1]])
    embedded = decoder.embedding(tokens, places)
    expected = decoder.embedding.weight[0] + decoder.embedding.positions[places]
    assert decoder.rotary is None and torch.equal(embedded, expected)
    assert count_parameters(compose(small)).total == sum(p.numel() for p in decoder.parameters())


def test_alibi_lowers_scores_by_slope_times_distance():
    from kha_train.model.attention.backends import eager

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, 2, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    documents = lay_out_documents(1, 5, CPU, slopes_H=torch.tensor([0.5, 0.25]))
    distance = torch.arange(5)[:, None] - torch.arange(5)
    found = eager(q, k, v, documents, 1.0)
    for head, slope in enumerate((0.5, 0.25)):
        weights = softmax(q[0, :, head] @ k[0, :, head].T - slope * distance)
        torch.testing.assert_close(found[0, :, head], weights @ v[0, :, head])


@pytest.mark.parametrize("name", ACTIVE)
def test_table_3_counts_active_parameters_as_we_do(name):
    heads, millions = ACTIVE[name]
    config = compose([*PAPER, "moe.expert_width=1152", f"attention={name.split()[0]}", *heads])
    assert round(count_parameters(config).active / 1e6) == millions


def test_the_mla_row_of_table_3_is_nearest_with_a_query_latent_of_1024():
    config = compose([*PAPER, "moe.expert_width=1152", "attention=mla", "attention.base.query_latent_width=1024"])
    active = count_parameters(config).active
    # Printed: 970. The head counts printed beside it ("4 / 8") fit no shape; this one is the nearest.
    assert active / 1e6 == pytest.approx(971.7, abs=0.1)


@pytest.mark.parametrize(("preset", "numbers"), [("mla", 576), ("gta", 576), ("mqa", 256), ("gqa", 1024)])
def test_table_3_counts_the_cache_as_we_do(preset, numbers):
    config = compose([*PAPER, f"attention={preset}", "model.query_heads=32", "model.kv_heads=4"])
    assert config.attention.base.cache_numbers() == numbers


def test_the_papers_example_costs_what_it_says():
    """L 2048, d 1024, n 32 heads of 32; MHA 8 L d^2 + 4 L^2 d, FFN of 3 d, KHA-MLP on v 6 L d^2 / n (KHA eq 10-12)."""
    length, width, heads = 2048, 1024, 32
    config = compose(
        ["attention=mha", "interaction@attention.interaction=knocking_mlp", f"model.hidden_size={width}",
         f"model.query_heads={heads}", "model.head_dim=32", f"model.seq_len={length}"]
    )  # fmt: skip
    base, options = config.attention.base, config.attention.interaction
    # The paper counts the whole square of scores, without the causal half.
    attention = base.token_flops(width) + length * base.pair_flops()
    assert attention == 8 * width**2 + 4 * length * width
    extra, feed_forward = options.flops(base.heads()), 18 * width**2
    assert extra == 6 * width**2 // heads
    assert extra / attention == pytest.approx(0.0117, abs=5e-5)
    assert extra / (attention + feed_forward) == pytest.approx(0.0055, abs=5e-5)


def test_knocking_on_the_values_of_the_6b_model_adds_what_the_layer_hardly_notices():
    plain, mlp = (flops_per_token(compose(["model=moe_6b", f"attention={name}"])) for name in ("gqa", "kha_mlp"))
    layers = plain.forward - plain.by_component["head"]
    assert (mlp.forward - plain.forward) / layers == pytest.approx(0.00275, abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gqa", "kha_mlp"])
def test_a_whole_block_with_grouped_experts_compiles_in_bf16(variant):
    config = compose([f"attention={variant}", "model.layers=1", "model.vocab_size=64", "model.seq_len=16"])
    config = replace(config, moe=replace(config.moe, backend="grouped"))
    decoder = build_decoder(config).bfloat16()
    block, rows = decoder.blocks[0], decoder._rows(2, 16, torch.arange(16).expand(2, 16), None, None, None)
    x = torch.randn(2, 16, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, _ = block(x, rows, torch.arange(2))
    found, _ = torch.compile(block, backend="aot_eager", fullgraph=True)(x, rows, torch.arange(2))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in block.attention.parameters())


@pytest.mark.parametrize("impl", ["eager", "folded"])
@pytest.mark.parametrize(
    ("variant", "factor"), [("kha_linear", 0.5), ("kha_mlp", 0.5**2), ("mea", 0.5)], ids=lambda value: str(value)
)
def test_a_scaled_identity_scales_every_diagonal_but_a_gates(variant, factor, impl):
    """KHA-MLP: 2 ((x s) sigmoid(0)) s = s^2 x, for W_up and W_down both start as s I. Linear and composition: s x.

    Seen on values alone, of which attention is linear, so that the whole layer is scaled.
    """
    scaled = ["attention.interaction.init.kind=scaled_identity", "attention.interaction.init.scale=0.5"]
    settings = [
        f"attention={variant}",
        f"attention.interaction.impl={impl}",
        "model.hidden_size=32",
        "model.head_dim=8",
    ]
    mea = ["attention.interaction.compose=[v]", "attention.interaction.head_norm=false"]
    settings += mea if variant == "mea" else ["attention.interaction.projections=[v]"]
    outputs = []
    for extra in ([], scaled):
        config = compose([*settings, *extra])
        attention = build_attention(config, resolve_on(config, CPU))
        for owner, local, _, value in initial_values(attention, 0):
            getattr(owner, local).data.copy_(value())
        outputs.append(attention.double()(X[None], rows_of(8)))
    torch.testing.assert_close(outputs[1], factor * outputs[0], rtol=1e-6, atol=0)
    starts = {name: value() for _, _, name, value in initial_values(attention, 0) if ".interaction." in f".{name}"}
    for name, start in starts.items():
        assert torch.equal(start, (0.0 if "gate" in name else 0.5) * torch.eye(len(start))), name
