"""Measure the memory of a step by torch's CUDA allocator on the null device, for whole models of any number of ranks.

`python memory.py LIBRARIES TABLE.json [--only TEXT]` adds a row for each case of `CASES` to the table, which
`tests/estimate/test_memory_on_cuda.py` holds `kha plan` against. Each case is a process of its own: rank 0 of as many
ranks as its cluster has. The others do not exist, and their part of a collective is left out. Device memory is address
space alone, so a model of 30B parameters steps on a small machine in seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
DOCUMENT_TOKENS = 835
H200, NODE, NODES = "cluster=h200_1x1", "cluster=h100_1x8", "cluster=h100_8x8"
SIX = "model=moe_6b engine.micro_batch_size=1"
THIRTY = "model=qwen3_30b engine.micro_batch_size=1 data.global_batch_size=512"
FULL, SELECTIVE = "engine.activation_checkpointing=full", "engine.activation_checkpointing=selective"
PAPER = "data.train=x data.validation=y"
CASES = (
    f"{SIX} {H200} attention=kha_mlp data.global_batch_size=2 engine=zero2 {FULL}",
    f"{SIX} {H200} attention=kha_mlp data.global_batch_size=2 engine=zero2 {SELECTIVE}",
    f"{SIX} {H200} attention=kha_mlp data.global_batch_size=2 engine=zero2",
    f"{SIX} {H200} attention=kha_mlp data.global_batch_size=2 engine=zero2 {FULL} engine.grad_accum_dtype=bf16",
    f"{SIX} {H200} attention=kha_mlp data.global_batch_size=2 engine=zero1 {FULL}",
    f"{SIX} {H200} attention=kha_mlp data.global_batch_size=1 engine=zero1 {FULL}",
    f"{SIX} {H200} attention=gqa data.global_batch_size=2 engine=zero3 {FULL}",
    f"{SIX} {NODE} attention=gqa data.global_batch_size=32 engine=zero1",
    f"{SIX} {NODE} attention=mla data.global_batch_size=16 engine=zero1 {FULL}",
    f"{SIX} {NODE} attention=mla data.global_batch_size=16 engine=zero1",
    f"{SIX} {NODE} attention=mea data.global_batch_size=16 engine=zero1",
    f"{SIX} {NODE} attention=kha_linear data.global_batch_size=16 engine=zero2 {SELECTIVE}",
    f"{SIX} {NODE} attention=diff data.global_batch_size=16 engine=zero2 {FULL}",
    f"{SIX} {NODE} attention=gqa data.global_batch_size=16 engine=zero1 engine.grad_accum_dtype=bf16 {FULL}",
    f"{SIX} {NODE} attention=gqa data.global_batch_size=16 engine=zero3 engine.grad_accum_dtype=bf16 {FULL}",
    f"model=moe_6b {NODE} engine.micro_batch_size=2 data.global_batch_size=32 engine=zero2 {SELECTIVE}",
    f"model=moe_6b {NODE} engine.micro_batch_size=4 data.global_batch_size=64 engine=zero2 attention=kha_mlp",
    f"{SIX} {NODE} attention=gqa data.global_batch_size=16 engine=zero2 engine.grad_accum_dtype=bf16",
    f"{SIX} {NODES} attention=gqa data.global_batch_size=512 engine=zero2",
    f"{SIX} {NODES} attention=gqa data.global_batch_size=512 engine=zero3 {FULL}",
    f"experiment=kha_paper_main {PAPER} {NODES}",
    f"experiment=kha_paper_main {PAPER} {H200}",
    f"experiment=kha_paper_ablation {PAPER} {NODES}",
    "model=moe_2_3b cluster=h100_1x1 engine.micro_batch_size=2 data.global_batch_size=4 engine=zero1",
    f"model=olmoe {NODE} engine.micro_batch_size=1 data.global_batch_size=16 engine=zero1",
    f"model=ling_mini cluster=h200_1x8 engine.micro_batch_size=1 data.global_batch_size=16 engine=zero2 {FULL}",
    f"{THIRTY} {NODE} engine=zero1 engine.expert_parallel=8 {FULL}",
    f"{THIRTY} {NODE} engine=zero2 engine.expert_parallel=8 {FULL}",
    f"{THIRTY} {NODE} engine=zero2 engine.expert_parallel=8 {SELECTIVE}",
    f"{THIRTY} {NODES} engine=zero1 engine.expert_parallel=8",
    f"{THIRTY} {NODES} engine=zero2 engine.expert_parallel=8 engine.grad_accum_dtype=bf16",
    f"{THIRTY} {NODE} engine=zero3 {FULL}",
    f"{THIRTY} {NODE} engine=zero3",
    f"{SIX} {NODE} attention=kha_mlp data.global_batch_size=16 engine=zero1 engine.expert_parallel=2 {FULL}",
    f"{SIX} {NODES} attention=gqa data.global_batch_size=512 engine=zero2 engine.expert_parallel=8",
    f"{SIX} {NODE} attention=kha_mlp data.global_batch_size=16 engine=zero1 engine.context_parallel=4",
    f"{SIX} {NODE} attention=gqa data.global_batch_size=16 engine=zero2 engine.context_parallel=8 {SELECTIVE}",
    f"{THIRTY} {NODE} engine=zero2 engine.expert_parallel=8 engine.context_parallel=2 {FULL}",
    "model=llama_3_2_1b cluster=h100_1x1 engine.micro_batch_size=1 data.global_batch_size=2 engine=zero1",
    f"model=dense_1_68b cluster=h100_1x1 engine.micro_batch_size=2 data.global_batch_size=4 engine=zero2 {SELECTIVE}",
)
STEPS = 2
"""The second step has what the first one left behind."""


def measure(overrides: list[str]) -> dict[str, Any]:
    """Peaks of the allocator over `STEPS` steps of all micro-batches, in bytes: `allocated`, `reserved`."""
    import torch
    import torch.distributed as dist
    from session import know_numbers
    from torch.distributed import distributed_c10d

    from kha_train.config.compose import compose
    from kha_train.distributed import World, _let_segments_grow
    from kha_train.engine.deepspeed import Engine
    from kha_train.estimate.memory import micro_batches
    from kha_train.model.decoder import lay_out_decoder

    # Ranks that do not exist are not waited for.
    distributed_c10d._store_based_barrier = lambda *arguments, **named: None
    know_numbers()
    _let_segments_grow(os.environ)
    config = compose(overrides)
    ranks, device = config.cluster.devices, torch.device("cuda", 0)
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0")
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=ranks)
    shapes = {name: parameter.shape for name, parameter in lay_out_decoder(config).named_parameters()}

    def initial(name: str, default: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Values mean nothing, and drawing billions takes minutes."""
        return torch.empty(shapes[name], device=device, dtype=torch.bfloat16)

    engine = Engine(config, World(0, ranks, 0, device), initial)
    if hasattr(engine._optimizer, "check_overflow"):
        engine._optimizer.check_overflow = lambda *arguments, **named: None
    batch, count = rows_of(config), micro_batches(config)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(STEPS):
        # What a third micro-batch holds, a second one does too.
        for number in range(min(count, 2)):
            engine.accumulate(batch, 1.0, 1.0, number == min(count, 2) - 1)
        # A norm that was computed here is anything.
        engine._norm = torch.tensor(1.0)
        engine.apply(1e-4)
    return {
        "allocated": torch.cuda.max_memory_allocated(device),
        "reserved": torch.cuda.max_memory_reserved(device),
    }


