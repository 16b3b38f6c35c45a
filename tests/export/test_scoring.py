"""An export scores what its run scores, and what lm-evaluation-harness makes of it by itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from kha_train import compose
from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.weights import write_weights
from kha_train.cli.main import app
from kha_train.config.build import to_plain
from kha_train.config.compose import dump
from kha_train.decode.sampling import Sampling
from kha_train.errors import ConfigError
from kha_train.evaluate.harness import Suite
from kha_train.evaluate.harness_data import Choice
from kha_train.evaluate.harness_results import TaskResult, results_of
from kha_train.evaluate.opening import open_tasks
from kha_train.evaluate.requests import score_rows
from kha_train.evaluate.scoring import evaluate
from kha_train.evaluate.text_model import DecoderModel, Text, TextModel
from kha_train.export.hugging_face import load_tokenizer
from kha_train.export.scoring import ExportModel, TheirTokenizer, open_export
from tests.data.test_tokenizer_json import byte_fallback
from tests.evaluate.conftest import corpus, make_decoder, write_lines

__all__ = ["corpus", "make_decoder", "write_lines"]
pytestmark = pytest.mark.slow
TASKS = ("kha_choice", "kha_prose", "kha_induction")


def figures(results: dict[str, TaskResult]) -> dict[str, float | None]:
    return {f"{task} {name}": figure.value for task, found in results.items() for name, figure in found.figures.items()}


def scored(suite: Suite, model: TextModel) -> dict[str, float | None]:
    asked = suite.ask(model.text)
    return figures(suite.results(model.text, asked, score_rows(model, asked.rows, 8, lambda count: None), []))


@pytest.mark.parametrize("preset", ["kha_linear", "kha_mlp"])
def test_run_export_and_the_harness_alone_come_to_the_same_scores(
    preset: str, corpus: Any, make_decoder: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kha_linear is absorbed into the stock class, kha_mlp is a drop-in head of it."""
    config = compose(
        [*corpus.overrides, f"attention={preset}", "engine.micro_batch_size=4", "evaluation.tasks=[context]"]
    )
    decoder, run, out = make_decoder(preset), tmp_path / "run", tmp_path / "out"
    state, names = decoder.state_dict(), [name for name, _ in decoder.named_parameters()]
    pieces = [Piece(name, "master", tuple(state[name].shape), 0, state[name].flatten()) for name in names]
    write_weights(run, to_plain(config), pieces, {name: state[name] for name in state.keys() - {*names, "head.weight"}})
    (run / "config.yaml").write_text(dump(config))
    (tmp_path / "lines.txt").write_text("\n".join(corpus.held_out))
    lines = ["--lines", str(tmp_path / "lines.txt")]
    answer = CliRunner().invoke(app, ["export", str(run), "--out", str(out), *lines])
    assert answer.exit_code == 0, answer.output

    ours, theirs = (
        DecoderModel(decoder, Text.of(corpus.tokenizer, config.model.seq_len)),
        open_export(out, "", torch.device("cpu")),
    )
    assert (theirs.text.context, theirs.text.prefix) == (ours.text.context, ours.text.prefix)
    tasks = open_tasks(config)
    expected = evaluate(ours, tasks)
    assert evaluate(theirs, tasks) == pytest.approx(expected, rel=1e-5) and len(expected) > 8
    suite = Suite(Choice(TASKS))
    assert scored(suite, theirs) == pytest.approx(scored(suite, ours), rel=1e-4)
    assert scored(suite, theirs) == pytest.approx(alone(suite, theirs, out, monkeypatch), rel=1e-4)
    # Ids, for the two decoders write bytes that are not UTF-8 differently.
    prompt, likeliest = torch.tensor([ours.text.encode(corpus.held_out[0])]), Sampling(8, temperature=0.0)
    drawn = [torch.stack(list(model.generate(prompt, likeliest))).tolist() for model in (ours, theirs)]
    assert drawn[0] == drawn[1]

    options = ["--prompt", corpus.held_out[0], "--prompt", corpus.held_out[1], "--tokens", "8", "--json"]
    for seeded in (["--temperature", "0"], ["--seed", "3", "--top-k", "5"]):
        told = [CliRunner().invoke(app, ["generate", str(model), *options, *seeded]) for model in (run, out)]
        assert [one.exit_code for one in told] == [0, 0], [repr(one.exception) for one in told]
        of_run, of_export = (json.loads(one.stdout) for one in told)
        assert (of_run["prompts"], of_run["ids"]) == (of_export["prompts"], of_export["ids"])
        assert (of_run["step"], of_export["step"]) == (0, None) and of_export["run"] == str(out)

    answer = CliRunner().invoke(app, ["eval", str(out), "--run", str(run), "--tasks", "validation,kha_prose", "--json"])
    assert answer.exit_code == 0, repr(answer.exception)
    (found,) = json.loads(answer.stdout)["evaluations"]
    assert found["entries"] == pytest.approx({name: expected[name] for name in found["entries"]}, rel=1e-5)
    assert (
        "validation/framed/bits_per_byte" in found["entries"]
        and found["harness"]["kha_prose"]["result"]["samples"] == 6
    )
    refused = CliRunner().invoke(app, ["eval", str(out), "--tasks", "validation"])
    assert "--run" in str(refused.exception)
    (other := tmp_path / "other").mkdir()
    (other / "config.yaml").write_text(dump(replace(config, model=replace(config.model, vocab_size=301))))
    refused = CliRunner().invoke(app, ["eval", str(out), "--run", str(other), "--tasks", "context"])
    assert isinstance(refused.exception, ConfigError) and "301" in (refused.exception.allowed or "")


