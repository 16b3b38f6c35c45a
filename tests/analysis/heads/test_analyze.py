"""What `kha analyze` finds equals plain loops over what a model computes, and is kept beside the run."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from kha_train.analysis.heads.analyze import Request, analyze_run, inspect
from kha_train.analysis.heads.inspection import (
    Inspection,
    ProbeRows,
    mean_off_diagonal,
    path_of,
    read_inspection,
    read_inspections,
    write_inspection,
)
from kha_train.analysis.heads.observe import Observer
from kha_train.analysis.heads.probe_rows import Probe, open_probe
from kha_train.cli.main import build
from kha_train.config.compose import compose
from kha_train.config.resolve import resolve_decoding
from kha_train.data.rows.batch import Batch
from kha_train.data.rows.packing import Layout
from kha_train.errors import CheckpointError, ConfigError, DataError, FormatError, KhaError
from kha_train.model.attention.base import Attention
from kha_train.model.attention.projection import OutputProjection
from kha_train.model.decoder import Decoder, build_decoder
from kha_train.model.host import inputs_of

SMALL = ("model.layers=2", "model.hidden_size=32", "model.head_dim=8", "model.vocab_size=64", "model.seq_len=24")
VARIANTS = (
    *("gqa", "gta", "mla", "talking_heads", "diff", "linear", "gated"),
    *("kha_linear", "kha_mlp", "kha_gate", "mea"),
)
T, FILLED, BORDERS = 24, (24, 20), (0, 1, 7, 24, 33, 44, 48)
"""Two rows: documents of 1, 6, 17, 9 and 11 tokens, and 4 places of padding at the end."""
NEAR = {"rel": 1e-6, "abs": 1e-9}


def decoder_of(variant: str, *overrides: str, noise: float = 0.3) -> Decoder:
    config = compose([*SMALL, f"attention={variant}", "moe.backend=loop", *overrides])
    decoder = build_decoder(config, resolve_decoding(config))
    drawn = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=drawn))
    return decoder.eval()


def probe() -> Probe:
    rows = np.random.default_rng(1).integers(0, 64, (2, T + 1)).astype(np.uint16)
    masked = np.array([0, 6, 23, 32, 43, *range(44, 48)])
    batch = Batch(np.arange(2), rows, Layout(np.array(BORDERS), masked, np.array(FILLED)))
    about = ProbeRows("data.validation", "content", "digest", 2, batch.token_count, 5, 0)
    return Probe(tuple(batch.micro_batches(1)), about)


@cache
def seen(variant: str) -> Inspection:
    return inspect(decoder_of(variant), 7, "manifest", probe(), True, lambda count: None)


class Captured:
    """The head outputs of a layer, and what it hands to its backend, row by row."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        self.outputs: list[Tensor] = []
        self.attended: list[tuple[Tensor, Tensor, float]] = []
        (attention,) = [module for module in decoder.blocks[layer].modules() if isinstance(module, Attention)]
        (output,) = [module for module in attention.modules() if isinstance(module, OutputProjection)]
        hook = output.register_forward_pre_hook(lambda module, given: self.outputs.append(given[0].double()))
        backend = attention.attend

        def attend(q: Tensor, k: Tensor, v: Tensor, documents: object, scale: float) -> Tensor:
            self.attended.append((q[0].double(), k[0].double(), scale))
            return backend(q, k, v, documents, scale)

        attention.attend = attend
        with torch.no_grad():
            for batch in probe().batches:
                decoder(*inputs_of(batch, torch.device("cpu")))
        hook.remove()
        attention.attend = backend
        self.score_mix = getattr(attention, "score_mix", None)

    def tokens(self) -> np.ndarray:
        """The outputs of tokens without padding, [N, H, W]."""
        return np.concatenate([out[0, :filled].numpy() for out, filled in zip(self.outputs, FILLED, strict=True)])

    def queries(self) -> list[tuple[int, int, list[np.ndarray]]]:
        """For each token with an earlier one in its document: its row, the place of the document's first token and, for
        each head, the weights over the document's tokens up to it.
        """
        found = []
        for row, (q, k, scale) in enumerate(self.attended):
            group = q.shape[1] // k.shape[1]
            borders = [border - row * T for border in BORDERS if row * T <= border < row * T + FILLED[row]]
            for place in range(FILLED[row]):
                first = max(border for border in borders if border <= place)
                scores = [
                    [scale * sum(a * b for a, b in zip(q[place, h].tolist(), k[u, h // group].tolist(), strict=True))
                     for u in range(first, place + 1)] for h in range(q.shape[1])
                ]  # fmt: skip
                if self.score_mix is not None:
                    mix = self.score_mix().detach().double().numpy()
                    scores = [
                        [sum(scores[i][u] * mix[i, h] for i in range(len(scores))) for u in range(len(scores[0]))]
                        for h in range(len(scores))
                    ]
                exponentials = [np.exp(np.array(row) - max(row)) for row in scores]
                if place > first:
                    found.append((place, first, [one / one.sum() for one in exponentials]))
        return found


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second / math.sqrt((first @ first) * (second @ second)))


def entropy(shares: np.ndarray) -> float:
    return -sum(share * math.log(share) for share in shares.tolist() if share > 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_of_heads_are_as_alike_as_plain_loops_over_tokens_say(variant: str) -> None:
    decoder, found = decoder_of(variant), seen(variant)
    for layer in range(2):
        out, outputs = Captured(decoder, layer).tokens(), found.layers[layer].outputs
        N, H, W = out.shape
        assert (N, W) == (44, outputs.width)
        apart = out - out.mean(axis=0)
        for a in range(H):
            for b in range(H):
                for values, cosines in ((out, outputs.cosine), (apart, outputs.centred_cosine)):
                    each = [cosine(values[n, a], values[n, b]) for n in range(N)]
                    assert cosines[a][b] == pytest.approx(sum(each) / N, **NEAR)
                # Kornblith et al. 2019: by the N x N Gram matrices, here without any covariance.
                first, second = apart[:, a] @ apart[:, a].T, apart[:, b] @ apart[:, b].T
                aligned = (first * second).sum() / math.sqrt((first * first).sum() * (second * second).sum())
                assert outputs.cka[a][b] == pytest.approx(aligned, **NEAR)
            shares = np.linalg.svd(apart[:, a], compute_uv=False) ** 2
            assert outputs.ranks[a] == pytest.approx(math.exp(entropy(shares / shares.sum())), **NEAR)
        for square, rank in ((outputs.cosine, outputs.cosine_rank), (outputs.centred_cosine, outputs.centred_rank)):
            shares = np.linalg.eigvals(np.array(square)).real / H
            assert rank == pytest.approx(math.exp(entropy(shares)), **NEAR)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_weights_give_the_figures_of_plain_loops_over_queries(variant: str) -> None:
    decoder, found = decoder_of(variant), seen(variant)
    if variant == "linear":
        assert "no attention weights that sum to 1" in found.absent["weights"]
        return
    assert found.probe.queries == 44 - 5 and found.probe.tokens == 44
    for layer in range(2):
        queries, weights = Captured(decoder, layer).queries(), found.layers[layer].weights
        assert len(queries) == found.probe.queries
        for head in range(found.query_heads):
            figures = [
                (
                    entropy(by_head[head]) / math.log(place - first + 1),
                    sum(share * (place - first - u) for u, share in enumerate(by_head[head])),
                    by_head[head][0],
                )
                for place, first, by_head in queries
            ]
            expected = [sum(column) / len(queries) for column in zip(*figures, strict=True)]
            assert [weights.entropy[head], weights.distance[head], weights.sink[head]] == pytest.approx(
                expected, **NEAR
            )
        mean = [entropy(sum(by_head) / len(by_head)) for *_, by_head in queries]
        spread = [
            one - sum(map(entropy, by_head)) / len(by_head) for one, (*_, by_head) in zip(mean, queries, strict=True)
        ]
        assert weights.diversity == pytest.approx(sum(spread) / len(queries), **NEAR)
        assert sum(weights.divergence) / found.query_heads == pytest.approx(weights.diversity, **NEAR)


def error_of(decoder: Decoder, without: Decoder) -> float:
    """The standard error of a mean difference of losses, from its sums in each of the five documents with labels."""
    losses: list[list[float]] = []
    for batch in probe().batches:
        given = inputs_of(batch, torch.device("cpu"))
        with torch.no_grad():
            both = [model(*given, by_token=True).tokens.nats[0] for model in (without, decoder)]
        rises = (both[0] - both[1]).tolist()
        borders, labels = batch.cu_seqlens_S.tolist(), batch.labels_BT[0].tolist()
        for first, last in itertools.pairwise(borders):
            losses.append([rises[place] for place in range(first, last) if labels[place] >= 0])
    losses = [document for document in losses if document]
    every = [rise for document in losses for rise in document]
    mean = sum(every) / len(every)
    squares = sum(sum(rise - mean for rise in document) ** 2 for document in losses)
    return math.sqrt(squares * len(losses) / (len(losses) - 1)) / len(every)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_without_a_head_is_that_of_a_projection_whose_weights_for_it_are_zero(variant: str) -> None:
    decoder = decoder_of(variant).double()
    found = inspect(decoder, 7, "manifest", probe(), True, lambda count: None)

    def loss(model: nn.Module) -> float:
        with torch.no_grad():
            sums = [model(*inputs_of(batch, torch.device("cpu"))).loss_sum.item() for batch in probe().batches]
        return sum(sums) / sum(batch.label_count for batch in probe().batches)

    assert found.loss == pytest.approx(loss(decoder), abs=1e-12)
    for layer, head in ((0, 1), (1, 3)):
        without = deepcopy(decoder)
        output, width = without.blocks[layer].attention.output, found.layers[layer].outputs.width
        output.weight.data[:, head * width : (head + 1) * width] = 0.0
        rise = found.layers[layer].rise[head]
        assert found.layers[layer].rise_error[head] == pytest.approx(error_of(decoder, without), rel=1e-9)
        assert rise == pytest.approx(loss(without) - loss(decoder), abs=1e-12) and abs(rise) > 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_forward_that_is_watched_is_the_same_to_the_bit_and_leaves_nothing_behind(variant: str) -> None:
    decoder = decoder_of(variant)
    before = [torch.equal(*pair) for pair in zip(*_logits(decoder), strict=True)]
    backends = [module.attend for module in decoder.modules() if isinstance(module, Attention)]
    expected = _logits(decoder)[0]
    observer = Observer(decoder, probe().batches, lambda: None)
    _, nats = observer.sums(observer.mean_outputs())
    assert all(before) and all(map(torch.equal, expected, _logits(decoder)[0]))
    assert backends == [module.attend for module in decoder.modules() if isinstance(module, Attention)]
    assert not any(module._forward_pre_hooks for module in decoder.modules())
    assert len(nats) == sum(batch.label_count for batch in probe().batches)


def _logits(decoder: Decoder) -> tuple[list[Tensor], list[Tensor]]:
    with torch.no_grad():
        inputs = [inputs_of(batch, torch.device("cpu")) for batch in probe().batches]
        return tuple([decoder(*given._replace(labels_BT=None)).logits_BTV for given in inputs] for _ in range(2))


@pytest.mark.parametrize("variant", ["kha_linear", "kha_mlp", "kha_gate", "mea", "talking_heads"])
def test_an_untrained_matrix_is_the_identity_exactly(variant: str) -> None:
    found = inspect(decoder_of(variant, noise=0.0), 0, "manifest", probe(), False, lambda count: None)
    names = set(found.matrices())
    assert len(names) == {"kha_linear": 3, "kha_mlp": 4, "kha_gate": 2, "mea": 2, "talking_heads": 2}[variant]
    for layer in found.layers:
        assert {matrix.name for matrix in layer.matrices} == names
        for matrix in layer.matrices:
            assert matrix.distance == 0.0 and matrix.off_diagonal_rms == 0.0
            assert matrix.array_RC().tolist() == (matrix.identity * np.eye(len(matrix.values))).tolist()
        for gate in layer.gates:
            assert (gate.mean, gate.deviation) == (0.5, 0.0) and set(gate.head_means) == {0.5}
    assert found.absent["rise"] and all(layer.rise is None for layer in found.layers)


@pytest.mark.parametrize("variant", ["kha_linear", "kha_mlp", "mea", "talking_heads"])
def test_figures_of_a_matrix_follow_from_its_numbers(variant: str) -> None:
    decoder = decoder_of(variant)
    parameters = {name: value.detach().double().numpy() for name, value in decoder.named_parameters()}
    for layer in seen(variant).layers:
        for matrix in (one for one in layer.matrices if one.acts != "effective"):
            values = parameters[f"blocks.{layer.layer}.attention.{matrix.name}.weight"]
            size = len(values)
            on = [values[i, i] for i in range(size)]
            off = [values[i, j] for i in range(size) for j in range(size) if i != j]
            apart = [values[i, j] - matrix.identity * (i == j) for i in range(size) for j in range(size)]
            assert matrix.distance == pytest.approx(math.sqrt(sum(one**2 for one in apart)))
            assert matrix.diagonal_mean == pytest.approx(sum(on) / size)
            squares = sum(one**2 for one in on), sum(one**2 for one in off)
            assert matrix.diagonal_mass == pytest.approx(squares[0] / sum(squares))
            assert matrix.off_diagonal_ratio == pytest.approx(math.sqrt(squares[1] / squares[0]))
            assert matrix.off_diagonal_rms == pytest.approx(math.sqrt(squares[1] / len(off)))
            eigenvalues = np.linalg.eigvalsh(values.T @ values)[::-1].clip(0)
            assert matrix.singular == pytest.approx(np.sqrt(eigenvalues).tolist(), abs=1e-6)
            assert matrix.array_RC() == pytest.approx(values, rel=1e-3)
            assert matrix.acts == ("across" if size == 4 and variant in ("mea", "talking_heads") else matrix.acts)


@pytest.mark.parametrize("variant", ["kha_mlp", "kha_gate"])
def test_the_effective_map_of_a_gate_is_the_mean_of_its_derivatives(variant: str) -> None:
    decoder = decoder_of(variant)
    module = deepcopy(decoder.blocks[0].attention.interaction.maps["v"]).double()
    inputs: list[Tensor] = []
    hook = (
        decoder.blocks[0]
        .attention.interaction.maps["v"]
        .register_forward_pre_hook(lambda module, given: inputs.append(given[0].detach().double()))
    )
    _logits(decoder)
    hook.remove()
    rows = [x[0, :filled].flatten(0, 1) for x, filled in zip(inputs, FILLED, strict=False)]
    each = [
        torch.autograd.functional.jacobian(lambda x: module(x[None, None, None])[0, 0, 0], one)
        for one in torch.cat(rows)
    ]
    (effective,) = [one for one in seen(variant).layers[0].matrices if one.acts == "effective"]
    # The jacobian is d y_j / d x_i at [j, i]; a map x M has it at [i, j].
    expected = torch.stack(each).mean(dim=0).T.numpy()
    assert effective.array_RC() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    own = decoder_of(variant, "attention.interaction.share=none", noise=0.0)
    alone = inspect(own, 0, "manifest", probe(), False, lambda count: None)
    assert {f"interaction.maps.v[{head}]" for head in range(2)} <= set(alone.matrices())
    assert all(matrix.distance == 0.0 for layer in alone.layers for matrix in layer.matrices)
    (gate,) = seen(variant).layers[0].gates
    assert gate.mean != 0.5 and gate.deviation > 0 and gate.name == effective.name == "interaction.maps.v"


@pytest.mark.parametrize(("gating", "width"), [("headwise", 1), ("elementwise", 8)])
def test_an_output_gate_is_seen_and_its_heads_as_the_projection_reads_them(gating: str, width: int) -> None:
    decoder = decoder_of("gqa", f"attention.base.output_gate={gating}")
    gates: list[Tensor] = []
    hook = decoder.blocks[1].attention.gate.register_forward_hook(lambda module, given, out: gates.append(out.double()))
    out = Captured(decoder, 1).tokens()
    hook.remove()
    values = np.concatenate([one[0, :filled].numpy() for one, filled in zip(gates, FILLED, strict=True)])
    assert values.shape == (44, 4, width)
    found = inspect(decoder, 7, "manifest", probe(), False, lambda count: None).layers[1]
    (gate,) = found.gates
    assert (gate.name, found.matrices) == ("gate", ())
    assert (gate.mean, gate.deviation) == pytest.approx((values.mean(), values.std()), **NEAR)
    assert gate.closed == pytest.approx((values < 0.1).mean(), **NEAR) and 0 < gate.closed < 1
    assert gate.head_means == pytest.approx(values.mean(axis=(0, 2)).tolist(), **NEAR)
    assert found.outputs.cosine[0][3] == pytest.approx(sum(map(cosine, out[:, 0], out[:, 3])) / 44, **NEAR)


def test_a_bias_of_the_scores_counts_and_rows_of_one_document_need_no_borders() -> None:
    decoder = decoder_of("gqa", "attention.positions=alibi")
    for block in decoder.blocks:
        block.attention.query.weight.data.zero_()
    row = Layout(np.array([0, T]), np.empty(0, np.int64))
    batches = tuple(Batch(one.samples_B, one.rows_BW, row) for one in probe().batches)
    found = inspect(decoder, 1, "manifest", Probe(batches, probe().about), False, lambda count: None)
    assert found.probe.queries == 2 * (T - 1)
    for head, distance in enumerate(found.layers[0].weights.distance):
        means = []
        for place in range(1, T):
            # ALiBi of four heads: 1/4, 1/16, 1/64, 1/256 for each token of distance.
            shares = [math.exp(-(4.0 ** -(head + 1)) * away) for away in range(place + 1)]
            means.append(sum(away * share for away, share in enumerate(shares)) / sum(shares))
        assert distance == pytest.approx(sum(means) / (T - 1), rel=1e-6)


def look(run: Path, **settings: object) -> list[Inspection]:
    from contextlib import nullcontext

    request = Request(**{"tokens": 256, "silence": False, **settings})
    return analyze_run(run, request, lambda path, error: None, lambda title, total: nullcontext(lambda count: None))


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and "analysis" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_of_any_stage_is_looked_at_and_nothing_but_the_result_is_written(old_runs: Path) -> None:
    for name in ("gqa", "kha_mlp"):
        before = contents(old_runs / name)
        (found,) = look(old_runs / name)
        assert contents(old_runs / name) == before
        assert [path.name for path in (old_runs / name / "analysis").iterdir()] == ["step-00000072.json"]
        assert read_inspections(old_runs / name) == [found] and found.step == 72
        json.loads(path_of(old_runs / name, 72).read_text(), parse_constant=pytest.fail)
    runs = [read_inspections(old_runs / name)[0] for name in ("gqa", "kha_mlp")]
    assert runs[0].probe == runs[1].probe, "the same data, so the same rows"
    assert set(runs[0].absent) == {"rise", "gates", "matrices", "clusters"}
    assert set(runs[1].absent) == {"rise", "clusters"}


def test_a_result_is_computed_again_only_if_its_checkpoint_or_the_question_is_another(old_runs: Path) -> None:
    run, path = old_runs / "gqa", path_of(old_runs / "gqa", 72)
    (first,) = look(run)
    written = path.stat().st_mtime_ns
    assert look(run) == [first] and path.stat().st_mtime_ns == written
    write_inspection(run, replace(first, manifest="0" * 64, loss=-1.0))
    assert read_inspections(run) == [] and look(run) == [first]
    write_inspection(run, replace(first, loss=-1.0))
    assert look(run)[0].loss == -1.0 and look(run, again=True) == [first]
    (more,) = look(run, silence=True)
    assert all(len(layer.rise) == 4 for layer in more.layers) and look(run) == [more]
    assert look(run, tokens=128)[0].probe.rows == 2 != more.probe.rows


def test_a_result_outlives_its_checkpoint_but_not_the_steps_that_were_undone(old_runs: Path) -> None:
    run = old_runs / "gqa"
    (found,) = look(run)
    for step in (40, 60):
        write_inspection(run, replace(found, step=step))
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    undone = {**line, "step": 60, "discarded_reason": "restart", "discarded_by_attempt": 2}
    (run / "metrics.discarded.jsonl").write_text(json.dumps(undone) + "\n")
    assert [one.step for one in read_inspections(run)] == [40, 72]


def test_damage_is_told_and_never_written_over(old_runs: Path) -> None:
    run, path = old_runs / "gqa", path_of(old_runs / "gqa", 72)
    look(run)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "schema": 99}))
    assert read_inspections(run) == []
    with pytest.raises(FormatError, match="later version"):
        look(run)
    for broken in ("{", "[]", json.dumps({**content, "layers": 3}), json.dumps({"schema": 1})):
        path.write_text(broken)
        for read in (read_inspections, look):
            with pytest.raises(DataError, match="step-00000072"):
                read(run)
        assert path.read_text() == broken
    path.unlink()
    (weights,) = (run / "checkpoints").glob("step-*/model-*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="content has changed"):
        look(run)
    assert weights.is_file() and not path.exists()
    with pytest.raises(ConfigError, match="no such"):
        look(run.parent / "missing")


def test_the_others_are_looked_at_beside_a_damaged_checkpoint_or_run(old_runs: Path) -> None:
    whole, run = old_runs / "kha_mlp", old_runs / "gqa"
    older = run / "checkpoints" / "step-00000040"
    shutil.copytree(run / "checkpoints" / "step-00000072", older)
    shutil.copytree(run, old_runs / "none")
    shutil.rmtree(old_runs / "none" / "checkpoints")
    (old_runs / "none" / "events.jsonl").write_text("")

    def kha(*arguments: str) -> tuple[int, str]:
        ended = CliRunner().invoke(build(["analyze"]), ["analyze", "--tokens", "64", "--no-silence", *arguments])
        return (ended.exception.exit_code if isinstance(ended.exception, KhaError) else ended.exit_code), ended.output

    code, said = kha(str(old_runs))
    assert code == 0 and "skipped" in said and "no checkpoint yet" in said and said.count("page: ") == 2
    assert [one.step for one in read_inspections(run)] == [72], "the copy under another step is none"
    code, said = kha(str(run), "--every-checkpoint", "--again")
    assert code == 4 and "step-00000040 is passed over" in said and "page: " in said
    for weights in run.glob("checkpoints/*/model-*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    code, said = kha(str(run), str(whole), "--again")
    assert code == 4 and f"{run} is passed over" in said and said.count("page: ") == 1
    assert kha(str(run), "--again")[0] == 4 and kha(str(old_runs / "none"))[0] == 2


def test_numbers_that_are_not_finite_are_kept_as_such(old_runs: Path) -> None:
    decoder = decoder_of("mea", "attention.base.kv_heads=4", "model.kv_heads=4")
    with torch.no_grad():
        decoder.embedding.weight.fill_(math.nan)
        decoder.blocks[0].attention.interaction.compose["k"].weight.fill_(math.nan)
    found = inspect(decoder, 5, "0" * 64, probe(), True, lambda count: None)
    write_inspection(old_runs / "gqa", found)
    again = read_inspection(old_runs / "gqa", 5, "0" * 64)
    assert math.isnan(again.loss) and math.isnan(mean_off_diagonal(again.layers[0].outputs.cosine))
    assert again.layers[0].matrices[0].singular == () and len(again.layers[1].matrices[0].singular) == 4
    assert str(again) == str(found).replace("values=[[nan", "values=[[nan")


def test_the_probe_is_spread_over_the_set_and_the_same_whoever_trained(small: list[str], dataset: Path) -> None:
    config = compose([*small, "run.seed=0"])
    first = open_probe(config, 256)
    assert first.about.rows == 4 and first.about.tokens == 256 and first.about.field == "data.validation"
    assert open_probe(compose([*small, "run.seed=1", "attention=mla"]), 256).about == first.about
    numbers = np.concatenate([batch.samples_B for batch in first.batches])
    assert numbers[0] == 0 and len(set(np.diff(numbers))) <= 2 and numbers[-1] > 4
    other = open_probe(config, 256, f"{dataset}/train")
    assert other.about.field == "--data" and other.about.digest != first.about.digest
    config = replace(config, data=replace(config.data, validation=""))
    assert open_probe(config, 256).about == replace(other.about, field="data.train")
    assert open_probe(config, 10**9).about.rows > 100


def test_padding_is_no_token_of_the_probe(padded: list[str]) -> None:
    about = open_probe(compose(padded), 256).about
    assert about.rows == 4 and about.tokens < 256 and about.documents == 4
