"""The adapter of transformers for `kha bench step` and `kha bench moe`: its Qwen3-MoE of the same shape.

The peer gets every advantage it can be given without changing it: torch's fused attention, the fastest of its expert
implementations by measurement, a plain fused AdamW without any engine around it, and the loss over the same labels.
"""

# B rows of a micro-batch   T tokens of a row   N tokens   D model width   F expert width   E experts   X = 2F
# J experts per token

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from kha_train.bench.moe import leaf
from kha_train.bench.peers import Contender, Implementation, Problem
from kha_train.bench.protocol import interleave, timing
from kha_train.config.schema import RunConfig
from kha_train.data.rows.batch import Batch
from kha_train.errors import ConfigError
from kha_train.model.host import to_device
from kha_train.optim import parameter_groups
from kha_train.variants.bases import GroupedQueryOptions
from kha_train.variants.optimizer import AdamWOptions

EXPERTS = ("grouped_mm", "eager", "batched_mm")
GATHERED_LIMIT = 2**30
"""Bytes of expert weights that `batched_mm` may copy out, one copy for every routed token, before it is left out."""


class Peer:
    """Qwen3-MoE under plain torch: forward and backward of every micro-batch, clipping, AdamW.

    On CUDA weights are bf16 with fp32 masters and moments, as ours; on a CPU all is fp32.
    """

    def __init__(self, config: RunConfig, device: torch.device, dtype: torch.dtype, experts: str) -> None:
        self.config, self.device, self.experts = config, device, experts
        self.model = _build(config, experts).to(device, dtype)
        self.model.train()
        self.parameters = list(self.model.parameters())
        self.masters = self.parameters
        if dtype != torch.float32:
            self.masters = [nn.Parameter(parameter.detach().float()) for parameter in self.parameters]
        names = [name for name, _ in self.model.named_parameters()]
        groups = parameter_groups(zip(names, self.masters, strict=True), config.optim.weight_decay)
        optim = config.optim
        assert isinstance(optim, AdamWOptions), "see `check`"
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)

    def step(self, batch: Batch) -> float:
        """One optimiser step; the mean loss of the batch, the one number that comes back to the host."""
        total = torch.zeros((), device=self.device)
        for micro_batch in batch.micro_batches(self.config.engine.micro_batch_size):
            labels_BT = to_device(micro_batch.labels_BT, self.device)
            loss = self.model(
                input_ids=to_device(micro_batch.tokens_BT, self.device),
                position_ids=to_device(micro_batch.positions_BT, self.device),
                labels=labels_BT,
                shift_labels=labels_BT,
                num_items_in_batch=batch.label_count,
                use_cache=False,
            ).loss
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        mean = total.item()  # before the update, as our gate: the host does not wait for AdamW
        self._update()
        return mean

    def _update(self) -> None:
        if self.masters is not self.parameters:
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                assert parameter.grad is not None
                master.grad, parameter.grad = parameter.grad.float(), None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.masters is not self.parameters:
            with torch.no_grad():
                torch._foreach_copy_(tuple(self.parameters), tuple(self.masters))


def fastest(config: RunConfig, batch: Batch, device: torch.device, dtype: torch.dtype) -> tuple[Peer, dict[str, Any]]:
    """The peer with the fastest of its expert implementations, and the seconds of each (or why it was left out).

    Raises ConfigError when transformers is not installed, has no model of this shape, or none that fits the device.
    """
    check(config)
    tried: dict[str, Any] = {}
    peers: dict[str, Peer] = {}
    for experts in EXPERTS:
        gathered = gathered_bytes(config, dtype)
        if experts == "batched_mm" and gathered > GATHERED_LIMIT:
            tried[experts] = f"left out: would copy {gathered / 2**30:.1f} GiB of weights a layer"
            continue
        peers = {name: peer for name, peer in peers.items() if tried[name] == min(tried[n] for n in peers)}
        try:
            peer = Peer(config, device, dtype, experts)
            seconds = interleave({experts: partial(peer.step, batch)}, blocks=3, warmup=1, device=device)
        except torch.OutOfMemoryError:
            tried[experts] = "left out: the device's memory is not enough"
            continue
        tried[experts] = timing(seconds[experts]).seconds
        peers[experts] = peer
    if not peers:
        raise ConfigError("no implementation of its experts fits", field="--against", value=tried, fix="fewer layers")
    best = min(peers, key=lambda name: tried[name])
    return peers[best], tried