def alone(suite: Suite, export: ExportModel, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """The figures of the harness's own class for models of transformers."""
    from lm_eval.evaluator import evaluate as evaluate_alone
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    suite.ask(export.text)
    model = HFLM(
        pretrained=export._model, tokenizer=load_tokenizer(out), batch_size=4, prefix_token_id=export.text.prefix,
        max_length=export.text.context,
    )  # fmt: skip
    found = evaluate_alone(model, suite._loaded, bootstrap_iters=0, log_samples=False)
    return figures(results_of(found, {}, TASKS))


def test_ids_that_continue_a_text_keep_the_blank_they_begin_with() -> None:
    """A tokenizer as Llama 2's takes a blank off the beginning of what it decodes."""
    transformers = pytest.importorskip("transformers")
    library = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_fallback())
    tokenizer = TheirTokenizer(library)
    text = "def  re, \U0001f600 x"
    ids = tokenizer.encode([text])[0].tolist()
    assert library.decode(ids) == text and tokenizer.decode(ids) == f" {text}"
    for place in [number for number, token in enumerate(library.convert_ids_to_tokens(ids)) if "\u2581" in token]:
        assert tokenizer.decode(ids[:place]) + tokenizer.decode(ids[place:]) == f" {text}"


def test_a_directory_that_is_no_export_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    refused = CliRunner().invoke(app, ["eval", str(tmp_path), "--tasks", "kha_choice"])
    assert "cannot be loaded" in str(refused.exception) and "\n" not in str(refused.exception)


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: torch.save(torch.load(d / "spare.pt"), d / "pytorch_model.bin") or (d / "model.safetensors").unlink(),
        lambda d: os.truncate(d / "model.safetensors", 500),
        lambda d: changed(d, hidden_size="16"),
        lambda d: changed(d, num_attention_heads=0),
    ],
    ids=["pickled weights", "a truncated file", "a width of text", "no heads"],
)
def test_a_hostile_or_damaged_export_is_refused_in_one_line(
    damage: Callable[[Path], Any], save_model: Callable[..., Any], tmp_path: Path
) -> None:
    torch.save(save_model("llama", tmp_path).state_dict(), tmp_path / "spare.pt")
    open_export(tmp_path, "", torch.device("cpu"))
    damage(tmp_path)
    with pytest.raises(ConfigError, match="cannot be loaded") as refused:
        open_export(tmp_path, "", torch.device("cpu"))
    assert "\n" not in refused.value.line()


def changed(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