def rows_of(config: Any) -> Any:
    """A micro-batch whose rows are cut into documents of usual length."""
    import numpy as np

    from kha_train.data.rows.batch import Batch
    from kha_train.data.rows.packing import Layout

    rows, tokens = config.engine.micro_batch_size, config.model.seq_len
    step = DOCUMENT_TOKENS if config.data.isolate_documents else tokens
    ends = sorted({*range(0, rows * tokens, tokens), *range(0, rows * tokens, step), rows * tokens})
    layout = Layout(np.array(ends), np.empty(0, dtype=np.int64))
    part = (0, config.engine.context_parallel)
    return Batch(np.arange(rows), np.zeros((rows, tokens + 1), dtype=np.uint32), layout, part=part)


def measure_all(cases: list[str]) -> None:
    """Print the result of each case, measured in a process of its own that has its imports from this one."""
    # All but DeepSpeed, whose import looks at the device, which no fork may have done.
    import torch  # noqa: F401

    import kha_train.config.compose
    import kha_train.model.decoder  # noqa: F401

    for case in cases:
        if os.fork() == 0:
            try:
                print("RESULT " + json.dumps({"overrides": case, **measure(case.split())}), flush=True)
            except Exception:  # noqa: BLE001  # the next case is measured all the same
                traceback.print_exc()
            finally:
                # Communicators of ranks that do not exist cannot be left in good order.
                os._exit(0)
        os.wait()


def main() -> int:
    """Measure the cases that the table lacks."""
    if sys.argv[1] == "--cases":
        measure_all(sys.argv[2:])
        return 0
    from matrix import environment

    built, path = Path(sys.argv[1]), Path(sys.argv[2])
    only = sys.argv[4] if "--only" in sys.argv else ""
    table = json.loads(path.read_text()) if path.exists() else {"rows": []}
    known = {row["overrides"] for row in table["rows"]}
    wanted = [case for case in CASES if case not in known and only in case]
    command = [sys.executable, str(HERE / "memory.py"), "--cases", *wanted]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(built, virtual=True))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("RESULT "):
            row = json.loads(line[7:])
            table["rows"].append(row)
            told = " ".join(f"{row[name] / 2**30:7.2f}" for name in ("allocated", "reserved"))
            print(f"{told}  {row['overrides']}", flush=True)
            path.write_text(json.dumps(table, indent=1) + "\n")
    missing = [case for case in CASES if case not in {row["overrides"] for row in table["rows"]}]
    print("\n".join(["", f"{len(table['rows'])} measured, {len(missing)} not", *missing]))
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
