"""`kha bench`: benchmarks. Each figure is printed with its measurement protocol."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kha_train.cli.options import integers
from kha_train.cli.output import Overwrite, print_json
from kha_train.cli.spike_rule import print_rule_score
from kha_train.config.home import in_home
from kha_train.record.files import check_replaceable

app = typer.Typer(name="bench", help="Run benchmarks and print figures with their protocol.", no_args_is_help=True)

Against = Annotated[str, typer.Option(help="Peers to run beside ours, by the names of their adapters: transformers.")]
Peers = Annotated[Path | None, typer.Option(help="Folder of the peers' adapters: tests/peers in a checkout.")]
Small = Annotated[list[str] | None, typer.Argument(help="Settings of the run; model=small if none are given.")]
Blocks = Annotated[int, typer.Option(min=3, help="Interleaved blocks.")]
Clock = Annotated[Literal["wall", "process"], typer.Option(help="Clock on a CPU: process is CPU time of this process.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def spikes(
    seed: Annotated[int | None, typer.Option(help="Seed of the curves; random unless set.")] = None,
    spiky_steps: Annotated[
        int, typer.Option(min=2000, help="Steps of the curve with spikes, per noise level.")
    ] = 60_000,
    clean_steps: Annotated[
        int, typer.Option(min=1000, help="Steps of the curve without spikes, per noise level.")
    ] = 100_000,
    early_curves: Annotated[
        int, typer.Option(min=1, help="Curves of 1,500 early steps, for each of two noise levels.")
    ] = 40,
    rule: Annotated[
        str | None,
        typer.Option(help="Score this command instead, on the labelled set: losses in, steps of its alarms out."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare spike rules on labelled synthetic curves: hits, false alarms, and the monitor's cost per step.

    With --rule, score a rule of your own beside these on the curves of stability/labelled.jsonl (docs/spike_score.md).
    """
    from kha_train.bench import spikes as bench
    from kha_train.bench.spike_thresholds import format_thresholds, run_thresholds
    from kha_train.stability.benchmark import FOUND_WITHIN, format_table

    if rule is not None:
        print_rule_score(rule, as_json)
        return
    seed = secrets.randbelow(10**6) if seed is None else seed
    scores = bench.run_bench(seed, spiky_steps, clean_steps, list(bench.NOISES))
    early = bench.run_early(seed, early_curves)
    thresholds = run_thresholds(seed, spiky_steps, clean_steps, early_curves)
    seconds = bench.monitor_cost()
    if as_json:
        answer = {
            "seed": seed,
            "noises": {noise: _plain(rules) for noise, rules in scores.items()},
            "early": _plain(early),
            "thresholds": {rule: _plain(groups) for rule, groups in thresholds.items()},
            "monitor_seconds_per_step": seconds,
        }
        print_json(answer)
        return
    typer.echo(
        f"labelled synthetic curves, seed {seed}; for each noise: {spiky_steps} steps with spikes, {clean_steps} "
        f"without; a spike is found if an alarm is raised within {FOUND_WITHIN} steps of its start"
    )
    for noise, rules in scores.items():
        typer.echo(f"\n{noise}: {bench.NOISES[noise].__doc__}\n\n{format_table(rules)}")
    typer.echo(f"\nearly: the first steps of {early_curves} runs per noise\n\n{format_table(early)}")
    typer.echo(f"\nevent detector by threshold\n\n{format_thresholds(thresholds)}")
    typer.echo(f"\nwhole monitor, plain Python: {1e6 * seconds:.0f} microseconds of CPU time a step")


def _plain(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name: score.to_dict() for name, score in scores.items()}


@app.command()
def intervals(
    seed: Annotated[int | None, typer.Option(help="Seed of the simulations; random unless set.")] = None,
    simulations: Annotated[int, typer.Option(min=50, help="Simulations of each setting.")] = 2000,
    runs: Annotated[
        Path | None,
        typer.Option(help="Train pairs of equal arms in this new directory instead, and count false differences."),
    ] = None,
    comparisons: Annotated[int, typer.Option(min=1, help="Comparisons with --runs, three seeds a side.")] = 20,
    as_json: Json = False,
) -> None:
    """Measure how often the 95 % intervals that reports print cover the truth, on simulated curves, seeds and events.

    Exits with 1 when an interval fails.
    """
    from kha_train.bench import equal_arms, intervals

    seed = secrets.randbelow(10**6) if seed is None else seed
    if runs is None:
        found = intervals.measure(seed, simulations, _said)
        _answer(found, intervals.format_measured(found), as_json)
    else:
        found = equal_arms.measure(runs, seed, comparisons, _said)
        _answer(found, equal_arms.format_measured(found), as_json)
    if not found["holds"]:
        raise typer.Exit(1)


