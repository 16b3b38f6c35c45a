"""Two ZeRO 3 steps of a model with heads beside two steps of plain PyTorch; answers losses and inserted parameters."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers

from kha_train.heads import HeadsError, fold, insert, save

torch.set_num_threads(1)
RATE = 1e-2
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


def build(interaction: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    return insert(transformers.Qwen3ForCausalLM(config), interaction)


def plain_steps(interaction: str) -> dict[str, Any]:
    model = build(interaction)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for _ in range(2):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"losses": losses, "heads": heads(model)}


def zero3_steps(interaction: str) -> dict[str, Any]:
    """Every parameter is partitioned, so one that another module used would be empty."""
    model = build(interaction)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=SETTINGS)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "a parameter is kept whole"
    losses = []
    for _ in range(2):
        loss = engine(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    answer = {"losses": losses, "refused": [refused(fold, model), refused(save, model, "nowhere")]}
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        answer["heads"] = heads(model)
    return answer


def refused(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except HeadsError as error:
        return str(error)
    return "not refused"


def heads(model: torch.nn.Module) -> dict[str, Any]:
    return {name: value.tolist() for name, value in model.named_parameters() if ".kha." in name}


if __name__ == "__main__":
    deepspeed.init_distributed("gloo", verbose=False)
    answers = {}
    for name in json.loads(sys.argv[1])["interactions"]:
        answers[name] = {"plain": plain_steps(name), "zero3": zero3_steps(name)}
    torch.distributed.destroy_process_group()
    Path(sys.argv[2]).write_text(json.dumps(answers))
