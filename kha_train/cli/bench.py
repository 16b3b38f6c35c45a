"""`kha bench`: measured figures, each printed with the protocol it was measured by."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kha_train.cli.output import Overwrite, print_json
from kha_train.config.home import in_home
from kha_train.errors import ConfigError
from kha_train.record.files import check_replaceable

app = typer.Typer(name="bench", help="Measured figures with their protocol.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Answer with one JSON object.")]


@app.command()
def spikes(
    seed: Annotated[int | None, typer.Option(help="Of the curves; fresh ones each time unless set.")] = None,
    spiky_steps: Annotated[int, typer.Option(min=2000, help="Steps of the curve full of spikes, per noise.")] = 60_000,
    clean_steps: Annotated[int, typer.Option(min=1000, help="Steps of the curve without any, per noise.")] = 100_000,
    early_curves: Annotated[int, typer.Option(min=1, help="Early curves of 1,500 steps, per noise of two.")] = 40,
    as_json: Json = False,
) -> None:
    """Spike rules on labelled synthetic curves: what each finds, what it makes up; and the monitor's cost per step."""
    from kha_train.bench import spikes as bench
    from kha_train.bench.spike_thresholds import format_thresholds, run_thresholds

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
        f"labelled synthetic curves, seed {seed}: per noise {spiky_steps} steps full of spikes, {clean_steps} clean; "
        f"found = alarm within {bench.FOUND_WITHIN} steps of the start"
    )
    for noise, rules in scores.items():
        typer.echo(f"\n{noise}: {bench.NOISES[noise].__doc__}\n\n{bench.format_table(rules)}")
    typer.echo(f"\nearly: {early_curves} beginnings of runs per noise\n\n{bench.format_table(early)}")
    typer.echo(f"\nthe event detector by its threshold\n\n{format_thresholds(thresholds)}")
    typer.echo(f"\nwhole monitor, plain Python: {1e6 * seconds:.0f} microseconds of CPU time a step")


def _plain(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {name: score.to_dict() for name, score in scores.items()}


@app.command()
def telemetry(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the configuration; model=small without any.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=3, help="Interleaved blocks of a bare, a watched and a probed step.")] = 20,
    clock: Annotated[str, typer.Option(help="On a CPU: wall, or process (its own CPU time).")] = "wall",
    as_json: Json = False,
) -> None:
    """What watching a run costs: detectors, record, console, W&B offline and probes, beside the bare step."""
    from kha_train.bench import telemetry as bench

    overrides = overrides or ["model=small", "attention=kha_mlp", "data.global_batch_size=4"]
    found = bench.measure(overrides, blocks, _clock(clock))
    _answer(found.to_dict(), bench.format_measured(found), as_json)


@app.command()
def checkpoint(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the configuration; model=small without any.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between two saves that the cost is reckoned for.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds a mode.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps a round.")] = 10,
    as_json: Json = False,
) -> None:
    """What a checkpoint costs: written beside training and blocking it, in interleaved rounds of one run."""
    from kha_train.bench import checkpoint as bench

    found = bench.measure(overrides or ["model=small", "data.global_batch_size=8"], every, rounds, steps)
    _answer(found.to_dict(), bench.format_measured(found), as_json)


@app.command()
def attention(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the configuration: its model's shape and micro-batch are measured.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=3, help="Interleaved blocks.")] = 20,
    clock: Annotated[str, typer.Option(help="On a CPU: wall, or process (its own CPU time).")] = "wall",
    as_json: Json = False,
) -> None:
    """What an interaction costs, eager and folded: one attention layer forward and backward, against plain gqa."""
    from kha_train.bench import attention as bench

    found = bench.measure(overrides or [], blocks, _clock(clock))
    _answer(found.to_dict(), bench.format_measured(found), as_json)


@app.command()
def kernels(as_json: Json = False) -> None:
    """What the compiler makes of every Triton kernel for Hopper: registers, spills, shared memory. Needs no GPU."""
    from kha_train.bench import kernels as bench

    found = bench.measure()
    _answer(bench.to_dict(found), bench.format_measured(found), as_json)


@app.command()
def moe(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the configuration; model=small without any.")
    ] = None,
    against: Annotated[str, typer.Option(help="Peers: transformers.")] = "",
    blocks: Annotated[int, typer.Option(min=3, help="Interleaved blocks.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Rounds before, which do not count.")] = 3,
    clock: Annotated[str, typer.Option(help="On a CPU: wall, or process (its own CPU time).")] = "wall",
    as_json: Json = False,
) -> None:
    """The experts of one layer: every implementation that runs here, by even loads and by a router's."""
    from kha_train.bench import moe as bench

    how = {"against": _peers(against), "blocks": blocks, "warmup": warmup, "clock": _clock(clock)}
    found = bench.measure(overrides or ["model=small"], **how)
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def step(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the configuration; without any, model=small and the quickstart's.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="Settings on top, in one string; once an arm, the first is the base. gqa and KHA without."),
    ] = None,
    against: Annotated[str, typer.Option(help="Peers: transformers.")] = "",
    blocks: Annotated[int, typer.Option(min=3, help="Interleaved blocks.")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Steps of an arm in a block.")] = 1,
    warmup: Annotated[int, typer.Option(min=1, help="Steps of every arm before, which do not count.")] = 2,
    clock: Annotated[str, typer.Option(help="On a CPU: wall, or process (its own CPU time).")] = "wall",
    threads: Annotated[int, typer.Option(help="Of torch on a CPU; 0: as it is.")] = 0,
    as_json: Json = False,
) -> None:
    """The training step: attention variants, or any settings, in interleaved blocks; and transformers' Qwen3-MoE."""
    from kha_train.bench import step as bench

    known = _peers(against)
    bench.use_threads(threads)
    shapes = {"given": overrides} if overrides else bench.SHAPES
    how = {"against": known, "blocks": blocks, "steps": steps, "warmup": warmup, "clock": _clock(clock)}
    found = {name: bench.measure(shape, arm or bench.ARMS, **how) for name, shape in shapes.items()}
    texts = [bench.format_measured(answer) for answer in found.values()]
    _answer(found, "\n\n".join(texts), as_json)


