"""Tasks of the harness in the loop: every rank scores a share, and the figures are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kha_train import compose, distributed
from kha_train.engine import plain
from kha_train.errors import ConfigError
from kha_train.evaluate.harness import Suite
from kha_train.evaluate.harness_data import Choice
from kha_train.evaluate.opening import declared, measured_facts, open_tasks
from kha_train.evaluate.requests import score_rows
from kha_train.evaluate.scoring import evaluate
from kha_train.evaluate.text_model import DecoderModel

TASKS = "evaluation.tasks=[{name: harness, tasks: [kha_choice, kha_prose, kha_induction], limit: 9, label: small}]"


def test_a_run_declares_every_figure_before_the_harness_is_asked() -> None:
    names = {metric.name for metric in declared(compose(["model=tiny", TASKS]))}
    assert {"evaluation/small/kha_choice_acc_norm", "evaluation/small/kha_prose_bits_per_byte"} <= names


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("{name: harness}", "names of tasks"),
        ("{name: harness, tasks: [a/b]}", "cannot be part of a key"),
        ("{name: harness, tasks: [a, a]}", "each once"),
        ("{name: harness, tasks: [a], limit: -1}", "limit"),
    ],
)
def test_settings_that_cannot_be_are_refused(task: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(["model=tiny", f"evaluation.tasks=[{task}]"])


@pytest.mark.slow
def test_two_ranks_of_any_zero_stage_come_to_the_figures_of_one_process(
    corpus: Any, run_ranks: Callable[..., list[Any]]
) -> None:
    settings = ["engine.micro_batch_size=3", "data.global_batch_size=6", "engine.device=cpu", "run.seed=3"]
    overrides = [*corpus.overrides, TASKS, "validation.rows=2", *settings]
    config = compose(overrides)
    tasks = open_tasks(config)
    engine = plain.Engine(config, distributed.start("cpu", 60))
    alone = evaluate(engine, tasks)
    model = DecoderModel(engine.decoder.eval(), tasks[-1]._text)
    suite = Suite(Choice(("kha_choice", "kha_prose", "kha_induction"), limit=9))
    asked = suite.ask(model.text)
    told = suite.results(model.text, asked, score_rows(model, asked.rows, 16, lambda count: None), [])
    engine.close()
    plain.Engine.leave_world()
    expected = {
        f"evaluation/small/{task}_{name}": figure.value
        for task, result in told.items()
        for name, figure in result.figures.items()
    }
    harness = {name: value for name, value in alone.items() if name.startswith("evaluation/small/")}
    assert harness == pytest.approx(expected, rel=1e-5) and len(harness) == 6
    assert measured_facts(tasks)["evaluations"]["evaluation/small"]["content_id"] == asked.content_id
    first, second = run_ranks(Path(__file__).with_name("ranks_worker.py"), 2, overrides=overrides)
    assert first == second
    for stage in first:
        assert first[stage] == pytest.approx(alone, rel=1e-5), f"ZeRO {stage}"


@pytest.mark.slow
def test_what_cannot_run_in_the_loop_is_refused_when_the_run_begins(
    corpus: Any, public_data: Path, small: list[str]
) -> None:
    text = f"evaluation.tasks=[{{name: harness, tasks: [gsm8k], data: {public_data}, shots: 0}}]"
    for overrides, said in (
        ([*corpus.overrides, text], "generates text"),
        ([*corpus.overrides, "evaluation.tasks=[{name: harness, tasks: [mbpp]}]"], "runs code"),
        ([*small, TASKS], "need a tokenizer"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_tasks(compose(overrides))
