"""Expert parallelism as DeepSpeed expects it: marks on the parameters that only some ranks hold, and parameter groups
of their own. Needs no DeepSpeed import.

DeepSpeed reduces and shards a marked parameter within its expert-data group: the ranks that hold the same experts. It
divides by the number of all ranks, as for any other, so an expert's gradient is the same for every number of ranks.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from kha_train.model.moe.experts import Experts
from kha_train.model.moe.parallel import ExpertRanks


def group_name(size: int) -> str:
    """DeepSpeed's name of the groups of `size` ranks."""
    return f"ep_size_{size}"


def mark_experts(decoder: nn.Module, ranks: ExpertRanks) -> dict[str, int]:
    """Mark the experts of `decoder` for DeepSpeed. Returns where this rank's part of each begins in the flattened whole
    parameter, by name.
    """
    starts = {}
    for prefix, module in decoder.named_modules():
        if isinstance(module, Experts):
            part: Any
            for name, part in module.named_parameters():
                part.allreduce, part.group_name = False, group_name(ranks.size)
                starts[f"{prefix}.{name}"] = ranks.rank * part.numel()
            # DeepSpeed counts them.
            vars(module)["num_experts"] = ranks.size * module.gate_up.shape[0]
    return starts


def apart_by_ranks(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`groups` with marked parameters in groups of their own, after the one they came from. DeepSpeed finds the ranks
    of such a group by its `name`, so ours becomes its `layer`.
    """
    apart = []
    for group in groups:
        marked = [parameter for parameter in group["params"] if hasattr(parameter, "group_name")]
        rest = [parameter for parameter in group["params"] if not hasattr(parameter, "group_name")]
        apart += [{**group, "params": rest}] if rest else []
        if marked:
            apart.append({**group, "params": marked, "layer": group["name"], "name": marked[0].group_name, "moe": True})
    return apart


def layer_of(group: dict[str, Any]) -> str:
    """Our name of a parameter group."""
    name: str = group.get("layer", group["name"])
    return name
