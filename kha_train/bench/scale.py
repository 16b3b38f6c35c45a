"""Compares the step time that `kha plan --scale` predicts with that of real ranks on nodes behind a slow link.

The nodes are network namespaces of this machine (`network.py`), one rank each. An arm is a ZeRO stage, with or without
expert parallelism, and a number of micro-batches; all arms train the same model on the same batches. Some send their
gradients only when the backward has ended: what hiding the reduction gains is the difference. Arms and speeds of the
link take turns. The prediction is the plan's, from the bytes that a rank sends, the speed of the link, and the time
of computation: that is what the same ranks take just before on the open link. The kernel counts what a node's card
really sent.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from data_tools.synthetic import write_dataset
from kha_train.bench import network, protocol
from kha_train.config.compose import compose
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError, KhaError
from kha_train.estimate.plan import make_plan
from kha_train.estimate.scale import scale

SHAPE = ("model=tiny", "model.layers=2", "model.vocab_size=1024", "model.seq_len=64")
MODES = {
    "ZeRO 1": ("engine=zero1",),
    "ZeRO 2": ("engine=zero2",),
    "ZeRO 3": ("engine=zero3",),
    "ZeRO 1, EP 2": ("engine=zero1", "engine.expert_parallel=2"),
    "ZeRO 1 afterwards": ("engine=zero1",),
    "ZeRO 2 afterwards": ("engine=zero2",),
}
AFTERWARDS = " afterwards"
"""Ends the name of a mode whose gradients leave when the backward has ended."""
MICRO_BATCHES = (1, 4)
ROWS = 4
"""Rows of a rank in a step: they are divided into micro-batches."""
OPEN = 0.0
"""The speed of a link that is not throttled."""
NEAR = 0.25
"""A prediction counts as near when the measured time is so close to it."""
TOLD_APART = 1.1
"""Arms whose predictions differ by this factor are expected to be in that order."""
WARMUP = 2
MOST_NODES, MOST_MEGABITS = 16, 10_000


@dataclass
class Arm:
    """One configuration on so many nodes, with or without gradients that leave beside the backward: seconds of its
    steps by speed of the link, one for each block, and what the nodes sent in each step, on average.
    """

    config: RunConfig
    hides: bool
    seconds: dict[float, list[float]] = field(default_factory=dict)
    sent_bytes: list[float] = field(default_factory=list)

    @property
    def planned_bytes(self) -> int:
        """What the plan says a rank sends in a step."""
        return make_plan(self.config).communication[self.config.engine.zero_stage - 1].bytes_per_step

    def predicted(self, megabits: float) -> list[float]:
        """What the plan says of the steps at a speed of the link, block by block."""
        return [predicted_seconds(self.config, megabits, seconds, self.hides) for seconds in self.seconds[OPEN]]


def predicted_seconds(config: RunConfig, megabits: float, computed: float, hides: bool = True) -> float:
    """The step of `config` by `kha plan --scale`, where the network carries `megabits` million bits a second in each
    direction, and a step takes `computed` seconds without it. Where it is not so that a rank `hides` its gradients
    behind the backward, it waits for all of them.
    """
    cluster = config.cluster
    assumed = make_plan(config).time["step_seconds"]
    assert assumed is not None, "cluster=cpu has a peak"
    # Computation is described by the share of the peak that it reaches.
    behind = replace(cluster, network_bandwidth_gb=megabits / 8000, mfu=cluster.mfu * assumed / computed)
    there = replace(config, cluster=behind)
    (size,) = scale(there, [cluster.devices])
    (seconds,) = [stage.step_seconds for stage in size.stages if stage.configured]
    hidden = make_plan(there).communication[config.engine.zero_stage - 1].hidden_seconds
    assert seconds is not None and hidden is not None, "the batch divides, and the speed is known"
    return seconds if hides else seconds + hidden


def measure(
    overrides: Sequence[str], sizes: Sequence[int], links: Sequence[float], blocks: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure all modes on each number of nodes of `sizes`, at each speed of `links` in Mbit/s.

    Raises ConfigError where nodes cannot be made, as `compose`, and KhaError when a rank fails.
    """
    found = []
    for nodes in sizes:
        if nodes % 2:
            raise ConfigError("cannot share experts in pairs", field="--nodes", value=nodes, allowed="an even number")
    for nodes in sizes:
        with tempfile.TemporaryDirectory() as folder:
            arms = settings_of_arms(overrides, nodes, Path(folder) / "data")
            measured = {name: Arm(compose(settings), AFTERWARDS not in name) for name, settings in arms.items()}
            model = next(iter(measured.values())).config.model
            write_dataset(Path(folder) / "data", vocab_size=model.vocab_size, documents=200)
            late = [name for name, arm in measured.items() if not arm.hides]
            with network.nodes_on_a_switch(nodes) as cluster, _ranks(cluster, arms, late, Path(folder)) as step:
                say(f"{nodes} nodes: {len(arms)} configurations, {blocks} blocks")
                _take_turns(measured, cluster, step, links, blocks)
        found.append(_figures(measured, nodes, links))
    return {
        "shape": {"model": model.name, "seq_len": model.seq_len, "rows_of_a_rank": ROWS},
        "protocol": {"blocks": blocks, "warmup": WARMUP, "links_megabits": list(links), "mtu_bytes": network.MTU_BYTES},
        "environment": protocol.environment(torch.device("cpu")),
        "sizes": found,
        "near": _near(found),
    }


