"""Which head of a run plays the part of which of another: the best matching, what chance gives, where it is shown."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kha_train.analysis.compare import compare_runs
from kha_train.analysis.heads.analyze import Request
from kha_train.analysis.heads.assignment import assigned
from kha_train.analysis.heads.match import match_runs, matched_layer
from kha_train.analysis.heads.matches import (
    LayerMatch,
    Match,
    Matched,
    chance_of_keeping,
    matched,
    path_of,
    read_matches,
    write_match,
)
from kha_train.analysis.heads.observe import Observer
from kha_train.analysis.heads.page import page_html
from kha_train.analysis.report.page import report_html
from kha_train.cli.main import build
from kha_train.errors import ConfigError, DataError
from kha_train.model.decoder import Decoder
from tests.analysis.heads.test_analyze import NEAR, Captured, cosine, decoder_of, probe
from tests.analysis.heads.test_page import Reader, result


def test_matched_heads_are_those_of_the_largest_sum_over_all_permutations() -> None:
    drawn = np.random.default_rng(2)
    for heads in (1, 2, 4, 6):
        table = drawn.normal(size=(heads, heads))
        sums = {order: table[range(heads), order].sum() for order in itertools.permutations(range(heads))}
        found = matched(table)
        assert found.partner == max(sums, key=sums.__getitem__) == tuple(assigned(table))
        assert found.mean * heads == pytest.approx(max(sums.values()))
        assert found.excess == pytest.approx(found.mean - table.mean())
    assert matched(np.array([[1.0, math.nan], [0.0, 1.0]])) is None


@pytest.mark.parametrize("heads", [1, 2, 3, 6])
def test_the_chance_of_keeping_heads_in_place_is_the_share_of_permutations_that_do(heads: int) -> None:
    same = [sum(a == b for a, b in enumerate(order)) for order in itertools.permutations(range(heads))]
    for kept in range(heads + 1):
        assert chance_of_keeping(kept, heads) == sum(each >= kept for each in same) / len(same)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["normal", "exponential"])
@pytest.mark.parametrize("heads", [4, 12])
def test_tables_without_correspondence_are_significant_no_more_often_than_their_level_says(
    heads: int, noise: str
) -> None:
    """Also where some heads are alike to all heads of the other run, and where the noise is far from normal."""
    drawn, tables, clear = np.random.default_rng(heads), 150, 0
    for _ in range(tables):
        rows, columns = drawn.exponential(size=(heads, 1)), drawn.exponential(size=heads)
        clear += matched(rows + columns + 0.1 * getattr(drawn, noise)(size=(heads, heads))).p <= 0.05
    # Three standard errors of a share of so many.
    assert clear / tables - 0.05 < 3 * math.sqrt(0.05 * 0.95 / tables)


def test_a_permutation_in_noise_is_found() -> None:
    drawn = np.random.default_rng(0)
    order = tuple(drawn.permutation(8).tolist())
    found = matched(0.3 * np.eye(8)[list(order)] + drawn.uniform(size=(8, 1)) + 0.05 * drawn.normal(size=(8, 8)))
    assert found.partner == order and found.p <= 0.05


def watched(decoder: Decoder) -> Observer:
    return Observer(decoder, probe().batches, lambda: None)


def test_similarities_are_those_of_plain_loops_over_tokens() -> None:
    reference, run = decoder_of("gqa"), decoder_of("kha_mlp")
    for layer in range(2):
        found = matched_layer(layer, watched(reference), watched(run))
        ours, theirs = Captured(reference, layer), Captured(run, layer)
        outputs = [one.tokens() - one.tokens().mean(axis=0) for one in (ours, theirs)]
        queries = list(zip(ours.queries(), theirs.queries(), strict=True))
        for h, i in itertools.product(range(4), repeat=2):
            first, second = outputs[0][:, h] @ outputs[0][:, h].T, outputs[1][:, i] @ outputs[1][:, i].T
            aligned = (first * second).sum() / math.sqrt((first * first).sum() * (second * second).sum())
            assert found.cka.similarity[h][i] == pytest.approx(aligned, **NEAR)
            cosines = [cosine(one[2][h], other[2][i]) for one, other in queries]
            assert found.weights.similarity[h][i] == pytest.approx(sum(cosines) / len(cosines), **NEAR)


def test_heads_in_another_order_are_found_again() -> None:
    reference, order = decoder_of("mha", "model.kv_heads=4"), torch.tensor([2, 0, 3, 1])
    run = decoder_of("mha", "model.kv_heads=4")
    for block in run.blocks:
        attention = block.attention
        for name in ("query", "key", "value"):
            weight = getattr(attention, name).weight.data
            weight.copy_(weight.unflatten(0, (4, -1))[order].flatten(0, 1))
        weight = attention.output.weight.data
        weight.copy_(weight.unflatten(1, (4, -1))[:, order].flatten(1))
    for layer in range(2):
        found = matched_layer(layer, watched(reference), watched(run))
        for one in (found.cka, found.weights):
            assert one.partner == tuple(order.argsort().tolist()) and one.kept == 0
            assert one.mean == pytest.approx(1.0, abs=1e-5) and one.excess > 0.1


def test_a_base_without_attention_weights_is_matched_by_its_outputs_alone() -> None:
    both = watched(decoder_of("linear")), watched(decoder_of("linear", noise=0.2))
    found = matched_layer(0, *both)
    assert found.weights is None and found.cka.kept == 4, "the same initial values"


def beside(run: Path, reference: Path, **settings: object) -> Match:
    request = Request(**{"tokens": 256, **settings})
    return match_runs(run, reference, reference.name, request, lambda title, total: nullcontext(lambda count: None))


def test_a_match_is_computed_once_and_belongs_to_two_checkpoints(old_runs: Path) -> None:
    run, reference = old_runs / "kha_mlp", old_runs / "gqa"
    found = beside(run, reference)
    assert read_matches(run) == [found] and read_matches(reference) == []
    assert (found.step, found.reference_step, found.reference) == (72, 72, "gqa")
    assert beside(run, run).layers[0].cka.partner == (0, 1, 2, 3)
    write_match(run, replace(found, tool="another"))
    assert beside(run, reference).tool == "another"
    assert beside(run, reference, tokens=128).probe.rows == 2, "other rows"
    write_match(run, replace(found, reference_manifest="0" * 64, tool="another"))
    assert beside(run, reference) == found
    write_match(run, replace(found, manifest="0" * 64))
    assert found.reference_id not in [one.reference_id for one in read_matches(run)]
    path_of(run, found.reference_id).write_text("{")
    for read in (lambda: read_matches(run), lambda: beside(run, reference)):
        with pytest.raises(DataError, match="match-"):
            read()


def test_runs_that_cannot_be_matched_are_refused(old_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = old_runs / "kha_mlp", old_runs / "other"
    shutil.copytree(old_runs / "gqa", other)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("query_heads: 4", "query_heads: 2"))
    with pytest.raises(ConfigError, match="query heads differ"):
        beside(run, other)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ConfigError, match="needs scipy") as refused:
        beside(run, old_runs / "gqa")
    assert refused.value.field == "--match" and "kha_train[lab]" in refused.value.fix


def test_the_command_the_page_and_the_report_show_it(old_runs: Path) -> None:
    run, reference = old_runs / "kha_mlp", old_runs / "gqa"
    options = ["--tokens", "64", "--no-silence", "--match", str(reference)]

    def kha(*further: str) -> str:
        ended = CliRunner().invoke(build(["analyze"]), ["analyze", str(run), str(reference), *options, *further])
        assert ended.exit_code == 0, ended.output
        return ended.stdout

    answer = json.loads(kha("--json"))["runs"]
    assert answer[1]["matches"] == [], "a run is not matched with itself"
    (match,) = answer[0]["matches"]
    (saved,) = read_matches(run)
    assert match["layers"][0]["cka"]["partner"] == list(saved.layers[0].cka.partner)
    assert "similarity" not in match["layers"][0]["cka"] and Path(match["file"]).is_file()
    partners = " ".join(map(str, saved.layers[1].cka.partner))
    printed = " ".join(kha().split())
    assert partners in printed and "matched with heads of kha_mlp (step 72), by CKA of outputs" in printed
    assert partners in Reader((run / "analysis" / "index.html").read_text()).text
    report = report_html(compare_runs([reference, run]))
    assert "Heads of one run for those of another" in report and "kha_mlp-s0, for gqa-s0" in report
    write_match(run, replace(saved, reference_manifest="0" * 64))
    assert "Heads of one run" not in report_html(compare_runs([reference, run]))
    path_of(run, saved.reference_id).write_text("{")
    assert f"{path_of(run, saved.reference_id)}" in report_html(compare_runs([reference, run]))


def test_foreign_names_on_the_page_are_text() -> None:
    one = Matched(((1.0, 0.0), (0.0, 1.0)), (0, 1), 1.0, 0.5, 0.4, 2, 0.5)
    match = Match(1, "kha_train", 5, "0", "<script>other", "id", 5, "1", result(5).probe, (LayerMatch(0, one, None),))
    page = Reader(page_html("run", [result(5)], "mark", [match]))
    assert page.tags.isdisjoint({"script"}) and "<script>other" in page.text and "2 of 2" in page.text
