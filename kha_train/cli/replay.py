"""`kha replay`: what caused an event, from the same state with one thing changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kha_train.analysis.causes import VERDICT_FILE, Verdict
from kha_train.analysis.runs import RunData, load_run
from kha_train.cli.output import note, print_json
from kha_train.cli.progress import progress_bar
from kha_train.errors import ConfigError
from kha_train.literal import say
from kha_train.operate.local import signals_interrupt
from kha_train.record.finding import find_run
from kha_train.stability.events import SpikeEvent
from kha_train.telemetry.terminal import LiteralConsole

if TYPE_CHECKING:
    from kha_train.operate.capsule import CapsuleFile


def replay(
    run: Annotated[Path, typer.Argument(help="The run, as kha train wrote it.")],
    event: Annotated[int | None, typer.Option(help="Number of the event, as kha spikes counts them.")] = None,
    step: Annotated[int | None, typer.Option(help="A step of the event, instead of its number.")] = None,
    arms: Annotated[
        str | None, typer.Option(help="Changes to try, with commas between; all unless set. A wrong name lists them.")
    ] = None,
    replays: Annotated[
        int | None, typer.Option(min=1, help="Replays of a change that involves chance; 3 unless set.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Most steps of the event to replay; 50 unless set.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the replays; replay/step-N in the run unless set.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="OLD=NEW: data that the run found below the directory OLD are below NEW. May be repeated."),
    ] = None,
    capsule: Annotated[
        Path | None, typer.Option(help="Instead, write the smallest part that shows the event to this new directory.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Replay an event from the last saved state before it, unchanged and with one thing changed at a time.

    Exits with 1 when the unchanged replay is not bit-equal to the record: then nothing is judged. RUN may also be a
    capsule: its steps are trained, and it exits with 1 when the event does not show.
    """
    # These load torch, for which `kha --help` does not wait.
    from kha_train.operate.capsule import write_capsule
    from kha_train.operate.causes import AT_MOST, REPLAYS, Replaying, chosen, open_case, place_of, replay_event
    from kha_train.operate.reproduce import is_capsule
    from kha_train.operate.stretch import in_processes

    changing: dict[str, object] = {"--arms": arms, "--replays": replays}
    if is_capsule(run):
        changing |= {"--event": event, "--step": step, "--steps": steps}
        changing |= {"--out": out, "--data": data, "--capsule": capsule}
        _refuse(changing, f"{run} is a capsule, which is trained as it is")
        _reproduce(run, as_json)
        return
    if capsule is not None:
        _refuse(changing, "a capsule is written instead of replays")
    found = load_run(find_run(run))
    spike = _asked(found, event, step)
    moved = dict(_moved(text) for text in data or ())
    names = chosen([name.strip() for name in arms.split(",")] if arms else [])
    place, most = out or place_of(found, spike), steps or AT_MOST
    with signals_interrupt():
        if capsule is not None:
            made = write_capsule(found, open_case(found, spike, place, most, moved), capsule, note, in_processes)
            _print_capsule(made, capsule, as_json)
            return
        how = Replaying(names, place, note, progress_bar, replays or REPLAYS, most, moved=moved)
        verdict = replay_event(found, spike, how)
    _answer(verdict, place, as_json)


def _refuse(options: dict[str, object], reason: str) -> None:
    """Raises ConfigError for the first of `options` that is given: here it would have no effect."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(reason, field=name, value=value, fix=f"leave out {name}")


def _moved(text: str) -> tuple[str, str]:
    """The old directory and the new one of a `--data`."""
    old, equals, new = text.partition("=")
    if not equals or not old or not new:
        raise ConfigError("not two directories", field="--data", value=text, allowed="OLD=NEW")
    return old.rstrip("/"), str(Path(new).expanduser().resolve())


def _asked(run: RunData, number: int | None, step: int | None) -> SpikeEvent:
    """The event that was asked for. Raises ConfigError unless it is named in one way."""
    if (number is None) == (step is None):
        raise ConfigError(
            "give one of --event and --step", field="--event", value=number, fix="an event that `kha spikes` lists"
        )
    from kha_train.operate.causes import event_of

    return event_of(run, number, step)


def _print_capsule(made: CapsuleFile, place: Path, as_json: bool) -> None:
    if as_json:
        print_json({"capsule": str(place), **made}, indent=2)
    else:
        say(f"a capsule of step {made['step']}, without {', '.join(made['left_out'])}: {place}")


def _answer(verdict: Verdict, place: Path, as_json: bool) -> None:
    """Print the verdict; ends with 1 where the control differs."""
    if as_json:
        print_json({**verdict.to_dict(), "verdict": str(place / VERDICT_FILE)}, indent=2)
    else:
        _print(verdict, place)
    if verdict.differences:
        raise typer.Exit(1)


def _print(verdict: Verdict, place: Path) -> None:
    title = f"event of steps {verdict.start_step} to {verdict.end_step}, replayed from step {verdict.first}"
    table = Table("arm", "change", "result", title=title, title_justify="left")
    for arm in verdict.arms:
        table.add_row(arm.name, arm.change, arm.words)
    for words in verdict.differences:
        say(f"the control differs: {words}")
    if verdict.arms:
        LiteralConsole().print(table)
    say(verdict.answer)
    say(f"runs and verdict: {place}")


def _reproduce(path: Path, as_json: bool) -> None:
    """Train the capsule in `path`; ends with 1 when its event does not show."""
    from kha_train.operate.reproduce import reproduce

    found = reproduce(path)
    if as_json:
        print_json(found, indent=2)
    else:
        table = Table("step", "loss", "expected", title=f"an event opens at {found['threshold']:.4f}")
        for step, loss, expected in zip(found["steps"], found["losses"], found["expected"], strict=True):
            table.add_row(str(step), f"{loss:.6f}", f"{expected:.6f}")
        LiteralConsole().print(table)
        equal = "equal to the last bit" if found["equal"] else "not equal (another machine or release)"
        say(f"the event {'shows' if found['shows'] else 'does not show'}; losses are {equal}")
    if not found["shows"]:
        raise typer.Exit(1)
