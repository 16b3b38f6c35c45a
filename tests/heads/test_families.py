"""Random small models of transformers: bit-equal at insertion, trained, folded back, generating, saved and loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from kha_train.heads import HeadsError, fold, insert, load, save

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")]

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "head_dim": 4,
}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True},
    "Qwen3": {},
    "Qwen3Moe": EXPERTS | {"num_experts": 4},
    "Glm4Moe": EXPERTS | GROUPS | {"attention_bias": True, "use_qk_norm": True},
    "Olmo2": {},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5},
    "Phi3": {},
    "DeepseekV3": EXPERTS | GROUPS | LATENT,
}
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=MODELS)
def stock(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    # With weights of this size attention shows in the logits.
    config = getattr(transformers, f"{request.param}Config")(**SHAPE | MODELS[request.param], initializer_range=0.2)
    return getattr(transformers, f"{request.param}ForCausalLM")(config).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def changed(stock: torch.nn.Module, interaction: str, **options: Any) -> torch.nn.Module:
    """A copy with heads; latent attention, which refuses what is not linear, has KHA-Linear in place of KHA-MLP."""
    latent = "Deepseek" in type(stock).__name__ and interaction == "kha_mlp"
    return insert(copy.deepcopy(stock), "kha_linear" if latent else interaction, **options)


@pytest.mark.parametrize(
    "interaction, options",
    [("kha_mlp", {}), ("kha_mlp", {"projections": ("q", "k", "v")}), ("kha_linear", {}), ("mea", {"head_norm": False})],
)
def test_an_insertion_changes_no_bit_of_the_logits(interaction: str, options: dict[str, Any], stock) -> None:
    model = changed(stock, interaction, **options)
    assert torch.equal(logits(model), logits(stock))
    assert [name for name in model.state_dict() if ".kha." not in name] == list(stock.state_dict())


@pytest.mark.parametrize("interaction", ["kha_linear", "mea"])
def test_a_trained_linear_interaction_folds_back(interaction: str, stock, moved) -> None:
    model = moved(changed(stock, interaction, **({"head_norm": False} if interaction == "mea" else {})))
    expected = logits(model)
    assert (expected - logits(stock)).abs().max() > 0.01
    assert list(fold(model).state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interaction", ["kha_mlp", "mea", "gated"])
def test_generation_with_a_cache_is_that_without(interaction: str, stock, moved) -> None:
    """Token by token: the logits of the last token with everything before it cached, and of the whole text."""
    model, cache = moved(changed(stock, interaction)), None
    whole = logits(model)
    for place in range(IDS.shape[1]):
        with torch.no_grad():
            step = model(input_ids=IDS[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.logits[:, 0], whole[:, place], rtol=1e-4, atol=1e-5)
    generate = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **generate), model.generate(IDS, use_cache=False, **generate))


@pytest.mark.parametrize("interaction", ["kha_mlp", "mea", "gated"])
def test_two_steps_train_every_inserted_parameter_and_a_reload_has_them(interaction: str, stock, tmp_path) -> None:
    model = changed(stock, interaction).train()
    model.gradient_checkpointing_enable()
    fresh = {name: value.clone() for name, value in model.named_parameters() if ".kha." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    trained = dict(model.named_parameters())
    assert all(not torch.equal(trained[name], value) for name, value in fresh.items())
    save(model, tmp_path)
    plain = copy.deepcopy(stock)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".kha." not in name})
    assert torch.equal(logits(load(plain, tmp_path)), logits(model.eval()))


def test_fused_projections_are_changed_by_slices(moved) -> None:
    """Phi-3 is Llama with one projection [q | k | v]: the same weights give the same function."""
    models = {}
    for name in ("Llama", "Phi3"):
        config = getattr(transformers, f"{name}Config")(**SHAPE, rms_norm_eps=1e-6)
        models[name] = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    state = models["Llama"].state_dict()
    for layer in range(2):
        attention, mlp = (f"model.layers.{layer}.{part}." for part in ("self_attn", "mlp"))
        for fused, parts in ((attention + "qkv", "qkv"), (mlp + "gate_up", ("gate", "up"))):
            names = [f"{fused.rpartition('.')[0]}.{part}_proj.weight" for part in parts]
            state[f"{fused}_proj.weight"] = torch.cat([state.pop(name) for name in names])
    models["Phi3"].load_state_dict(state)
    for model in models.values():
        moved(insert(model, "kha_mlp", projections=("q", "k", "v")))
    torch.testing.assert_close(logits(models["Phi3"]), logits(models["Llama"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("interaction", ["kha_mlp", "kha_gate"])
def test_latent_attention_refuses_what_its_decoding_could_not_absorb(interaction: str) -> None:
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**SHAPE | MODELS["DeepseekV3"]))
    with pytest.raises(HeadsError, match=r"model\.layers\.0\.self_attn: latent .* \(KHA 4.2.3\); insert kha_linear"):
        insert(model, interaction)
