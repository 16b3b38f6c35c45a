"""Initial values are a pure function of seed, name and shape."""

import hashlib
import math

import pytest
import torch
from torch import nn

from kha_train.model.decoder import build_decoder
from kha_train.model.init import Orthogonal, initial_value, initial_values, initialise, reset_buffers

VARIANTS = ("gqa", "kha_linear", "kha_mlp", "kha_mlp_qkv")


def fingerprints(decoder):
    return {
        name: hashlib.sha256(value.detach().cpu().numpy().tobytes()).hexdigest()
        for name, value in decoder.state_dict().items()
    }


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_shared_parameters_start_bit_equal_in_every_variant(variant, make_config):
    baseline, other = fingerprints(build_decoder(make_config())), fingerprints(build_decoder(make_config(variant)))
    assert baseline == {name: other[name] for name in baseline}
    assert all(".interaction." in name for name in other.keys() - baseline.keys())


def test_values_ignore_the_global_generator_and_the_order_of_drawing(make_config):
    torch.manual_seed(1)
    built = build_decoder(make_config("kha_mlp"))
    torch.manual_seed(2)
    thunks = {name: value for _, _, name, value in initial_values(built, 7)}
    for name in sorted(thunks, reverse=True):
        assert torch.equal(thunks[name](), built.get_parameter(name)), name


def test_another_seed_or_name_gives_other_values(make_config):
    first = build_decoder(make_config())
    second = build_decoder(make_config(run={"seed": 8}))
    query = "blocks.{}.attention.query.weight"
    assert not torch.equal(first.get_parameter(query.format(0)), second.get_parameter(query.format(0)))
    assert not torch.equal(first.get_parameter(query.format(0)), first.get_parameter(query.format(1)))


def test_a_deeper_model_starts_with_the_same_first_layers_unless_the_residual_is_scaled(make_config):
    shallow = build_decoder(make_config(model={"layers": 1, "scale_residual_init": False}))
    deep = build_decoder(make_config(model={"layers": 3, "scale_residual_init": False}))
    for name, parameter in shallow.named_parameters():
        assert torch.equal(parameter, deep.get_parameter(name)), name


@pytest.mark.parametrize("scaled", [True, False])
def test_residual_writers_are_scaled_by_depth(scaled, make_config):
    decoder = build_decoder(make_config(model={"layers": 4, "scale_residual_init": scaled, "init_std": 0.1}))
    expected = {"query": 0.1, "output": 0.1 / math.sqrt(8) if scaled else 0.1}
    attention, experts = decoder.blocks[3].attention, decoder.blocks[3].feed_forward.experts
    assert attention.query.weight.std().item() == pytest.approx(expected["query"], rel=0.05)
    assert attention.output.weight.std().item() == pytest.approx(expected["output"], rel=0.05)
    assert experts.gate_up.std().item() == pytest.approx(expected["query"], rel=0.05)
    assert experts.down.std().item() == pytest.approx(expected["output"], rel=0.05)


def test_norms_start_at_one_and_knocking_matrices_as_the_paper_says(make_config):
    decoder = build_decoder(make_config("kha_mlp"))
    mlp = decoder.blocks[0].attention.interaction.maps["v"]
    identity = torch.eye(32)
    assert torch.equal(mlp.up.weight, identity) and torch.equal(mlp.down.weight, identity)
    assert not mlp.gate.weight.any()
    assert all((p == 1).all() for name, p in decoder.named_parameters() if "norm" in name)


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_walked_once(tied, make_config):
    decoder = build_decoder(make_config("kha_linear", model={"tie_embeddings": tied}))
    walked = [(getattr(owner, local), name) for owner, local, name, _ in initial_values(decoder, 7)]
    assert [name for _, name in walked] == [name for name, _ in decoder.named_parameters()]
    assert {id(parameter) for parameter, _ in walked} == {id(parameter) for parameter in decoder.parameters()}
    assert (decoder.head.weight is decoder.embedding.weight) == tied


def test_building_on_meta_allocates_nothing(make_6b_config):
    with torch.device("meta"):
        decoder = build_decoder(make_6b_config("kha_mlp"))
    assert all(t.is_meta for t in [*decoder.parameters(), *decoder.buffers()])


def test_materialising_parameter_by_parameter_from_meta_equals_building(make_config):
    config = make_config("kha_mlp")
    with torch.device("meta"):
        decoder = build_decoder(config)
    for owner, local, _, value in list(initial_values(decoder, config.run.seed)):
        owner.register_parameter(local, nn.Parameter(value()))
    decoder.tie_weights()
    reset_buffers(decoder)
    assert decoder.head.weight is decoder.embedding.weight
    assert fingerprints(decoder) == fingerprints(build_decoder(config))
    tokens = torch.arange(64).view(1, 64)
    assert torch.equal(decoder(tokens).logits_BTV, build_decoder(config)(tokens).logits_BTV)


def test_filling_an_emptied_decoder_equals_building(make_config):
    config = make_config()
    with torch.device("meta"):
        decoder = build_decoder(config)
    decoder.to_empty(device="cpu")
    decoder.tie_weights()
    initialise(decoder, config.run.seed)
    assert fingerprints(decoder) == fingerprints(build_decoder(config))


def test_selection_biases_and_rotary_tables_survive_a_cast_to_bf16_bit_for_bit(make_config):
    decoder = build_decoder(make_config())
    decoder.blocks[0].feed_forward.router.selection_bias.fill_(1.0 + 2.0**-20)
    before = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    decoder.to(torch.bfloat16)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    for name, buffer in decoder.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("shape", [(128, 128), (3, 16, 16), (2, 8), (8, 2)])
def test_a_random_orthogonal_matrix_is_orthogonal_and_follows_from_seed_name_and_shape(shape):
    value = initial_value(Orthogonal(), 3, "a.weight", shape)
    wide = value.double().mT if shape[-2] < shape[-1] else value.double()
    torch.testing.assert_close(
        wide.mT @ wide, torch.eye(min(shape[-2:]), dtype=torch.float64).expand(*shape[:-2], -1, -1), rtol=0, atol=1e-6
    )
    assert value.dtype == torch.float32 and torch.equal(value, initial_value(Orthogonal(), 3, "a.weight", shape))
    assert torch.equal(initial_value(Orthogonal(0.5), 3, "a.weight", shape), 0.5 * value)
    for other in (initial_value(Orthogonal(), 4, "a.weight", shape), initial_value(Orthogonal(), 3, "b.weight", shape)):
        assert (other - value).abs().max() > 0.1
    assert len(shape) == 2 or (value[0] - value[1]).abs().max() > 0.1, "every matrix is drawn by itself"


def test_random_orthogonal_matrices_are_uniform_over_all_of_them():
    """Haar measure on O(3): E Q = 0, E Q_ij^2 = 1/3, E (tr Q)^2 = 1, half of all are rotations. Without the signs of R
    all are rotations, and E (tr Q)^2 is 0.5.
    """
    draws = initial_value(Orthogonal(), 0, "a.weight", (4000, 3, 3)).double()
    trace = draws.diagonal(dim1=1, dim2=2).sum(-1)
    assert draws.mean(0).abs().max() < 0.04
    assert (draws.square().mean(0) - 1 / 3).abs().max() < 0.02
    assert trace.square().mean().item() == pytest.approx(1.0, abs=0.06)
    assert (torch.linalg.det(draws) > 0).double().mean().item() == pytest.approx(0.5, abs=0.03)
