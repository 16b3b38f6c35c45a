"""`kha config show|explain|diff|list`: a configuration, before anything is trained or after."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from kha_train.cli.options import OverridesCommand
from kha_train.cli.output import as_text, print_json
from kha_train.cli.train import Overrides
from kha_train.config.build import flatten, nested, to_plain
from kha_train.config.compose import compose, load_plain
from kha_train.config.explain import Explanation, effect_of, explain, groups
from kha_train.config.origins import origins
from kha_train.errors import ConfigError, Look
from kha_train.foreign.documents import as_yaml
from kha_train.literal import say
from kha_train.record.finding import find_run, refuse_missing
from kha_train.telemetry.terminal import table_console

app = typer.Typer(name="config", help="Show, explain and compare configurations.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Side = Annotated[str, typer.Argument(help="A run, a saved configuration, or settings in quotes ('': the defaults).")]
CONFIG_FILE = "config.yaml"
ABSENT = "(absent)"


@app.command("show", cls=OverridesCommand)
def show_(
    overrides: Overrides = None,
    section: Annotated[str, typer.Option(help="Only this section, such as moe or attention.base.")] = "",
    where: Annotated[bool, typer.Option("--where", help="Say where each setting was set.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the whole configuration that these settings give, or the one saved in the directory of a run.

    Raises ConfigError for an unknown section, and for --where with a saved configuration.
    """
    typed = overrides or []
    saved = len(typed) == 1 and "=" not in typed[0] and Path(typed[0]).exists()
    if saved and where:
        raise ConfigError("is known for settings, not for a saved configuration", field="--where", fix="leave it out")
    values = _of_run(Path(typed[0])) if saved else to_plain(compose(typed))
    chosen = {
        key: value for key, value in flatten(values).items() if f"{key}.".startswith(f"{section}." * bool(section))
    }
    if not chosen:
        raise ConfigError("no such section", field="--section", value=section, allowed=", ".join(values))
    if where:
        places = origins(compose(typed), typed)
        _print_places({key: (value, places[key].where) for key, value in chosen.items()}, as_json)
    elif as_json:
        print_json(nested(chosen), indent=2)
    else:
        say(as_yaml(nested(chosen)).rstrip())


@app.command("explain", cls=OverridesCommand)
def explain_(
    key: Annotated[str, typer.Argument(help="A setting, such as optim.lr, or a section, such as moe.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Explain a setting: type, default, allowed values, where it was set, what it affects, its source in the papers.

    Raises ConfigError for an unknown setting.
    """
    found = explain(key, overrides or [])
    if as_json:
        print_json({one.key: one.to_dict() for one in found}, indent=2)
    elif len(found) == 1 and found[0].key == key:
        _print_explanation(found[0])
    else:
        table = Table("setting", "value", Column("meaning", overflow="fold"), box=None, pad_edge=False)
        for one in found:
            table.add_row(one.key, as_text(one.value), one.meaning)
        table_console().print(table)


@app.command("diff")
def diff_(first: Side, second: Side, as_json: AsJson = False) -> None:
    """Compare two configurations: of runs, saved files, or settings. Says what each difference affects.

    Raises ConfigError for any other side.
    """
    sides = [_side(first), _side(second)]
    keys = sorted(sides[0].keys() | sides[1].keys())
    differing = [
        {"key": key, "first": one, "second": two, "affects": _worst(key, sides)}
        for key in keys
        if (one := sides[0].get(key, ABSENT)) != (two := sides[1].get(key, ABSENT))
    ]
    if as_json:
        print_json({"first": first, "second": second, "differences": differing}, indent=2)
        return
    table = Table("setting", "first", "second", Column("affects", overflow="fold"), box=None, pad_edge=False)
    for row in differing:
        table.add_row(row["key"], _short(row["first"]), _short(row["second"]), row["affects"])
    table_console().print(table if differing else "no difference")


@app.command("list")
def list_(
    group: Annotated[str, typer.Argument(help="Only this group, with what each preset says of itself.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the groups of presets and their choices; the default is marked with a star.

    Raises ConfigError for an unknown group.
    """
    found = groups()
    if group and group not in found:
        raise ConfigError("no such group", field="group", value=group, allowed=", ".join(found))
    chosen = {name: one for name, one in found.items() if group in ("", name)}
    if as_json:
        shown = {
            name: {"typed": one.typed, "default": one.default, "presets": one.presets} for name, one in chosen.items()
        }
        print_json(shown, indent=2)
        return
    table = Table("typed", Column("preset", overflow="fold"), box=None, pad_edge=False)
    for one in chosen.values():
        marked = {f"{name}*" if name == one.default else name: head for name, head in one.presets.items()}
        rows = [f"{name:<16} {head}" for name, head in marked.items()] if group else [" ".join(marked)]
        for number, row in enumerate(rows):
            table.add_row("" if number else f"{one.typed}=", row)
    table_console().print(table)


def _side(text: str) -> dict[str, Any]:
    """The settings, by dotted keys, of what is typed for one side. Raises ConfigError where it is nothing of ours."""
    if "=" not in text and text.strip():
        if not Path(text).exists():
            problem = "is neither a run nor settings"
            raise ConfigError(problem, field="config diff", value=text, fix=Look("kha config list"))
        return flatten(_of_run(Path(text)))
    try:
        typed = shlex.split(text)
    except ValueError as error:
        problem = f"cannot be split into settings: {error}"
        raise ConfigError(problem, field="config diff", value=text, fix="close the quotes") from None
    return flatten(to_plain(compose(typed)))


def _of_run(path: Path) -> dict[str, Any]:
    """The saved configuration of a run, or in a file. Raises ConfigError where there is none."""
    refuse_missing([path])
    place = find_run(path)
    values = load_plain(place if place.is_file() else place / CONFIG_FILE)
    if not values:
        raise ConfigError(f"has no {CONFIG_FILE}", field="run", value=str(path), fix="name the directory of a run")
    return values


def _worst(key: str, sides: list[dict[str, Any]]) -> str:
    """What the setting affects; some are bound under the other settings of one side only."""
    told = [effect_of(key, side) for side in sides]
    return told[1] if told[0].startswith(("no number", "speed")) else told[0]


def _print_explanation(one: Explanation) -> None:
    table = Table(Column("", no_wrap=True), Column("", overflow="fold"), show_header=False, box=None, pad_edge=False)
    chosen = f" (chosen by {one.chosen_by})" if one.chosen_by else ""
    written = f", as {one.written_as}" if one.written_as else ""
    rows = {
        "setting": one.key,
        "meaning": one.meaning,
        "value": as_text(one.value),
        "set at": f"{one.set_at}{chosen}{written}",
        "type": one.type,
        "allowed": one.allowed or "any value of its type",
        "default": "none: a preset gives the value" if one.required else as_text(one.default),
        "declared at": one.declared_at,
        "affects": one.affects,
        "source": "\n".join(one.sources) or "no paper is named for it",
        "section": one.section,
    }
    for name, text in rows.items():
        table.add_row(name, text)
    table_console().print(table)


def _print_places(places: dict[str, tuple[Any, str]], as_json: bool) -> None:
    if as_json:
        print_json({key: {"value": value, "set_at": where} for key, (value, where) in places.items()}, indent=2)
        return
    table = Table("setting", Column("value", overflow="fold"), "set at", box=None, pad_edge=False)
    for key, (value, where) in places.items():
        table.add_row(key, as_text(value), where or "default of the schema")
    table_console().print(table)


def _short(value: object) -> str:
    return value if value == ABSENT and isinstance(value, str) else as_text(value)
