"""lm-evaluation-harness asks, our models answer: its figures on our answers, and ours on its questions."""

from __future__ import annotations

import json
import math
import random
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from data_tools.eval_documents import FOLDER, KINDS, text_of
from kha_train import compose
from kha_train.errors import ConfigError
from kha_train.evaluate import bounded
from kha_train.evaluate.harness import Asked, Suite
from kha_train.evaluate.harness_data import Choice
from kha_train.evaluate.opening import open_tasks
from kha_train.evaluate.paper_tasks import PAPER_TASKS
from kha_train.evaluate.requests import Row, Score, score_rows
from kha_train.evaluate.scoring import evaluate
from kha_train.evaluate.text_model import DecoderModel, Text

pytestmark = pytest.mark.slow
PUBLIC = (
    "arc_challenge", "hellaswag", "piqa", "winogrande", "commonsense_qa", "race", "mmlu_anatomy", "cmmlu_anatomy",
    "ceval-valid_law", "gpqa_main_n_shot", "agieval_aqua_rat",
)  # fmt: skip


class Bytes:
    """A tokenizer whose ids are bytes."""

    def __init__(self) -> None:
        self.special_ids = {"eos": 256}

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()


BYTES = Text.of(Bytes(), 100_000)


def nats(model: DecoderModel, ids: Sequence[int], scored: int) -> list[float]:
    """The log-probabilities of the last `scored` of `ids`, straight from the logits of one row, in float64."""
    with torch.no_grad():
        logits_TV = model.decoder(torch.tensor([ids[:-1]])).logits_BTV[0].double()
    found_T = -functional.cross_entropy(logits_TV, torch.tensor(ids[1:]), reduction="none")
    return found_T[len(found_T) - scored :].tolist()


def answered(suite: Suite, model: DecoderModel, rows: int = 4) -> dict[str, Any]:
    asked = suite.ask(model.text)
    scores = score_rows(model, asked.rows, rows, lambda count: None)
    texts = model.write(asked.prompts, rows, lambda count: None)
    return suite.results(model.text, asked, scores, texts)


def test_the_shipped_documents_are_those_of_the_program_that_makes_them() -> None:
    assert {kind: (FOLDER / f"{kind}.jsonl").read_text() for kind in KINDS} == {kind: text_of(kind) for kind in KINDS}


def test_rolling_likelihood_is_the_bits_per_byte_of_validation(
    corpus: Any, model: DecoderModel, tmp_path: Path, write_lines: Callable[..., None]
) -> None:
    """On texts that fit into a row: the harness puts the end of a document before each, and so do the shards."""
    write_lines(tmp_path / "data" / "prose.jsonl", [{"text": text} for text in corpus.held_out])
    config = compose([*corpus.overrides, "engine.micro_batch_size=4"])
    ours = evaluate(model, [task for task in open_tasks(config) if task.options.entries == "validation/framed"])
    suite = Suite(Choice(("kha_prose",), str(tmp_path)))
    theirs = answered(suite, model)["kha_prose"]
    assert theirs.samples == len(corpus.held_out) and (theirs.version, theirs.shots) == ("1", 0)
    found = theirs.figures["bits_per_byte"].value
    assert found == pytest.approx(ours["validation/framed/bits_per_byte"], abs=1e-4) and found > 0.5
    # And both are what the logits say.
    text_bytes = sum(len(text.encode()) for text in corpus.held_out)
    sums = [
        nats(model, (model.text.prefix, *model.text.encode(text)), len(model.text.encode(text)))
        for text in corpus.held_out
    ]
    assert found == pytest.approx(-sum(map(sum, sums)) / math.log(2) / text_bytes, abs=1e-5)


