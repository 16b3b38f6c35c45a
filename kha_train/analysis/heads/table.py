"""The results of `kha analyze` as rows of figures, for the terminal and for `--json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from kha_train.analysis.heads import matches
from kha_train.analysis.heads.inspection import Inspection, LayerInspection, mean_off_diagonal, path_of
from kha_train.analysis.heads.matches import Match


class Meaning(NamedTuple):
    """How a figure is called on the page, in the narrower terminal ("": not shown there), and what it means."""

    heading: str
    column: str
    meaning: str


MEANINGS = {
    "cosine": Meaning("cosine", "cos", "mean over tokens and pairs of heads of the cosine of their outputs"),
    "centred_cosine": Meaning("centred cosine", "c-cos", "the same less each head's mean output"),
    "cka": Meaning("CKA", "CKA", "linear centred kernel alignment, mean over pairs of heads; blind to their bases"),
    "cka_floor": Meaning("CKA floor", "", "that of independent heads from so few tokens, if tokens were independent"),
    "cosine_rank": Meaning("rank", "rank", "effective rank of the cosines: from 1, all alike, to the number of heads"),
    "centred_rank": Meaning("centred rank", "", "the same of the centred cosines"),
    "head_rank": Meaning("rank of a head", "", "effective rank of the covariance of a head's outputs, up to its width"),
    "entropy": Meaning("entropy", "entr", "of attention weights, as a share of the largest possible, log(t + 1)"),
    "distance": Meaning("distance", "dist", "mean number of tokens between a token and those it attends to"),
    "sink": Meaning("sink", "sink", "weight on the first token of the document"),
    "diversity": Meaning("divergence", "JS", "of a head's weights from the mean of all heads, in nats; its mean over "
                         "heads is the Jensen-Shannon divergence, 0 if all are alike"),
    "gate": Meaning("gate", "gate", "mean of sigmoid gates, 0.5 before training"),
    "matrix_distance": Meaning("|M - I|", "|M-I|", "Frobenius norm over all learned matrices of what differs from the "
                               "identity"),
    "rise": Meaning("loss rise", "", "by how much the loss rises without the head, in nats per token"),
    "rise_error": Meaning("its error", "", "standard error of a head's loss rise over documents"),
    "rise_mean": Meaning("loss rise", "rise", "without a head, in nats per token, mean over heads"),
    "rise_largest": Meaning("largest rise", "", "that of the most important head"),
    "rise_head": Meaning("of head", "head", "the most important head"),
}  # fmt: skip
"""The figures of a row."""


def layer_row(layer: LayerInspection) -> dict[str, Any]:
    """One number for each kind of figure of a layer: means over heads or pairs of heads, None where it has none.

    `matrix_distance` is the norm over all learned matrices of what differs from the identity. `rise_largest` is the
    largest loss rise, that of `rise_head`.
    """
    outputs, weights, rise = layer.outputs, layer.weights, layer.rise
    distances = [one.distance for one in layer.matrices if one.distance is not None and one.acts != "effective"]
    return {
        "layer": layer.layer,
        "cosine": mean_off_diagonal(outputs.cosine) if outputs else None,
        "centred_cosine": mean_off_diagonal(outputs.centred_cosine) if outputs else None,
        "cka": mean_off_diagonal(outputs.cka) if outputs else None,
        "cka_floor": mean_off_diagonal(outputs.cka_floor) if outputs else None,
        "cosine_rank": outputs.cosine_rank if outputs else None,
        "centred_rank": outputs.centred_rank if outputs else None,
        "head_rank": _mean(outputs.ranks) if outputs else None,
        "entropy": _mean(weights.entropy) if weights else None,
        "distance": _mean(weights.distance) if weights else None,
        "sink": _mean(weights.sink) if weights else None,
        "diversity": weights.diversity if weights else None,
        "gate": _mean([one.mean for one in layer.gates]) if layer.gates else None,
        "matrix_distance": math.hypot(*distances) if distances else None,
        "rise_mean": _mean(rise) if rise else None,
        "rise_largest": max(rise) if rise else None,
        "rise_head": max(range(len(rise)), key=rise.__getitem__) if rise else None,
    }


def answer_of(run_dir: Path, inspection: Inspection) -> dict[str, Any]:
    """A result for `--json`: everything but the matrices of pairs of heads and the values of learned matrices, which
    are in its `file`.
    """
    layers = []
    for layer in inspection.layers:
        weights = layer.weights
        heads = {
            "ranks": layer.outputs.ranks if layer.outputs else None,
            "rise": layer.rise,
            "rise_error": layer.rise_error,
        }
        heads |= {name: getattr(weights, name) if weights else None for name in _BY_HEAD}
        matrices = [{key: value for key, value in vars(one).items() if key != "values"} for one in layer.matrices]
        found = {"gates": [vars(one) for one in layer.gates], "clusters": [vars(one) for one in layer.clusters]}
        layers.append({**layer_row(layer), "heads": heads, "matrices": matrices, **found})
    plain = {key: value for key, value in vars(inspection).items() if key not in ("layers", "probe")}
    return {**plain, "file": str(path_of(run_dir, inspection.step)), "probe": vars(inspection.probe), "layers": layers}


def print_inspections(label: str, newest: Inspection, saved: Sequence[Inspection], console: Console) -> None:
    """The layers of the newest checkpoint and, of several saved results, the means over layers of each."""
    probe = newest.probe
    console.print(
        f"{label}: {newest.base} x {newest.interaction}, step {newest.step}, loss {newest.loss:.4f} on {probe.tokens} "
        f"tokens in {probe.documents} documents of {probe.field} (attention weights of {probe.queries})"
    )
    console.print(_table("layer", [(str(layer.layer), layer_row(layer)) for layer in newest.layers]))
    if len(saved) > 1:
        console.print(_table("step", [(str(one.step), _mean_row(one)) for one in saved]))
    for name, reason in newest.absent.items():
        console.print(f"  no {name}: {reason}")


MATCH_HEADINGS = ("layer", "partner of each head", "mean", "excess", "p", "same number", "p of it")
MATCH_MEANING = (
    "Heads of each layer are matched one to one, so that matched heads are as alike as possible. The partner of a head "
    "of the other run is the head of this run that plays its part. Excess: by how much matched heads are more alike "
    "than all pairs. p: the share of shuffled tables whose best matching has as large an excess. Same number: heads "
    "whose partner has their own number, and the probability of so many by chance."
)


def match_rows(match: Match) -> dict[str, list[tuple[str, ...]]]:
    """For each similarity the rows of a table with `MATCH_HEADINGS`."""
    return {
        name: [
            (
                str(layer),
                " ".join(map(str, one.partner)),
                *map(short, (one.mean, one.excess, one.p)),
                f"{one.kept} of {len(one.partner)}",
                short(one.kept_p),
            )
            for layer, one in layers
        ]
        for name, layers in match.by_kind().items()
    }


def print_match(label: str, match: Match, console: Console) -> None:
    """The partner of each head by layer, by each similarity."""
    both = f"{match.reference} (step {match.reference_step}), matched with heads of {label} (step {match.step})"
    for name, rows in match_rows(match).items():
        console.print(f"heads of {both}, by {name}")
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for heading in MATCH_HEADINGS:
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def match_answer(run_dir: Path, match: Match) -> dict[str, Any]:
    """A match for `--json`: everything but the similarities of all pairs, which are in its `file`."""
    layers = []
    for one in match.layers:
        found = {name: getattr(one, name) for name in ("cka", "weights")}
        layers.append(
            {"layer": one.layer}
            | {name: each and {key: value for key, value in vars(each).items() if key != "similarity"}
               for name, each in found.items()}
        )  # fmt: skip
    plain = {key: value for key, value in vars(match).items() if key not in ("layers", "probe")}
    file = str(matches.path_of(run_dir, match.reference_id))
    return {**plain, "file": file, "probe": vars(match.probe), "layers": layers}


_BY_HEAD = ("entropy", "distance", "sink", "divergence")


def _mean_row(inspection: Inspection) -> dict[str, Any]:
    rows = [layer_row(layer) for layer in inspection.layers]
    found: dict[str, Any] = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = _mean(values) if values and name not in ("layer", "rise_head") else None
    return found


def _table(first: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    shown = [name for name, one in MEANINGS.items() if one.column and any(row[name] is not None for _, row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name in (first, *(MEANINGS[name].column for name in shown)):
        table.add_column(name, justify="right")
    for name, row in rows:
        table.add_row(name, *(short(row[key]) for key in shown))
    return table


def short(value: float | None) -> str:
    """A figure with three digits; "-" for none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
