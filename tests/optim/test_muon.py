"""Muon against torch's own and a plain loop, on one process; which parameters it steps; what it keeps."""

from __future__ import annotations

import math

import pytest
import torch

from kha_train import build_decoder, compose, open_stream
from kha_train.config.compose import shipped
from kha_train.distributed import World
from kha_train.engine.plain import Engine
from kha_train.errors import ConfigError
from kha_train.estimate.counts import count_parameters, map_parameters
from kha_train.estimate.memory import optimizer_bytes, plan_memory
from kha_train.estimate.plan import make_plan
from kha_train.model.decoder import lay_out_decoder
from kha_train.model.init import interaction_identities, linear_maps
from kha_train.optim.contract import Part
from kha_train.optim.muon import Muon, orthogonal
from kha_train.train.step import next_batch, train_step
from kha_train.variants.optimizer import LinearMap, MuonOptions

PRESETS = sorted(path.stem for path in (shipped("configs") / "attention").glob("*.yaml"))
MODEL = ["model.layers=2", "model.vocab_size=64"]


def stepped(options: MuonOptions, start: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    """`start`, one matrix, after a step of Muon by each of `gradients`."""
    share = torch.nn.Parameter(start.flatten().clone())
    muon = Muon([{"params": [share], "weight_decay": 0.1, "name": "w"}], options)
    part, shapes = Part("w", 0, share.numel(), 0), {"w": tuple(start.shape)}
    muon.lay_out([(share, [part])], shapes, {"w": LinearMap()}, World.single())
    muon.start([share], torch.float32)
    for gradient in gradients:
        share.grad = gradient.flatten().clone()
        muon.param_groups[0]["lr"] = lr
        muon.step()
    return share.detach().view(start.shape)


@pytest.mark.parametrize("shape", [(6, 6), (5, 12), (12, 5)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torchs_muon(
    shape: tuple[int, int], nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch iterates in bf16; here it is kept from rounding, and once compared as it is."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(4)]

    def theirs() -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone())
        muon = torch.optim.Muon([weight], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
        for gradient in gradients:
            weight.grad = gradient
            muon.step()
        return weight.detach()

    ours = {
        dtype: stepped(MuonOptions(lr=0.02, nesterov=nesterov, iteration_dtype=dtype), start, gradients, 0.02)
        for dtype in ("fp32", "bf16")
    }
    moved = (ours["fp32"] - start).norm()
    assert (ours["bf16"] - theirs()).norm() < 2e-2 * moved
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    assert (ours["fp32"] - theirs()).norm() < 1e-5 * moved
    assert 1e-4 * moved < (ours["bf16"] - ours["fp32"]).norm(), "the dtype of the iteration has no effect"


def test_an_orthogonal_update_has_singular_values_near_one_and_the_singular_vectors_of_its_matrix() -> None:
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(3, 16, 40).double(), full_matrices=False)
    made = orthogonal((u * torch.linspace(1, 0.05, 16)) @ v, 5)
    core = u.mT @ made @ v.mT
    values = core.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65 and values.max() < 1.25
    assert (core - torch.diag_embed(values)).abs().max() < 1e-10


def test_a_matrix_without_a_gradient_stays_and_one_of_noise_moves_less() -> None:
    assert not orthogonal(torch.zeros(1, 4, 4), 5).any()
    assert orthogonal(torch.full((1, 4, 4), 1e-12), 5).norm() < 0.1


@pytest.mark.parametrize("attention", PRESETS)
def test_it_steps_the_maps_of_layers_and_counts_them_without_torch(attention: str) -> None:
    config = compose(
        [*MODEL, f"attention={attention}", "moe.shared_experts=1", "moe.dense_layers=1", "moe.dense_width=32"]
    )
    decoder = lay_out_decoder(config)
    named, maps = dict(decoder.named_parameters()), linear_maps(decoder)
    assert maps.keys() <= named.keys() and not maps.keys() & interaction_identities(decoder).keys()
    others = {name.split(".")[-2] for name, value in named.items() if name not in maps and value.ndim > 1}
    mixes = {name.split(".")[-2] for name in interaction_identities(decoder)}
    assert others == {"embedding", "router"} | mixes
    assert sum(named[name].numel() for name in maps) == map_parameters(config)
    for name, shape in maps.items():
        assert not shape.sizes or sum(shape.sizes) == named[name].shape[shape.along], name
    assert {name.split(".")[-1 if "experts" in name else -2] for name, shape in maps.items() if shape.sizes} == {
        "gate_up"
    }


def test_groups_keep_their_names_and_hold_maps_or_others() -> None:
    decoder = build_decoder(compose([*MODEL, "attention=kha_mlp"]))
    named, apart, maps = list(decoder.named_parameters()), interaction_identities(decoder), linear_maps(decoder)
    groups = Muon.group(named, MuonOptions(lr=1.0), apart, {}, maps)
    assert [group["name"] for group in groups] == ["outside layers", "vectors", *["blocks.0"] * 2, *["blocks.1"] * 2]
    names = {id(parameter): name for name, parameter in named}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())
    assert all(len({names[id(p)] in maps for p in group["params"]}) == 1 for group in groups)
    separate = Muon.group(named, MuonOptions(lr=1.0, interaction_decay="identity"), apart, {}, maps)
    assert [group.get("identity_decay") for group in separate].count(0.1) == 2


def test_a_run_is_that_of_a_plain_loop_matrix_by_matrix(small: list[str]) -> None:
    """Norm, clipping, momentum, iteration, each expert and each of gate and up by itself; torch's AdamW else."""
    config = compose([*small, "attention=kha_mlp", "optim=muon", "optim.lr=3e-3", "optim.grad_clip=0.5",
                      "engine.micro_batch_size=2", "moe.shared_experts=1", "moe.dense_layers=1",
                      "moe.dense_width=24", "model.layers=2"])  # fmt: skip
    engine, stream, steps = Engine(config, World.single()), open_stream(config), 4
    start = {f.name: f.views["master"].double() for f in engine.fragments()}
    assert sum(view.nbytes for f in engine.fragments() for view in f.views.values()) == optimizer_bytes(config)
    results = [train_step(engine, *next_batch(stream, World.single()), config.optim.lr) for _ in range(steps)]
    assert all(result.grad_norm > 0.5 for result in results), "nothing is clipped"

    decoder, momenta = build_decoder(config), {}
    named = dict(decoder.named_parameters())
    hidden = {name for name in named if any(part in name for part in (
        "query.weight", "key.weight", "value.weight", "output.weight", "gate_up", "experts.down", "feed_forward.down",
        "shared.down"))}  # fmt: skip
    rest = [value for name, value in named.items() if name not in hidden]
    groups = [{"params": [value for value in rest if (value.ndim > 1) == decays], "weight_decay": 0.1 * decays}
              for decays in (True, False)]  # fmt: skip
    adamw = torch.optim.AdamW(groups, lr=config.optim.lr, betas=(0.9, 0.95), eps=1e-8)
    for batch, result in zip(open_stream(config), results, strict=False):
        output = decoder(batch.tokens_BT, batch.labels_BT, batch.positions_BT, batch.cu_seqlens_S, batch.max_seqlen)
        adamw.zero_grad()
        decoder.zero_grad()
        (output.loss_sum / batch.label_count).backward()
        assert float(output.loss_sum / batch.label_count) == pytest.approx(result.loss, abs=2e-6)
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 0.5)
        assert float(norm) == pytest.approx(result.grad_norm, rel=1e-5)
        with torch.no_grad():
            for name in hidden:
                by_hand(name, named[name], momenta, config.optim.lr)
        adamw.step()
        decoder.finish_step(output.load_LE)
    for fragment in engine.fragments():
        wanted = named[fragment.name].detach().flatten().double()
        moved = (wanted - start[fragment.name]).norm()
        assert (fragment.views["master"].double() - wanted).norm() < 1e-5 * moved, fragment.name
    engine.close()


def by_hand(name: str, weight: torch.Tensor, momenta: dict[str, torch.Tensor], lr: float) -> None:
    """A step of Muon in fp64, one 2-D matrix after another, with momentum as Jordan's first version has it."""
    gradient = weight.grad.double()
    momentum = momenta.setdefault(name, torch.zeros_like(gradient))
    momentum.mul_(0.95).add_(gradient)
    update = gradient + 0.95 * momentum
    weight.mul_(1 - lr * 0.1)
    for matrix, target in zip(update.view(-1, *weight.shape[-2:]), weight.view(-1, *weight.shape[-2:]), strict=True):
        dim = 1 if "experts" in name else 0
        halves = 2 if "gate_up" in name else 1
        for part, place in zip(matrix.chunk(halves, dim), target.chunk(halves, dim), strict=True):
            x = part / part.norm()
            for _ in range(5):
                gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
                poly = -4.7750 * gram + 2.0315 * gram @ gram
                x = 3.4445 * x + (poly @ x if x.shape[0] <= x.shape[1] else x @ poly)
            place.sub_(lr * 0.2 * math.sqrt(max(part.shape)) * x)


def test_memory_and_checkpoints_are_planned_for_one_state_of_maps_and_two_of_others() -> None:
    config = compose(["model=tiny", "optim=muon", "cluster.devices=2", "engine.zero_stage=1"])
    total, maps = count_parameters(config).total, map_parameters(config)
    assert optimizer_bytes(config) == 12 * (total - maps) + 8 * maps
    assert optimizer_bytes(config, "bf16") == 8 * (total - maps) + 6 * maps
    plan = make_plan(config)
    assert plan.checkpoint["bytes"] == optimizer_bytes(config)
    assert plan_memory(config).terms["optimizer"] == optimizer_bytes(config) // 2
    recipe = plan.to_dict()["memory_per_rank"]["recipes"][0]
    assert recipe["bytes_per_parameter"] == pytest.approx(8 + optimizer_bytes(config) / total)


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("optim.momentum=1.0", "optim.momentum"),
        ("optim.momentum=-0.1", "optim.momentum"),
        ("optim.betas=[0.9,1.0]", "optim.betas"),
        ("optim.iterations=0", "optim.iterations"),
        ("optim.iteration_dtype=fp16", "optim.iteration_dtype"),
    ],
)
def test_its_options_are_checked(setting: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["optim=muon", setting])
    assert caught.value.field.startswith(field)