def test_a_text_longer_than_the_context_is_scored_in_windows_that_predict_each_token_once(
    model: DecoderModel, tmp_path: Path, write_lines: Callable[..., None]
) -> None:
    """The harness's rule, worked out here: windows of the whole context, the last one shifted back to be as long."""
    text = "red river 12 " * 40
    ids = model.text.encode(text)
    longest = model.text.context
    assert len(ids) > 2 * longest and len(ids) % longest
    write_lines(tmp_path / "data" / "prose.jsonl", [{"text": text}])
    expected, done = sum(nats(model, (model.text.prefix, *ids[:longest]), longest)), longest
    while done < len(ids):
        new = min(longest, len(ids) - done)
        expected += sum(nats(model, ids[done + new - longest - 1 : done + new], new))
        done += new
    found = answered(Suite(Choice(("kha_prose",), str(tmp_path))), model)["kha_prose"].figures["bits_per_byte"].value
    assert found == pytest.approx(-expected / math.log(2) / len(text), abs=1e-5)


def test_accuracies_of_choices_are_those_of_the_definition_for_any_batch_size(
    model: DecoderModel, tmp_path: Path, write_lines: Callable[..., None]
) -> None:
    """acc: the likeliest choice; acc_norm: the likeliest by character. Here they differ."""
    drawn = random.Random(3)
    words = ["red", "blue", "stone", "river", "of", "and", "the", "404"]
    documents = []
    for _ in range(24):
        choices = [" ".join(drawn.sample(words, k)) for k in (1, 2, 4)]
        documents.append(
            {"question": " ".join(drawn.sample(words, 3)), "choices": choices, "answer": drawn.randrange(3)}
        )
    write_lines(tmp_path / "data" / "choice.jsonl", documents)
    hits = {"acc": 0, "acc_norm": 0}
    for document in documents:
        encode, sums = model.text.encode, []
        for choice in document["choices"]:
            whole, context = encode(f"{document['question']} {choice}"), encode(document["question"])
            sums.append(sum(nats(model, whole, len(whole) - len(context))))
        by_character = [one / len(choice) for one, choice in zip(sums, document["choices"], strict=True)]
        hits["acc"] += int(np.argmax(sums)) == document["answer"]
        hits["acc_norm"] += int(np.argmax(by_character)) == document["answer"]
    suite = Suite(Choice(("kha_choice",), str(tmp_path)))
    found = [answered(suite, model, rows)["kha_choice"].figures for rows in (1, 5, 64)]
    for name, count in hits.items():
        share = count / 24
        assert [one[name].value for one in found] == [share] * 3
        assert found[0][name].error == pytest.approx(math.sqrt(share * (1 - share) / 23))
    assert hits["acc"] != hits["acc_norm"]
    asked = suite.ask(model.text)
    alone, together = (score_rows(model, asked.rows, rows, lambda count: None) for rows in (1, 64))
    assert [one.log_probability for one in alone] == pytest.approx([one.log_probability for one in together], abs=2e-5)


def oracle(asked: Asked) -> list[Score]:
    """What somebody answers who knows that the right answer is `right`, or the letter before it, or B."""
    return [Score(0.0 if _is_right(row) else -50.0, False) for row in asked.rows]


def _is_right(row: Row) -> bool:
    text, answer = (Bytes().decode(ids) for ids in (row.ids, row.ids[-row.scored :]))
    letter = answer.strip()
    if letter.strip("()") in list("ABCDE"):
        return f"{letter} right" in text or letter == "B"
    return "right" in text