@app.command()
def tokenize(
    processes: Annotated[int, typer.Option(min=1, help="Of the encoder; more than one is measured beside one.")] = 2,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds.")] = 5,
    as_json: Json = False,
) -> None:
    """Encoding text into shards: bytes and tokens a second, by one process and by several."""
    from kha_train.bench import tokenize as bench

    found = bench.measure(processes, rounds)
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def startup(
    overrides: Annotated[list[str] | None, typer.Argument(help="Of the configuration.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Starts, one after the other.")] = 3,
    as_json: Json = False,
) -> None:
    """From the command to the end of the first step of `kha train`, and where that time goes."""
    from kha_train.bench import startup as bench

    found = bench.measure(overrides or [], rounds)
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def record(
    steps: Annotated[str, typer.Option(help="Lengths of the records, in steps.")] = "1000,10000,100000,240000",
    ask: Annotated[str, typer.Option(help="Of status, compare, spikes, start, end, sweep; all unless set.")] = "",
    as_json: Json = False,
) -> None:
    """What a long record costs: start and end of a resume, status, compare, spikes; time and memory of each."""
    from kha_train.bench import record as bench

    found = bench.measure(
        _lengths(steps), [one for one in ask.split(",") if one], say=lambda text: typer.echo(text, err=True)
    )
    _answer(found, bench.format_measured(found), as_json)


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Where results.json and results.md are written.")] = Path("bench-gpu"),
    minutes: Annotated[float, typer.Option(min=0.1, help="All of it; what does not fit is left out, and said.")] = 8.8,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="The same chain at tiny sizes on a CPU.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Every GPU test and benchmark in one short run without network; results as JSON and as a table.

    Ends with 1 when a stage failed or had no time left; what the others found is there all the same."""
    from kha_train.bench import gpu as bench

    for name in ("results.json", "results.md"):
        check_replaceable(out / name, None, "--out", overwrite)
    found = bench.measure(out, seconds=60 * minutes, rehearse=rehearse, say=lambda text: typer.echo(text, err=True))
    _answer(found, bench.as_markdown(found), as_json)
    _fail_if_any(found["stages"])


@app.command("all")
def everything(
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds: that each runs, not how fast it is.")] = False,
    against: Annotated[str, typer.Option(help="Peers of the step: transformers.")] = "",
    as_json: Json = False,
) -> None:
    """Every benchmark of time in turn, but for that of data loaders, which needs a network, and `gpu`. One JSON object.

    Ends with 1 when one failed; what the others found is there all the same."""
    from kha_train.bench import everything as bench

    found = bench.measure(quick=quick, against=_peers(against), say=lambda text: typer.echo(text, err=True))
    _answer(found, bench.format_measured(found), as_json)
    _fail_if_any(found)


@app.command()
def data(
    cache: Annotated[Path, typer.Option(help="Where tokens and the peers' environment are kept (2 GB).")] = Path(
        "~/.cache/kha_train/bench"
    ),
    tokens: Annotated[int, typer.Option(min=10_000_000, help="Tokens to read.")] = 200_000_000,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Rows of a batch.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="How often each loader runs, in turn.")] = 3,
    cpu_seconds: Annotated[float, typer.Option(help="The most CPU time of one run, after warming up.")] = 3.0,
    cold: Annotated[bool, typer.Option("--cold", help="Drop the files from the page cache before each run.")] = False,
    document_tokens: Annotated[int, typer.Option(min=1, help="Mean tokens of a document.")] = 835,
    as_json: Json = False,
) -> None:
    """Token loaders, ours and the peers that install: tokens a CPU-second, start, memory, seek to sample 24,000 (ours:
    and to 1e12)."""
    from kha_train.bench import data as bench

    result = bench.run_bench(
        in_home(str(cache)),
        tokens=tokens,
        batch=batch,
        rounds=rounds,
        cpu_seconds=cpu_seconds,
        cold=cold,
        document_tokens=document_tokens,
        say=lambda text: typer.echo(text, err=True),
    )
    _answer(result, f"{bench.__doc__}\n{bench.format_table(result)}", as_json)


def _answer(found: Any, text: str, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        typer.echo(text)


def _fail_if_any(stages: dict[str, Any]) -> None:
    """Raises typer.Exit, so that a script sees what a table says."""
    from kha_train.bench.everything import failed

    if names := failed(stages):
        typer.echo(f"failed: {', '.join(names)}", err=True)
        raise typer.Exit(1)


def _peers(text: str) -> list[str]:
    """Raises ConfigError for a peer that there is no adapter for."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name != "transformers":
            raise ConfigError("no such peer", field="--against", value=name, allowed="transformers")
    return names


def _lengths(text: str) -> list[int]:
    """Raises ConfigError for what is no list of lengths."""
    found = [int(one) if one.isascii() and one.isdigit() and len(one) < 10 else 0 for one in text.split(",")]
    if min(found) < 100:
        raise ConfigError("no list of lengths", field="--steps", value=text, allowed="100 and more, with commas")
    return found


def _clock(text: str) -> Any:
    """Raises ConfigError for a clock that is none."""
    if text not in ("wall", "process"):
        raise ConfigError("no such clock", field="--clock", value=text, allowed="wall, process")
    return text