def _said(text: str) -> None:
    typer.echo(text, err=True)


@app.command()
def telemetry(
    overrides: Small = None,
    blocks: Annotated[
        int, typer.Option(min=3, help="Interleaved blocks; each has a bare, a watched and a probed step.")
    ] = 20,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Measure what monitoring costs: detectors, record, console, W&B offline and probes, against the bare step."""
    from kha_train.bench import telemetry as bench

    overrides = overrides or ["model=small", "attention=kha_mlp", "data.global_batch_size=4"]
    found = bench.measure(overrides, blocks, clock)
    _answer(found.to_dict(), bench.format_measured(found), as_json)


@app.command()
def checkpoint(
    overrides: Small = None,
    every: Annotated[int, typer.Option(min=1, help="Save interval, in steps, for which the cost is estimated.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per mode.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round.")] = 10,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Measure what checkpoints and the ring (`checkpoint.ring_steps`) cost, in interleaved rounds of one run."""
    from kha_train.bench import checkpoint as bench

    found = bench.measure(overrides or ["model=small", "data.global_batch_size=8"], every, rounds, steps, clock)
    _answer(found.to_dict(), bench.format_measured(found), as_json)


@app.command()
def attention(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the run; the model's shape and micro-batch are used.")
    ] = None,
    blocks: Blocks = 20,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Measure what an interaction costs, eager and folded: one attention layer, forward and backward, against plain
    gqa.
    """
    from kha_train.bench import attention as bench

    found = bench.measure(overrides or [], blocks, clock)
    _answer(found.to_dict(), bench.format_measured(found), as_json)


@app.command()
def decode(
    overrides: Small = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 1024,
    rows: Annotated[int, typer.Option(min=1, help="Rows that are decoded together.")] = 1,
    blocks: Blocks = 20,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Measure what a token costs to decode with all key/value heads and with half of them, with and without QK-norm."""
    from kha_train.bench import decode as bench

    found = bench.measure(overrides or ["model=small"], context, rows, blocks, clock)
    _answer(found.to_dict(), bench.format_measured(found), as_json)


@app.command()
def kernels(as_json: Json = False) -> None:
    """Compile every Triton kernel for Hopper and report registers, spills and shared memory. Needs no GPU."""
    from kha_train.bench import kernels as bench

    found = bench.measure()
    _answer(bench.to_dict(found), bench.format_measured(found), as_json)


@app.command()
def moe(
    overrides: Small = None,
    against: Against = "",
    peers: Peers = None,
    blocks: Blocks = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Warm-up rounds, not counted.")] = 3,
    clock: Clock = "wall",
    as_json: Json = False,
) -> None:
    """Compare all expert implementations available here on one layer, under even and routed loads."""
    from kha_train.bench import moe as bench

    beside: dict[str, Any] = {"against": _names(against), "peers": peers}
    found = bench.measure(overrides or ["model=small"], **beside, blocks=blocks, warmup=warmup, clock=clock)
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def step(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings of the run; if none are given, model=small and the quickstart's data."),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings of one arm, in one string; repeatable, the first arm is the base. Default: gqa and KHA."
        ),
    ] = None,
    against: Against = "",
    peers: Peers = None,
    blocks: Blocks = 20,
    steps: Annotated[int, typer.Option(min=1, help="Steps per arm in a block.")] = 1,
    warmup: Annotated[int, typer.Option(min=1, help="Warm-up steps per arm, not counted.")] = 2,
    clock: Clock = "wall",
    threads: Annotated[int, typer.Option(help="Threads of torch on a CPU; 0: unchanged.")] = 0,
    as_json: Json = False,
) -> None:
    """Time the training step of variants, other settings and transformers' Qwen3-MoE, in interleaved blocks."""
    from kha_train.bench import step as bench

    bench.use_threads(threads)
    shapes = {"given": overrides} if overrides else bench.SHAPES
    beside: dict[str, Any] = {"against": _names(against), "peers": peers}
    how: dict[str, Any] = {"blocks": blocks, "steps": steps, "warmup": warmup, "clock": clock}
    found = {name: bench.measure(shape, arm or bench.ARMS, **beside, **how) for name, shape in shapes.items()}
    texts = [bench.format_measured(answer) for answer in found.values()]
    _answer(found, "\n\n".join(texts), as_json)


