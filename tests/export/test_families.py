"""Each model class of transformers computes what ours computes, with the names and layouts of its family, and back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kha_train.config.compose import compose
from kha_train.config.resolve import resolve_decoding
from kha_train.config.schema import RunConfig
from kha_train.export.families import family_of
from kha_train.export.family import plain_groups
from kha_train.export.fields import value_at
from kha_train.export.links import Part
from kha_train.foreign.typed import Source
from kha_train.model.decoder import Decoder, build_decoder

SMALL = (
    "model=tiny",
    "model.layers=2",
    "model.hidden_size=64",
    "model.head_dim=24",
    "model.vocab_size=256",
    "model.seq_len=64",
    "moe.expert_width=40",
    "moe.experts=8",
)
DENSE = "moe.dense_layers=2 moe.dense_width=72 moe.experts=0 moe.top_k=0 moe.expert_width=0"
SOFTMAX = "moe.score=softmax moe.bias_update_rate=0"
MLA = "attention=mla attention.base.latent_width=40 attention.base.rotary_dim=16"
YARN = "model.rope_scaling=yarn model.rope_factor=4 model.rope_original_seq_len=16"
CASES = {
    "sigmoid": ("glm4_moe", ""),
    "no norms, half turned, scores as they are": (
        "glm4_moe",
        (
            "attention.qk_norm=none model.partial_rotary_factor=0.5 model.norm_eps=1e-5 moe.renormalize=false "
            "moe.routed_scaling=1.3 model.tie_embeddings=false model.rope_theta=5000.0"
        ),
    ),
    "groups, shared experts, a dense layer": (
        "glm4_moe",
        (
            "attention=mqa moe.experts=16 moe.expert_groups=4 moe.top_groups=2 moe.top_k=3 moe.shared_experts=2 "
            "moe.dense_layers=1 moe.dense_width=48"
        ),
    ),
    "groups of one": ("glm4_moe", "moe.expert_groups=8 moe.top_groups=3"),
    "dense, half turned": ("glm4_moe", f"{DENSE} model.partial_rotary_factor=0.5"),
    "dense": ("qwen3", f"{DENSE} attention=mha"),
    "dense without norms": ("llama", f"{DENSE} attention.qk_norm=none"),
    "softmax": ("qwen3_moe", f"{SOFTMAX} model.tie_embeddings=false"),
    "softmax, a dense layer, scores as they are": (
        "qwen3_moe",
        f"{SOFTMAX} moe.dense_layers=1 moe.dense_width=48 moe.renormalize=false moe.routed_scaling=1.0",
    ),
    "softmax, a norm of all heads": ("olmoe", f"{SOFTMAX} attention.qk_norm=full_width model.head_dim=16"),
    "latents": ("deepseek_v3", MLA),
    "half turned, stretched by parts": (
        "glm4_moe",
        f"model.partial_rotary_factor=0.5 {YARN} model.rope_beta_fast=4 model.rope_beta_slow=0.5",
    ),
    "dense, stretched": ("llama", f"{DENSE} attention.qk_norm=none model.rope_scaling=linear model.rope_factor=2.5"),
    "latents, stretched by parts": ("deepseek_v3", f"{MLA} {YARN} model.rope_attention_factor=1.3"),
    "latents of queries": (
        "deepseek_v3",
        (
            f"{MLA} attention.base.query_latent_width=32 moe.shared_experts=1 moe.dense_layers=1 moe.dense_width=48 "
            "moe.expert_groups=2"
        ),
    ),
}


def config_of(case: str) -> RunConfig:
    return compose([*SMALL, *CASES[case][1].split()])


def trained(config: RunConfig) -> Decoder:
    """A decoder whose parameters and selection biases are no initial values."""
    decoder, generator = build_decoder(config, resolve_decoding(config)), torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        for router in decoder.routers() if config.moe.bias_update_rate else []:
            router.selection_bias.normal_(0, 0.05, generator=generator)
    return decoder.eval()


def state_of(decoder: Decoder) -> dict[str, Tensor]:
    state = decoder.state_dict()
    return {name: state[name] for name in state if name != "head.weight" or not decoder.config.model.tie_embeddings}


def part_of(state: dict[str, Tensor], part: Part) -> Tensor:
    return state[part.name] if part.at is None else state[part.name][part.at]


QUICK = ("sigmoid", "softmax", "latents")


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_transformers_loads_what_a_family_makes_of_ours_and_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = plain_groups(config_of(case))
    decoder, family = trained(config), family_of(config)
    assert family.model_type == CASES[case][0]
    state, values, host = state_of(decoder), family.config(config), {}
    for link in family.links(config, values):
        tensors = link.layout.to_host(tuple(part_of(state, part) for part in link.ours))
        host |= {name: tensor.contiguous() for name, tensor in zip(link.host, tensors, strict=True)}
    save_file(host, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(values))
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    assert type(model).__name__ == family.architecture
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        ours, theirs = decoder(tokens).logits_BTV, model(tokens).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_links_hold_every_tensor_once_and_lead_back_to_ours(case: str) -> None:
    config = plain_groups(config_of(case))
    decoder, family = trained(config), family_of(config)
    state, values = state_of(decoder), family.config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    seen: Counter[str] = Counter()
    for link in family.links(config, values):
        ours = tuple(part_of(state, part) for part in link.ours)
        host = link.layout.to_host(ours)
        assert {name: tuple(tensor.shape) for name, tensor in zip(link.host, host, strict=True)} == link.host_shapes(
            shapes
        )
        for back, own, part in zip(link.layout.to_ours(host), ours, link.ours, strict=True):
            torch.testing.assert_close(back, own, rtol=1e-6, atol=0)
            assert tuple(back.shape) == part.shape(shapes) and part.at in (None, seen[part.name])
            seen[part.name] += 1
    assert seen == {name: config.moe.experts if ".experts." in name else 1 for name in state}


@pytest.mark.parametrize("case", CASES)
def test_a_written_config_reads_back_as_the_settings_it_was_made_of(case: str) -> None:
    config = plain_groups(config_of(case))
    family = family_of(config)
    settings = family.settings(json.loads(json.dumps(family.config(config))), Source("config.json"))
    again = compose([*SMALL, *(f"{key}={json.dumps(value)}" for key, value in settings.items() if value != "")])
    for section in ("model", "moe", "attention"):
        ours, theirs = vars(value_at(config, section)), vars(value_at(again, section))
        changed = {key for key in ours if ours[key] != theirs[key]}
        allowed = {"name", "kv_heads", "routed_scaling", "bias_update_rate"} | (
            {"dense_width"} if section == "moe" else set()
        )
        assert changed <= allowed, (section, changed)
    assert family.config(again) == family.config(config)
