"""docs/spike_score.md: the vectors, a second implementation, and what the documents must say by the page itself."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kha_train.analysis.spikes import LossCurve, score_curve
from kha_train.stability.document import SPECIFICATION, distinct_steps, document, plain
from kha_train.stability.events import Observation
from tests.stability.curves import VECTORS, as_vector, named, random_curve

HERE = Path(__file__).parent
OTHER = HERE / "spike_score.js"
NODE = shutil.which("node") or ""
RANDOM = 200


def observations(vector: dict[str, Any]) -> list[Observation]:
    numbers = [[float(cell) if isinstance(cell, str) else cell for cell in row] for row in vector["rows"]]
    return [Observation(*row) for row in numbers]


@pytest.mark.parametrize("name", sorted(named()))
def test_a_vector_has_the_document_that_is_committed(name: str) -> None:
    vector = json.loads((VECTORS / f"{name}.json").read_text())
    assert vector["specification"] == SPECIFICATION
    assert plain(document(observations(vector), vector["planned"])) == vector["document"]


def test_the_vectors_are_those_of_the_generator_and_no_other() -> None:
    assert {file.stem for file in VECTORS.iterdir()} == set(named())
    for name, curve in named().items():
        assert json.loads((VECTORS / f"{name}.json").read_text()) == json.loads(json.dumps(as_vector(curve)))


def documents_of_the_other(files: list[Path]) -> list[dict[str, Any]]:
    answer = subprocess.run([NODE, str(OTHER), *map(str, files)], capture_output=True, text=True, check=True)
    return json.loads(answer.stdout)


@pytest.mark.skipif(not NODE, reason="node is not installed")
def test_an_implementation_in_another_language_gives_every_vector_to_the_last_bit() -> None:
    files = sorted(VECTORS.iterdir())
    for file, found in zip(files, documents_of_the_other(files), strict=True):
        assert found == json.loads(file.read_text())["document"], file.stem


@pytest.mark.slow
@pytest.mark.skipif(not NODE, reason="node is not installed")
def test_both_implementations_agree_on_random_curves(tmp_path: Path) -> None:
    files = [tmp_path / f"{seed}.json" for seed in range(RANDOM)]
    vectors = [as_vector(random_curve(seed)) for seed in range(RANDOM)]
    for file, vector in zip(files, vectors, strict=True):
        file.write_text(json.dumps(vector, allow_nan=False))
    for vector, found in zip(vectors, documents_of_the_other(files), strict=True):
        assert found == json.loads(json.dumps(vector["document"]))
    kinds = {event["class"] for vector in vectors for event in vector["document"]["events"]}
    assert kinds == {"narrow", "wide", "unrecovered", "open"}
    assert any(vector["document"]["summary"]["diverged"] for vector in vectors)


def test_a_narrow_and_a_wide_event_are_as_tall_as_they_were_made() -> None:
    """Calm noise of 0.02 around 3; steps 150 to 153 are 2 higher, steps 200 to 230 are 0.8 higher."""
    found = document(*named()["narrow_and_wide"])
    one, two = found["events"]
    assert (one["start_step"], one["end_step"], one["class"]) == (150, 153, "narrow")
    assert (two["start_step"], two["end_step"], two["class"]) == (200, 230, "wide")
    assert one["area"] == pytest.approx(4 * 2.0, abs=0.2) and two["area"] == pytest.approx(31 * 0.8, abs=1.0)
    assert found["summary"]["steps_in_spike_frac"] == 35 / 300
    # Two of 300 steps; the limits of a Poisson mean given 2 are 0.242209 and 7.224688.
    rate = found["rates"]["per_1k_steps"]
    assert rate["value"] == 2 / 0.3
    assert [rate["low"] * 0.3, rate["high"] * 0.3] == pytest.approx([0.242209, 7.224688], abs=1e-6)


def test_a_curve_too_short_to_judge_has_no_rates_and_zero_is_a_statement() -> None:
    short, calm = document(*named()["too_short"]), document(*named()["calm"])
    assert short["rates"]["per_1k_steps"] == {"value": None, "low": None, "high": None}
    assert short["summary"]["steps_in_spike_frac"] is None and short["summary"]["spikes"] == 0
    assert calm["rates"]["per_1k_steps"]["value"] == 0.0 and calm["summary"]["steps_in_spike_frac"] == 0.0


@pytest.mark.parametrize("name", ["level_shift", "planned", "repeated_steps", "unusable", "tokens_that_stand"])
def test_kha_spikes_gives_the_same_numbers(name: str) -> None:
    rows, planned = named()[name]
    points, repeated = distinct_steps(rows)
    report = score_curve(LossCurve("curve", points, frozenset(planned), repeated)).to_dict()
    expected = document(rows, planned)
    for part in ("scores", "rates"):
        assert plain(report[part]) == plain(expected[part])
    assert plain(report["summary"]) == plain(expected["summary"] | {"rewound_events": 0})
    events = [{key: value for key, value in event.items() if key != "rewound"} for event in report["events"]]
    assert plain(events) == plain(expected["events"])


def test_a_document_is_strict_json() -> None:
    found = document(*named()["not_finite_first"])
    assert math.isnan(found["events"][0]["baseline"])
    assert json.loads(json.dumps(plain(found), allow_nan=False))["events"][0]["baseline"] == "nan"