def settings_of_arms(overrides: Sequence[str], nodes: int, data: Path) -> dict[str, list[str]]:
    """The settings of every mode with every number of micro-batches on so many nodes of one rank."""
    common = [
        *(*SHAPE, *overrides, "cluster=cpu", f"cluster.devices={nodes}", "cluster.devices_per_node=1"),
        *("engine.device=cpu", "engine.collective_timeout_seconds=300", f"data.global_batch_size={ROWS * nodes}"),
        *(f"data.train={data}/train", f"data.validation={data}/validation"),
    ]
    return {
        f"{mode}, {count} micro-batch{'es' if count > 1 else ''}": [
            *(*common, *settings, f"engine.micro_batch_size={ROWS // count}")
        ]
        for mode, settings in MODES.items()
        for count in MICRO_BATCHES
    }


@contextmanager
def _ranks(
    nodes: network.Nodes, arms: Mapping[str, list[str]], afterwards: Sequence[str], folder: Path
) -> Iterator[Callable[[str], float]]:
    """A rank on every node; yields the function that takes a step of an arm on all of them and returns its seconds."""
    shared = {
        "WORLD_SIZE": str(nodes.count),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": nodes.address(0),
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": network.CARD,
        "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    with ExitStack() as ended_last:
        ranks: list[network.Holder] = []
        for rank in range(nodes.count):
            errors = ended_last.enter_context((folder / f"rank{rank}.txt").open("wb"))
            environment = shared | {"RANK": str(rank)}
            told = json.dumps({"arms": arms, "afterwards": afterwards})
            command = [sys.executable, "-m", "kha_train.bench.scale_rank", told]
            pipes = {"stdin": network.PIPE, "stdout": network.PIPE, "stderr": errors}
            ranks.append(nodes.start(rank, command, environment, **pipes))
            ended_last.callback(_end, ranks[-1])

        def answers() -> list[str]:
            lines = [rank.stdout.readline().decode().strip() for rank in ranks if rank.stdout]
            if not all(lines):
                raise KhaError(f"a rank of the benchmark failed: {_last_words(folder)}")
            return lines

        def step(name: str) -> float:
            for rank in ranks:
                assert rank.stdin is not None
                # One that has failed is found below.
                with suppress(BrokenPipeError):
                    rank.stdin.write(f"{name}\n".encode())
                    rank.stdin.flush()
            return max(map(float, answers()))

        answers()
        yield step


def _end(rank: network.Holder) -> None:
    """End a rank that may be waiting for another one."""
    rank.kill()
    rank.wait()
    for pipe in (rank.stdin, rank.stdout):
        assert pipe is not None
        pipe.close()


def _last_words(folder: Path) -> str:
    """The last line of each rank's error output."""
    texts = [path.read_text(errors="replace").strip() for path in sorted(folder.glob("rank*.txt"))]
    return "; ".join(f"rank {rank}: {text.splitlines()[-1]}" for rank, text in enumerate(texts) if text)


def _take_turns(
    arms: Mapping[str, Arm],
    nodes: network.Nodes,
    step: Callable[[str], float],
    links: Sequence[float],
    blocks: int,
) -> None:
    """Add the steps of all blocks to `arms`, whose order is reversed from block to block."""
    for name in arms:
        for _ in range(WARMUP):
            step(name)
    for block in range(blocks):
        for name in list(arms)[:: -1 if block % 2 else 1]:
            for megabits in (OPEN, *links):
                nodes.throttle(megabits)
                before = nodes.sent_bytes()
                arms[name].seconds.setdefault(megabits, []).append(step(name))
                sent = [after - count for after, count in zip(nodes.sent_bytes(), before, strict=True)]
                arms[name].sent_bytes.append(statistics.mean(sent))


def _figures(arms: Mapping[str, Arm], nodes: int, links: Sequence[float]) -> dict[str, Any]:
    afterwards = {name.replace(AFTERWARDS, ""): arm for name, arm in arms.items() if not arm.hides}
    return {
        "nodes": nodes,
        "arms": {
            name: {
                "config": protocol.config_hash(arm.config),
                "planned_bytes": arm.planned_bytes,
                "sent_bytes": statistics.median(arm.sent_bytes),
                "open": protocol.plain(protocol.timing(arm.seconds[OPEN])),
                "links": {f"{megabits:g}": _at(arm, megabits) for megabits in links},
            }
            for name, arm in arms.items()
        },
        "order": {f"{megabits:g}": order([_at(arm, megabits) for arm in arms.values()]) for megabits in links},
        "hidden": {
            f"{megabits:g}": {name: hidden(arms[name], late, megabits) for name, late in afterwards.items()}
            for megabits in links
        },
    }


def hidden(beside: Arm, afterwards: Arm, megabits: float) -> dict[str, float]:
    """Seconds of a step that an arm gains whose gradients leave `beside` the backward, by the plan and measured, as
    medians over blocks.
    """
    pairs = zip(afterwards.seconds[megabits], beside.seconds[megabits], strict=True)
    plan = (
        predicted_seconds(beside.config, megabits, seconds, hides=False)
        - predicted_seconds(beside.config, megabits, seconds)
        for seconds in beside.seconds[OPEN]
    )
    return {
        "predicted_seconds": statistics.median(plan),
        "measured_seconds": statistics.median(late - early for late, early in pairs),
    }


def _at(arm: Arm, megabits: float) -> dict[str, Any]:
    measured, predicted = arm.seconds[megabits], arm.predicted(megabits)
    return {
        "measured": protocol.plain(protocol.timing(measured)),
        "predicted_seconds": statistics.median(predicted),
        "against_predicted": protocol.plain(protocol.compare(measured, predicted)),
        "block_seconds": measured,
    }


def order(arms: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of the pairs of arms whose predictions differ by `TOLD_APART`, how many were measured in that order."""
    apart = right = 0
    for one, other in combinations(sorted(arms, key=lambda arm: arm["predicted_seconds"]), 2):
        if other["predicted_seconds"] >= TOLD_APART * one["predicted_seconds"]:
            apart += 1
            right += one["measured"]["seconds"] < other["measured"]["seconds"]
    return {"pairs": apart, "right": right}


def _near(sizes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many of all measured configurations took the predicted time within `NEAR`."""
    ratios = [
        link["against_predicted"]["ratio"]
        for size in sizes
        for arm in size["arms"].values()
        for link in arm["links"].values()
    ]
    return {"configurations": len(ratios), "near": sum(abs(ratio - 1) <= NEAR for ratio in ratios)}


def format_measured(found: dict[str, Any]) -> str:
    """The figures and their protocol, as text."""
    how, shape, near = found["protocol"], found["shape"], found["near"]
    what = (
        f"{shape['model']}, rows of {shape['seq_len']}, {shape['rows_of_a_rank']} of them a rank and step; one rank a "
        "node; nodes are network namespaces of this machine, their links token buckets in each direction, MTU "
        f"{how['mtu_bytes']}"
    )
    protocol_line = (
        f"{how['blocks']} blocks in which configurations and links take turns, after {how['warmup']} steps of each; "
        "predicted: by the plan's bytes, the speed of the link, and the step just before on the open link; medians, "
        f"and measured over predicted with its 95 % interval; {protocol.told(found['environment'])}"
    )
    lines = [what, protocol_line]
    for size in found["sizes"]:
        lines.append(f"\n{size['nodes']} nodes: megabytes that a rank sends in a step, planned and counted at the card")
        for name, arm in size["arms"].items():
            planned, sent = arm["planned_bytes"], arm["sent_bytes"]
            lines.append(
                f"  {name:<36} {planned / 1e6:8.2f} {sent / 1e6:8.2f}  {sent / planned:.3f}"
                f"   open link {arm['open']['seconds']:.3f} s"
            )
        for megabits, told in size["order"].items():
            lines.append(f"{size['nodes']} nodes at {megabits} Mbit/s: seconds of a step, predicted and measured")
            for name, arm in size["arms"].items():
                link = arm["links"][megabits]
                ratio = protocol.shown(link["against_predicted"], how["blocks"])
                lines.append(
                    f"  {name:<36} {link['predicted_seconds']:8.3f} {link['measured']['seconds']:8.3f}  {ratio}"
                )
            lines.append(f"  in the predicted order: {told['right']} of {told['pairs']} pairs that it tells apart")
            lines.append("  seconds that sending gradients beside the backward gains, predicted and measured")
            for name, gain in size["hidden"][megabits].items():
                planned, seen = gain["predicted_seconds"], gain["measured_seconds"]
                share = f"  {100 * seen / planned:.0f} %" if planned else ""
                lines.append(f"  {name:<36} {planned:8.3f} {seen:8.3f}{share}")
    lines.append(
        f"\n{near['near']} of {near['configurations']} configurations took the predicted time within {100 * NEAR:.0f} %"
    )
    return "\n".join(lines)