def check(config: RunConfig) -> None:
    """Raises ConfigError when transformers is not installed, its Qwen3-MoE has no such shape, or the run steps with
    something else than AdamW."""
    if find_spec("transformers") is None:
        raise ConfigError("is not installed", field="--against", value="transformers", fix="pip install transformers")
    if (
        not isinstance(config.attention.base, GroupedQueryOptions)
        or config.moe.shared_experts
        or config.moe.dense_layers
    ):
        raise ConfigError(
            "Qwen3-MoE has grouped-query attention, and experts in every layer, none of them shared",
            field="--against",
            value="transformers",
            fix="model=small, tiny, moe_6b or qwen3_30b",
        )
    if not isinstance(config.optim, AdamWOptions):
        problem = "is compared with AdamW alone"
        raise ConfigError(problem, field="optim.name", value=config.optim.name, allowed="adamw")


def experts(config: RunConfig, dtype: torch.dtype) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Its expert implementations by name, and why others were left out."""
    left_out = {}
    gathered = gathered_bytes(config, dtype)
    if gathered > GATHERED_LIMIT:
        left_out["batched_mm"] = f"would copy {gathered / 2**30:.1f} GiB of weights"
    return {kind: partial(layer_experts, config, kind) for kind in EXPERTS if kind not in left_out}, left_out


def layer_experts(config: RunConfig, kind: str, problem: Problem) -> Contender:
    """The experts of transformers' Qwen3-MoE by its implementation `kind`, on matrices in its own layout."""
    moe, library = config.moe, import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    shape = import_module("transformers").Qwen3MoeConfig(
        hidden_size=config.model.hidden_size,
        moe_intermediate_size=moe.expert_width,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        experts_implementation=kind,
    )
    with torch.device("meta"):
        experts = library.Qwen3MoeExperts(shape)
    x_ND, gate_up_EDX, down_EFD, weight_NJ = problem.leaves
    experts.gate_up_proj = nn.Parameter(leaf(gate_up_EDX.transpose(1, 2)))
    experts.down_proj = nn.Parameter(leaf(down_EFD.transpose(1, 2)))

    def forward() -> Tensor:
        out_ND: Tensor = experts(x_ND, problem.routing.expert_NJ, weight_NJ.to(x_ND.dtype))
        return out_ND

    return Contender(forward, (x_ND, experts.gate_up_proj, experts.down_proj, weight_NJ))


def _build(config: RunConfig, experts: str) -> nn.Module:
    transformers = import_module("transformers")
    transformers.logging.set_verbosity_error()
    model, moe = config.model, config.moe
    base = config.attention.base
    assert isinstance(base, GroupedQueryOptions), "`check` was asked"
    shape = transformers.Qwen3MoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.layers,
        num_attention_heads=base.query_heads,
        num_key_value_heads=base.kv_heads,
        head_dim=base.head_dim,
        intermediate_size=moe.expert_width,
        moe_intermediate_size=moe.expert_width,
        num_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=moe.renormalize,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=model.seq_len,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=model.init_std,
        attn_implementation="sdpa",
        experts_implementation=experts,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.run.seed)
        built: nn.Module = transformers.Qwen3MoeForCausalLM(shape)
        return built


def gathered_bytes(config: RunConfig, dtype: torch.dtype) -> int:
    """What `batched_mm` copies in one layer: the first expert matrix, once for every routed token."""
    tokens = config.engine.micro_batch_size * config.model.seq_len
    return tokens * config.moe.top_k * 2 * config.moe.expert_width * config.model.hidden_size * dtype.itemsize
