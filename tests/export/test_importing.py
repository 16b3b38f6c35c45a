"""Stock models of transformers become runs of ours that compute their logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kha_train.checkpoint.reader import find_newest, verify
from kha_train.config.compose import compose, load
from kha_train.data.stream import open_stream
from kha_train.decode.generate import materialise
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.export.importing import prepare
from kha_train.model.decoder import Decoder
from kha_train.record import read_metrics
from kha_train.train.run import train

WORKER = Path(__file__).with_name("memory_worker.py")
PART = 32 * 2**20
CPU = torch.device("cpu")
TOKENS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(5))
NO_LATENT = {"q_lora_rank": None}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe, tied, whole heads turned, no norm": (
        "glm4_moe",
        {
            "tie_word_embeddings": True,
            "use_qk_norm": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
        },
    ),
    "glm4_moe, experts alone, scores as they are": (
        "glm4_moe",
        {"n_shared_experts": 0, "first_k_dense_replace": 0, "n_group": 1, "norm_topk_prob": False},
    ),
    "glm4_moe, two shared experts, all groups": ("glm4_moe", {"n_shared_experts": 2, "topk_group": 2}),
    "glm4_moe, dense": ("glm4_moe", {"first_k_dense_replace": 2}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, tied, dense first, scores normalised": (
        "qwen3_moe",
        {"tie_word_embeddings": True, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "olmoe": ("olmoe", {}),
    "olmoe, scores normalised": ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3, queries without a latent, halves": ("deepseek_v3", {**NO_LATENT, "rope_interleave": False}),
    "deepseek_v3, queries without a latent, pairs": ("deepseek_v3", NO_LATENT),
    "qwen3": ("qwen3", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama": ("llama", {}),
    "llama, stretched by parts": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
            }
            | {"original_max_position_embeddings": 32, "beta_fast": 8.0}
        },
    ),
    "qwen3_moe, stretched": (
        "qwen3_moe",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama, tied, wide heads": ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
}
"""Name -> a class, and how the model differs from the small one of that class."""


def decoder_of(run: Path) -> Decoder:
    """The decoder that a run holds."""
    checkpoint = find_newest(run, World.single(), print)
    assert checkpoint is not None
    return materialise(load(run / "config.yaml"), checkpoint, CPU).eval()


@torch.no_grad()
def logits(decoder: Decoder) -> torch.Tensor:
    """What it makes of `TOKENS`."""
    return decoder(TOKENS).logits_BTV


def cross_entropy(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> float:
    """The mean over all labels, by torch alone."""
    return float(torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", OPTIONS)
def test_an_imported_model_computes_the_logits_of_transformers(
    name: str, save_model: Callable[..., Any], tmp_path: Path
) -> None:
    kind, changes = OPTIONS[name]
    model = save_model(kind, tmp_path / "stock", **changes)
    run = tmp_path / "run"
    imported = prepare(tmp_path / "stock", run).write(run)
    verify(imported.checkpoint)
    with torch.no_grad():
        torch.testing.assert_close(logits(decoder_of(run)), model(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert imported.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.slow
def test_a_layer_that_predicts_further_tokens_is_left_out_and_told(
    save_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = save_model("deepseek_v3", tmp_path / "stock")
    file = tmp_path / "stock" / "model.safetensors"
    further = {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "model.layers.2.enorm.weight": torch.ones(64)}
    save_file(load_file(file) | further, file)
    imported = prepare(tmp_path / "stock", tmp_path / "run").write(tmp_path / "run")
    assert imported.left_out == ("2 tensors of layers that predict further tokens",)
    with torch.no_grad():
        torch.testing.assert_close(logits(decoder_of(tmp_path / "run")), model(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits_in_several_files_become_masters_of_the_same_values(
    dtype: torch.dtype, save_model: Callable[..., Any], tmp_path: Path
) -> None:
    model = save_model("glm4_moe", tmp_path / "stock", dtype, shard="100KB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 2
    run = tmp_path / "run"
    # Small parts, so that parameters are spread over files of ours too.
    written = prepare(tmp_path / "stock", run).write(run, part_bytes=10_000)
    assert len(list(written.checkpoint.glob("model-*"))) > 10
    again = type(model).from_pretrained(tmp_path / "stock", dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(logits(decoder_of(run)), again(TOKENS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "interaction"),
    [
        ("glm4_moe", "attention=kha_mlp"),
        ("olmoe", "attention=kha_mlp"),
        ("llama", "interaction@attention.interaction=knocking_mlp"),
        ("qwen3", "attention=kha_gate"),
        ("deepseek_v3", "interaction@attention.interaction=knocking_linear"),
    ],
)
def test_an_interaction_changes_no_bit_of_an_imported_model(
    kind: str, interaction: str, save_model: Callable[..., Any], tmp_path: Path
) -> None:
    save_model(kind, tmp_path / "stock")
    found = []
    for name, overrides in (("plain", []), ("knocking", [interaction])):
        prepare(tmp_path / "stock", tmp_path / name, overrides).write(tmp_path / name)
        found.append(decoder_of(tmp_path / name))
    plain, knocking = found
    assert sum(p.numel() for p in knocking.parameters()) > sum(p.numel() for p in plain.parameters())
    assert torch.equal(logits(plain), logits(knocking))


@pytest.mark.slow
def test_an_interaction_that_would_change_the_model_is_refused(save_model: Callable[..., Any], tmp_path: Path) -> None:
    save_model("qwen3", tmp_path / "stock")
    random = ["attention=kha_linear", "attention.interaction.init.kind=random"]
    with pytest.raises(ConfigError, match=r"does not begin as the identity.*run\.init_from"):
        prepare(tmp_path / "stock", tmp_path / "run", random)
    for given in ("model.kv_heads=4", "attention=gta", "moe.routed_scaling=1.0", "attention.positions=alibi"):
        with pytest.raises(ConfigError, match="is given by the model"):
            prepare(tmp_path / "stock", tmp_path / "run", [given])


@pytest.mark.slow
def test_training_goes_on_from_an_imported_model_under_zero_1_and_3(
    save_model: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    model = save_model("qwen3_moe", tmp_path / "stock")
    base = tmp_path / "base"
    imported = prepare(tmp_path / "stock", base).write(base)
    data = [one for one in small if one.startswith(("data.", "validation.", "telemetry."))]
    data += ["data.isolate_documents=false", "data.global_batch_size=4", "engine.micro_batch_size=4", "run.steps=1"]
    common = [*imported.settings, *data, f"run.init_from={base}", "model.seq_len=64", "engine.precision=fp32"]
    batch = next(open_stream(compose(common)))
    with torch.no_grad():
        expected = cross_entropy(model(batch.tokens_BT).logits, batch.labels_BT)
    losses = {}
    for name, overrides in {
        "plain": ["engine=zero1"],
        "zero1": ["attention=kha_mlp", "engine=zero1"],
        "zero3": ["attention=kha_mlp", "engine=zero3"],
    }.items():
        settings = [one for one in common if one != "attention=gqa"] if name != "plain" else common
        train(compose([*settings, *overrides, f"run.dir={tmp_path / name}"]))
        (line,) = read_metrics(tmp_path / name)
        assert line["train/grad_norm"] > 0
        losses[name] = line["train/loss"]
    assert losses["plain"] == losses["zero1"] == pytest.approx(losses["zero3"], rel=1e-6)
    assert losses["plain"] == pytest.approx(expected, rel=1e-5)
    before, after = (find_newest(tmp_path / name, World.single(), print) for name in ("base", "zero1"))
    assert not torch.equal(before.read("norm.weight", "master"), after.read("norm.weight", "master"))


@pytest.mark.slow
def test_an_import_holds_a_part_and_no_more_of_a_model(tmp_path: Path, clean_environment: dict[str, str]) -> None:
    stock = tmp_path / "stock"
    stock.mkdir()
    width, rows = 1024, 40_000
    shapes = {
        "model.embed_tokens.weight": (rows, width),
        "lm_head.weight": (rows, width),
        "model.norm.weight": (width,),
    }
    layer = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "mlp.gate_proj": (64, width),
        "mlp.up_proj": (64, width), "mlp.down_proj": (width, 64),
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
    }  # fmt: skip
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, stock / "model.safetensors"
    )
    values = {
        "model_type": "llama", "vocab_size": rows, "hidden_size": width, "num_hidden_layers": 1,
        "num_attention_heads": 8, "intermediate_size": 64,
    }  # fmt: skip
    (stock / "config.json").write_text(json.dumps(values))
    command = [sys.executable, str(WORKER), str(stock), str(tmp_path / "run"), str(PART)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True, env=clean_environment).stdout)
    # A part waits while the next tensor is read. Rows are read in pieces, and no tensor that is read whole is large.
    written = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert written > 320 * 2**20
    assert grown < (2 * PART) / 2**20
