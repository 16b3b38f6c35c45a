"""`kha bench spikes --rule COMMAND`: somebody's own spike rule on the labelled set."""

from __future__ import annotations

import typer

from kha_train.cli.output import print_json
from kha_train.errors import ConfigError


def print_rule_score(command: str, as_json: bool) -> None:
    """Print how `command` scores on the labelled set, beside the rules of `bench.spikes`.

    Raises ConfigError when it fails, or prints anything but steps.
    """
    from kha_train.bench.spikes import RULES, score_rules
    from kha_train.stability.benchmark import command_rule, format_table, read_labelled, score_rule
    from kha_train.stability.errors import CurveError

    curves = [curve for _, curve in read_labelled()]
    try:
        own = score_rule(curves, command_rule(command))
    except CurveError as error:
        raise ConfigError(error.problem, field=error.field, value=error.value, allowed=error.allowed or None) from error
    scores = {command: own, **score_rules(curves, RULES)}
    if as_json:
        print_json({name: score.to_dict() for name, score in scores.items()})
    else:
        typer.echo(format_table(scores))
