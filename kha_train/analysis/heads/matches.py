"""Which head of a run plays the part of which head of another: the saved results of `kha analyze --match`.

Within each layer, heads of both runs are matched one to one, so that matched heads are as alike as possible. Some
matching is always the best one, so it is judged against tables of similarities without any correspondence. One file
for each other run, `<run.dir>/analysis/match-XXXXXXXXXXXXXXXX.json`, named by a hash of that run's id.
"""

# H heads of the reference, and as many of the run

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kha_train.analysis.heads.assignment import assigned
from kha_train.analysis.heads.inspection import FOLDER, ProbeRows, Square, is_current, saved_values
from kha_train.foreign.typed import Source
from kha_train.record.files import replace_json

SCHEMA = 1
"""The version of the format. A result of another version is not read, and computed again."""
SHUFFLES = 199
"""Shuffled tables, which make p a multiple of 1 / 200."""
_NAME = re.compile(r"match-[0-9a-f]{16}\.json")
_FIX = "remove it; `kha analyze --match` makes it again"


@dataclass(frozen=True)
class Matched:
    """The heads of one layer, matched by one similarity: `similarity[h][i]` is that of head h of the reference and head
    i of the run, and head `partner[h]` of the run plays the part of head h.

    `mean` is the mean similarity of matched heads, and `excess` by how much it exceeds the mean of all pairs. `p` is
    the share of shuffled tables whose best matching has as large an excess, see `matched`. `kept` counts the heads
    whose partner has their own number, and `kept_p` is the probability of at least so many by chance.
    """

    similarity: Square
    partner: tuple[int, ...]
    mean: float
    excess: float
    p: float
    kept: int
    kept_p: float


@dataclass(frozen=True)
class LayerMatch:
    """A layer by the linear CKA of head outputs, and by the mean cosine of attention weights over query tokens. None
    where a base has no such weights, or where numbers are not finite.
    """

    layer: int
    cka: Matched | None
    weights: Matched | None


@dataclass(frozen=True)
class Match:
    """A checkpoint of a run beside one of the run `reference`, whose id is `reference_id`. The manifests are the
    SHA-256 of those of the checkpoints.
    """

    schema: int
    tool: str
    step: int
    manifest: str
    reference: str
    reference_id: str
    reference_step: int
    reference_manifest: str
    probe: ProbeRows
    layers: tuple[LayerMatch, ...]

    def by_kind(self) -> dict[str, list[tuple[int, Matched]]]:
        """The layers that were matched by each similarity, with their numbers, under its name for readers."""
        named = {
            "CKA of outputs": [(one.layer, one.cka) for one in self.layers if one.cka],
            "cosine of attention weights": [(one.layer, one.weights) for one in self.layers if one.weights],
        }
        return {name: found for name, found in named.items() if found}


def matched(similarity_HH: np.ndarray) -> Matched | None:
    """The best matching of a table, and what chance would give; None where a number is not finite.

    The excess does not depend on how alike a head is to all heads of the other run: each row and column counts once in
    any matching, so their means cancel. What is left after taking them away is shuffled over the whole table, and
    scaled to the variance that is left after taking the means of the shuffled table away. The shuffles are seeded.
    """
    if not np.isfinite(similarity_HH).all():
        return None
    heads, drawn = len(similarity_HH), np.random.default_rng(0)
    partner_H = assigned(similarity_HH)
    excess = _excess(similarity_HH, partner_H)
    rest_HH = similarity_HH - similarity_HH.mean(0) - similarity_HH.mean(1, keepdims=True) + similarity_HH.mean()
    rest_HH *= math.sqrt((heads + 1) / max(1, heads - 1))
    shuffled = (drawn.permutation(rest_HH.ravel()).reshape(heads, heads) for _ in range(SHUFFLES))
    reached = sum(_excess(one_HH, assigned(one_HH)) >= excess - 1e-12 for one_HH in shuffled)
    kept = int((partner_H == np.arange(heads)).sum())
    return Matched(
        tuple(tuple(row) for row in similarity_HH.tolist()),
        tuple(partner_H.tolist()),
        float(similarity_HH[np.arange(heads), partner_H].mean()),
        excess,
        (1 + reached) / (1 + SHUFFLES),
        kept,
        chance_of_keeping(kept, heads),
    )


def chance_of_keeping(kept: int, heads: int) -> float:
    """The probability that a random permutation of `heads` leaves at least `kept` of them in place."""
    # Permutations of m that leave none in place: d(m) = (m - 1) (d(m - 1) + d(m - 2)).
    moved = [1, 0]
    for count in range(2, heads + 1):
        moved.append((count - 1) * (moved[-1] + moved[-2]))
    ways = sum(math.comb(heads, same) * moved[heads - same] for same in range(kept, heads + 1))
    return ways / math.factorial(heads)


def path_of(run_dir: Path, reference_id: str) -> Path:
    """The file of the match of a run with the run of that id."""
    name = hashlib.sha256(reference_id.encode()).hexdigest()[:16]
    return run_dir / FOLDER / f"match-{name}.json"


def write_match(run_dir: Path, match: Match) -> Path:
    """Writes the result to its file, atomically, and returns the path. Raises OSError."""
    path = path_of(run_dir, match.reference_id)
    path.parent.mkdir(exist_ok=True)
    replace_json(path, asdict(match))
    return path


def read_match(run_dir: Path, reference_id: str) -> Match | None:
    """The match of a run with the run of that id; None where there is none of this version. Raises DataError when it is
    damaged.
    """
    return _read(path_of(run_dir, reference_id))


def read_matches(run_dir: Path) -> list[Match]:
    """The matches of a run whose own checkpoint is still that of the run, by reference. Raises DataError when a file is
    damaged, OSError when it cannot be read.
    """
    folder = run_dir / FOLDER
    names = sorted(path.name for path in folder.iterdir() if _NAME.fullmatch(path.name)) if folder.is_dir() else []
    found = [match for name in names if (match := _read(folder / name)) is not None]
    return sorted((one for one in found if is_current(run_dir, one.step, one.manifest)), key=lambda one: one.reference)


def _read(path: Path) -> Match | None:
    source = Source(str(path), fix=_FIX)
    values = saved_values(path, source)
    if values is None or values["schema"] != SCHEMA:
        return None
    return source.read(Match, values)


def _excess(values_HH: np.ndarray, partner_H: np.ndarray) -> float:
    return float(values_HH[np.arange(len(values_HH)), partner_H].mean() - values_HH.mean())