@app.command()
def tokenize(
    processes: Annotated[int, typer.Option(min=1, help="Encoder processes; more than one is compared with one.")] = 2,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure encoding of text into shards: bytes and tokens per second, with one process and with several."""
    from kha_train.bench import tokenize as bench

    found = bench.measure(processes, rounds)
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def startup(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of the run.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Number of starts, one after another.")] = 3,
    as_json: Json = False,
) -> None:
    """Time `kha train` from the command to the end of the first step, and show where the time goes."""
    from kha_train.bench import startup as bench

    found = bench.measure(overrides or [], rounds)
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def record(
    steps: Annotated[str, typer.Option(help="Lengths of the records, in steps.")] = "1000,10000,100000,240000",
    ask: Annotated[str, typer.Option(help="Any of status, compare, spikes, start, end, sweep; all unless set.")] = "",
    as_json: Json = False,
) -> None:
    """Measure time and memory on a long record: start and end of a resume, status, compare, spikes."""
    from kha_train.bench import record as bench

    found = bench.measure(
        integers(steps, "--steps", least=100, most=10**9), [one for one in ask.split(",") if one], say=_said
    )
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def scale(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings on top of a small model.")] = None,
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, one rank each.")] = "2,4",
    links: Annotated[str, typer.Option(help="Speeds of a node's link, in Mbit/s.")] = "50,200",
    blocks: Annotated[int, typer.Option(min=3, help="Blocks, in which configurations and links take turns.")] = 6,
    as_json: Json = False,
) -> None:
    """Compare the step time that the plan predicts for several nodes with the time measured on network namespaces of
    this machine behind a throttled link: ZeRO 1 to 3, expert parallelism, 1 and 4 micro-batches. Needs Linux and root.
    """
    from kha_train.bench import scale as bench

    sizes, speeds = integers(nodes, "--nodes", 2, bench.MOST_NODES), integers(links, "--links", 1, bench.MOST_MEGABITS)
    found = bench.measure(overrides or [], sizes, speeds, blocks, _said)
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Directory for results.json and results.md.")] = Path("bench-gpu"),
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Time limit for all stages; stages that do not fit are skipped and listed.")
    ] = 8.8,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Run the same stages at tiny sizes on a CPU.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run every GPU test and benchmark in one short run without network; writes JSON and a table.

    Exits with 1 when a stage failed or ran out of time; results of the other stages are kept.
    """
    from kha_train.bench import gpu as bench

    for name in ("results.json", "results.md"):
        check_replaceable(out / name, None, "--out", overwrite)
    found = bench.measure(out, seconds=60 * minutes, rehearse=rehearse, say=_said)
    _answer(found, bench.as_markdown(found), as_json)
    _fail_if_any(found["stages"])


@app.command("all")
def everything(
    quick: Annotated[
        bool, typer.Option("--quick", help="Run few rounds: check that each benchmark runs, not how fast it is.")
    ] = False,
    against: Against = "",
    peers: Peers = None,
    as_json: Json = False,
) -> None:
    """Run every timing benchmark in turn, except `gpu` and `data` (which needs a network). Prints one JSON object.

    Exits with 1 when one failed; results of the others are kept.
    """
    from kha_train.bench import everything as bench

    found = bench.measure(quick=quick, against=_names(against), peers=peers, say=_said)
    _answer(found, bench.format_measured(found), as_json)
    _fail_if_any(found)


@app.command()
def data(
    cache: Annotated[Path, typer.Option(help="Directory for tokens and the peers' environment (2 GB).")] = Path(
        "~/.cache/kha_train/bench"
    ),
    tokens: Annotated[int, typer.Option(min=10_000_000, help="Tokens to read.")] = 200_000_000,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Rows per batch.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each loader, taken in turn.")] = 3,
    cpu_seconds: Annotated[float, typer.Option(help="Limit on the CPU time of one run, after warm-up.")] = 3.0,
    cold: Annotated[bool, typer.Option("--cold", help="Drop the files from the page cache before each run.")] = False,
    document_tokens: Annotated[int, typer.Option(min=1, help="Mean tokens per document.")] = 835,
    peers: Peers = None,
    as_json: Json = False,
) -> None:
    """Compare our token loader with the peers that can be installed: tokens per CPU-second, start-up, memory, seek to
    sample 24,000 (ours also to 1e12).
    """
    from kha_train.bench import data as bench

    result = bench.run_bench(
        in_home(str(cache)),
        tokens=tokens,
        batch=batch,
        rounds=rounds,
        cpu_seconds=cpu_seconds,
        cold=cold,
        document_tokens=document_tokens,
        peers=peers,
        say=_said,
    )
    _answer(result, f"{bench.__doc__}\n{bench.format_table(result)}", as_json)


def _answer(found: Any, text: str, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        typer.echo(text)


def _fail_if_any(stages: dict[str, Any]) -> None:
    """Raises typer.Exit, so that the exit code shows the failure as well as the table."""
    from kha_train.bench.everything import failed

    if names := failed(stages):
        typer.echo(f"failed: {', '.join(names)}", err=True)
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]