def test_public_tasks_read_the_users_files_and_no_network(public_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("asked for the network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    suite = Suite(Choice((*PUBLIC, "gsm8k"), str(public_data), shots=0))
    asked = suite.ask(BYTES)
    found = suite.results(BYTES, asked, oracle(asked), ["It is 2 + 2.\n#### 4"] * len(asked.prompts))
    assert {name: found[name].figures["acc"].value for name in PUBLIC} == dict.fromkeys(PUBLIC, 1.0)
    assert {name: (one.samples, one.documents) for name, one in found.items()} == dict.fromkeys(found, (2, 2))
    assert {name: figure.value for name, figure in found["gsm8k"].figures.items()} == {
        "exact_match_strict-match": 1.0, "exact_match_flexible-extract": 1.0,
    }  # fmt: skip
    assert [prompt.until for prompt in asked.prompts] == [("Question:", "</s>", "<|im_end|>")] * 2


def test_a_description_beside_the_data_is_no_split(tmp_path: Path, write_lines: Callable[..., None]) -> None:
    """As a copy of a repository of a hub has it, whose files lie in `data`."""
    place = tmp_path / "baber" / "piqa"
    document = {"goal": "g", "sol1": "wrong", "sol2": "right", "label": 1}
    write_lines(place / "data" / "validation-00000-of-00001.jsonl", [document, document])
    (place / "dataset_infos.json").write_text("{}")
    assert len(Suite(Choice(("piqa",), str(tmp_path))).ask(BYTES).rows) == 4


def test_the_same_is_asked_again_and_no_random_number_of_others_is_used(public_data: Path) -> None:
    """GPQA shuffles its choices, and examples are drawn."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    choice = Choice(("gpqa_main_n_shot", "kha_choice"), str(public_data))
    first, again = (Suite(choice) for _ in range(2))
    asked = first.ask(BYTES)
    assert asked == first.ask(BYTES) == again.ask(BYTES) and asked.content_id == again.ask(BYTES).content_id
    first.results(BYTES, asked, oracle(asked), [], errors=False)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist())


def test_every_name_of_the_papers_tasks_is_in_the_harness_where_the_table_says() -> None:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks import __file__ as place

    assert len(PAPER_TASKS) == 19
    for task in PAPER_TASKS:
        if task.harness:
            folder = Path(place).parent / task.folder
            assert task.harness in TaskManager(include_path=str(folder), include_defaults=False).all_tasks, task
    assert [task.paper for task in PAPER_TASKS if not task.harness] == ["RACE-m", "CMATH"]


@pytest.mark.parametrize("name", [task.harness for task in PAPER_TASKS if task.asks == "code"])
def test_a_task_that_runs_code_of_the_model_is_refused(name: str, tmp_path: Path) -> None:
    """Before anything of it is loaded: its metric would be, and run, at the import of its file."""
    with pytest.raises(ConfigError, match="runs code that the model writes") as refused:
        Suite(Choice((name,), str(tmp_path)))
    assert "--run-code" in str(refused.value) and "lm_eval.tasks.humaneval.utils" not in sys.modules


def test_missing_data_name_the_file_that_is_wanted(tmp_path: Path, public_data: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        Suite(Choice(("hellaswag",), str(tmp_path)))
    assert f"{tmp_path}/Rowan/hellaswag/SPLIT.jsonl" in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        Suite(Choice(("hellaswag",), str(public_data), shots=3))
    assert refused.value.allowed == f"{public_data}/Rowan/hellaswag/train.jsonl"
    with pytest.raises(ConfigError, match="no such task.*did you mean hellaswag"):
        Suite(Choice(("helaswag",), str(public_data)))


def test_without_the_harness_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(ConfigError) as refused:
        Suite(Choice(("kha_choice",)))
    assert "\n" not in refused.value.line() and "kha_train[export]" in refused.value.line()


def test_generated_text_ends_where_the_task_says_and_equals_whole_forwards(
    model: DecoderModel, tmp_path: Path, write_lines: Callable[..., None]
) -> None:
    documents = [{"question": "red blue", "answer": "x"}, {"question": "the river of stone 12", "answer": "y"}]
    write_lines(tmp_path / "questions.jsonl", documents)
    task = {
        "task": "own_text", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n\n", "404"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    suite = Suite(Choice(("own_text",), include=str(tmp_path)))
    asked = suite.ask(model.text)
    texts = model.write(asked.prompts, 8, lambda count: None)
    for document, text in zip(documents, texts, strict=True):
        ids = model.text.encode(document["question"])
        for _ in range(12):
            ids.append(int(model.decoder(torch.tensor([ids])).logits_BTV[0, -1].argmax()))
        whole = model.text.encoder.decode(ids[-12:]) if model.text.end not in ids else ""
        assert not whole or text == whole.partition("\n\n")[0].partition("404")[0]
    assert any(texts)


def test_repeated_questions_get_several_answers_and_a_task_may_not_ask_for_more_than_the_model_sees(
    model: DecoderModel, tmp_path: Path, write_lines: Callable[..., None]
) -> None:
    write_lines(tmp_path / "questions.jsonl", [{"question": "red blue", "answer": "x"}] * 2)
    task = {
        "task": "own_text", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
        "test_split": "test", "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0.9, "top_k": 40}, "repeats": 4,
    }  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    suite = Suite(Choice(("own_text",), include=str(tmp_path)))
    asked = suite.ask(model.text)
    # The harness samples where a task says a temperature.
    assert [prompt.stream for prompt in asked.prompts] == [*range(8)]
    assert {(prompt.sampling.temperature, prompt.sampling.top_k) for prompt in asked.prompts} == {(0.9, 40)}
    texts = model.write(asked.prompts, 8, lambda count: None)
    assert len(set(texts)) > 4 and texts == model.write(asked.prompts, 3, lambda count: None)
    suite.results(model.text, asked, [], texts)
    task["generation_kwargs"] = {"max_gen_toks": model.text.context}
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    with pytest.raises(ConfigError, match="leave no place"):
        Suite(Choice(("own_text",), include=str(tmp_path))).ask(model.text)


OWN = {
    "task": "own",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "questions.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "question",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize("template", ["{{ question.__class__.__mro__ }}", "{{ '{0.__class__}'.format(question) }}"])
def test_a_template_cannot_leave_its_sandbox(template: str, tmp_path: Path, write_lines: Callable[..., None]) -> None:
    write_lines(tmp_path / "questions.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0}])
    (tmp_path / "own.yaml").write_text(json.dumps({**OWN, "doc_to_text": template}))
    with pytest.raises(ConfigError, match="SecurityError") as refused:
        Suite(Choice(("own",), include=str(tmp_path))).ask(BYTES)
    assert "\n" not in refused.value.line()


def test_a_template_that_fills_memory_is_refused_in_one_line(
    tmp_path: Path, write_lines: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "MOST_BYTES", 256 << 20)
    endless = "{% set ns = namespace(x='x' * 2**20) %}{% for i in range(10) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    write_lines(tmp_path / "questions.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0}])
    (tmp_path / "own.yaml").write_text(json.dumps({**OWN, "doc_to_text": endless}))
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(ConfigError, match="take more than 0.25 GiB") as refused:
        Suite(Choice(("own",), include=str(tmp_path))).ask(BYTES)
    assert "\n" not in refused.value.line() and resource.getrlimit(resource.RLIMIT_DATA) == before


def test_python_of_a_task_directory_runs_with_the_flag_alone(tmp_path: Path, write_lines: Callable[..., None]) -> None:
    write_lines(tmp_path / "questions.jsonl", [{"question": "q", "choices": ["a", "b"], "answer": 0}])
    files = {"data_files": {"test": str(tmp_path / "questions.jsonl")}}
    text = json.dumps({**OWN, "dataset_kwargs": files}).removesuffix("}")
    (tmp_path / "own.yaml").write_text(text + ', "process_docs": !function utils.process}')
    ran = tmp_path / "ran"
    (tmp_path / "utils.py").write_text(f"open({str(ran)!r}, 'w')\n\ndef process(docs):\n    return docs\n")
    with pytest.raises(ConfigError, match="run-code"):
        Suite(Choice(("own",), include=str(tmp_path)))
    assert not ran.exists()
    assert Suite(Choice(("own",), include=str(tmp_path), run_code=True)).names == ["own"] and ran.exists()
