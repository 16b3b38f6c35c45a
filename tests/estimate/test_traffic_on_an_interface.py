"""Planned traffic against the bytes that the kernel counts on the interfaces of two ranks, each in a network namespace
of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kha_train import compose
from kha_train.estimate.plan import make_plan

WORKER = Path(__file__).with_name("interface_worker.py")
INTERFACE, NETWORK = "kha0", "10.213.77"
SHAPE = [
    *("model.layers=4", "model.hidden_size=384", "model.head_dim=96", "model.kv_heads=4", "moe.expert_width=256"),
    *("model.seq_len=32", "moe.routing_warmup_steps=1000", "cluster=cpu", "cluster.devices=2"),
]
"""12M parameters on few tokens, so that weights are most of what travels. All matrices are larger than those of which
ZeRO 3 keeps whole copies, and the warm-up balances the loads of experts, as the plan assumes."""
MODES = {
    f"ZeRO {stage}{' and EP 2' if shared else ''}, {micro} micro-batches": [
        *(f"engine=zero{stage}", f"engine.expert_parallel={2 if shared else 1}", "engine.micro_batch_size=1"),
        f"data.global_batch_size={2 * micro}",
    ]
    for stage, shared in ((1, False), (2, False), (3, False), (1, True), (2, True))
    for micro in (1, 4)
} | {
    "ZeRO 1, bf16, 4 micro-batches": ["engine=zero1", "engine.precision=bf16", "data.global_batch_size=8"],
    "ZeRO 1 and CP 2, 4 micro-batches": ["engine=zero1", "engine.context_parallel=2", "data.global_batch_size=4"],
}


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Two network namespaces that are joined by one cable."""
    names = [f"kha-{os.getpid()}-{number}" for number in range(2)]
    if not shutil.which("ip"):
        pytest.skip("needs ip, of iproute2")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as refused:
        pytest.skip(f"needs network namespaces: {refused.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        other = ("peer", "name", INTERFACE, "netns", names[1])
        ip("link", "add", INTERFACE, "netns", names[0], "type", "veth", *other)
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", INTERFACE)
            for device in (INTERFACE, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_the_plan_tells_the_bytes_that_cross_the_interface(
    hosts: list[str], small: list[str], clean_environment: dict[str, str], tmp_path: Path
) -> None:
    cases = {name: [*small, *SHAPE, *overrides] for name, overrides in MODES.items()}
    shared = {"MASTER_ADDR": f"{NETWORK}.1", "MASTER_PORT": "29511", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    processes = []
    for rank, host in enumerate(hosts):
        own = {**clean_environment, **shared, "RANK": str(rank), "GLOO_SOCKET_IFNAME": INTERFACE}
        arguments = [json.dumps({"cases": cases, "interface": INTERFACE}), str(tmp_path / f"{rank}.json")]
        command = ["ip", "netns", "exec", host, sys.executable, str(WORKER), *arguments]
        with (tmp_path / f"{rank}.log").open("w") as log:
            processes.append(subprocess.Popen(command, env=own, stderr=log))
    codes = [process.wait(timeout=280) for process in processes]
    assert codes == [0, 0], (tmp_path / "0.log").read_text() + (tmp_path / "1.log").read_text()
    answers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    planned = {name: planned_bytes(overrides) for name, overrides in cases.items()}
    ratios = {name: [way / planned[name] for answer in answers for way in answer[name]] for name in cases}
    for name, ways in ratios.items():
        print(f"{name}: planned {planned[name]:,}, counted over planned {', '.join(f'{way:.4f}' for way in ways)}")
    for name, ways in ratios.items():
        assert ways == pytest.approx([1.0] * 4, abs=0.02), name


def planned_bytes(overrides: list[str]) -> int:
    """What a rank sends in a step."""
    plan = make_plan(compose(overrides))
    return plan.communication[plan.config.engine.zero_stage - 1].bytes_per_step + plan.exchanged["bytes_per_step"]
