"""The synthetic tasks: answers that an outside solver finds too, levels, splits, and the command that writes them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from data_tools.task_documents import TASKS
from data_tools.tasks import Order, generate, write_task
from kha_train import compose
from kha_train.cli.data import app
from kha_train.data.format.shards import ShardSet
from kha_train.data.rows.batch import Batch
from kha_train.distributed import World
from kha_train.errors import ConfigError
from kha_train.evaluate.opening import open_tasks
from kha_train.evaluate.scoring import evaluate

# The ids of docs/tasks.md, and solvers in plain Python: nothing here is taken from `data_tools`.
MARKS = {1: "=", 2: "?", 3: "+", 4: "-", 5: "*", 6: ">", 7: "max", 8: "min", 9: "med", 10: "sum", 11: "]", 12: "."}
BEGINS = dict(enumerate(["copy", "induction", "mqar", "recall", "khop", "arithmetic", "listops", "facts"], start=32))
Token = int | str


def read(ids: list[int]) -> tuple[str, list[Token], int]:
    """The task of a document, its tokens between BEGIN and END (symbols as numbers), and the number of its END."""
    return BEGINS[ids[0]], [MARKS[one] if one < 16 else one - 48 for one in ids[1:-1]], ids[-1] - 16


def questions(tokens: list[Token]) -> Iterator[tuple[list[Token], list[Token]]]:
    """What precedes each answer, and the answer: the numbers after a `=`."""
    for place, token in enumerate(tokens):
        if token == "=":
            end = place + 1
            while end < len(tokens) and isinstance(tokens[end], int):
                end += 1
            yield tokens[:place], tokens[place + 1 : end]


def copy(before: list[Token], level: int) -> list[Token]:
    """The text itself."""
    assert len(before) == level
    return before


def induction(before: list[Token], level: int) -> list[Token]:
    """What comes after the only place where the key is."""
    *text, mark, key = before
    assert mark == "?" and len(text) == level and text.count(key) == 1
    return [text[text.index(key) + 1]]


def mqar(before: list[Token], level: int) -> list[Token]:
    """The value that stands after the key among the first `level` pairs, whose keys differ."""
    pairs, key = before[: 2 * level], before[-1]
    assert before[-2] == "?" and len(set(pairs[::2])) == level
    return [dict(zip(pairs[::2], pairs[1::2], strict=True))[key]]


def recall(before: list[Token], level: int) -> list[Token]:
    """The value of the key, which stands `level` tokens before the key of the question."""
    key = before[-1]
    assert before[-2] == "?" and before.count(key) == 2 and len(before) - 1 - before.index(key) == level
    return [before[before.index(key) + 1]]


def khop(before: list[Token], level: int) -> list[Token]:
    """Where one gets from the node in `level` steps, of which each follows the arrow that begins there."""
    question = before.index("?")
    arrows, node, hops = before[:question], before[question + 1], before[question + 2 :]
    assert hops == [">"] * level and len(arrows) == 32
    for _ in hops:
        node = dict(zip(arrows[::2], arrows[1::2], strict=True))[node]
    return [node]


def arithmetic(before: list[Token], level: int) -> list[Token]:
    """The result that Python has, with leading zeros."""
    text = "".join(map(str, before))
    assert len(text) == 2 * level + 1
    sign = text[level]
    width = {"+": level + 1, "-": level, "*": 2 * level}[sign]
    a, b = int(text[:level]), int(text[level + 1 :])
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return [int(digit) for digit in f"{result:0{width}}"]


def listops(before: list[Token], level: int) -> list[Token]:
    """Evaluated from the inside, with a stack, as in the definition of ListOps."""
    functions = {"max": max, "min": min, "med": lambda values: int(np.median(values)), "sum": lambda v: sum(v) % 10}
    stack: list[list[Token]] = [[]]
    deepest = 0
    for token in before:
        if token == "]":
            sign, *values = stack.pop()
            stack[-1].append(functions[sign](values))  # type: ignore[index,arg-type]
        elif token in functions:
            stack.append([token])
            deepest = max(deepest, len(stack) - 1)
        else:
            stack[-1].append(token)
    assert deepest == level and len(stack) == 1
    return stack[0]


SOLVERS = {
    "copy": copy, "induction": induction, "mqar": mqar, "recall": recall, "khop": khop, "arithmetic": arithmetic,
    "listops": listops,
}  # fmt: skip
LEARNT = [name for name in BEGINS.values() if name != "facts"]
GOLDEN = {
    "copy": "2763958d909c72e8",
    "induction": "2961815598b76094",
    "mqar": "c4a9cb6f1295fc0d",
    "recall": "81c9c0b8a5cde99f",
    "khop": "0c1fe95121d29fae",
    "arithmetic": "52464b13c21400d3",
    "listops": "b87097012deef6fb",
    "facts": "08038b29a0fdd1a7",
}
"""SHA-256 of the first hundred documents of seed 3."""


def documents(order: Order, split: str, count: int) -> list[list[int]]:
    return [ids.tolist() for ids in generate(order, split, range(count))]


def test_the_table_of_the_docs_has_every_task() -> None:
    assert list(BEGINS.values()) == list(TASKS)


@pytest.mark.parametrize("task", LEARNT)
def test_an_outside_solver_finds_every_answer_from_what_precedes_it(task: str) -> None:
    order = Order(task).complete()
    for ids in documents(order, "train", 300):
        named, tokens, end = read(ids)
        asked = list(questions(tokens))
        assert named == task and asked
        assert task == "mqar" or len(asked[0][0]) + 1 + len(asked[0][1]) == len(tokens)
        for before, answer in asked:
            assert answer == SOLVERS[task](before, order.levels[end])


@pytest.mark.parametrize("task", TASKS)
def test_golden_documents_never_change(task: str) -> None:
    drawn = documents(Order(task, seed=3).complete(), "train", 100)
    assert hashlib.sha256(str(drawn).encode()).hexdigest().startswith(GOLDEN[task])
    if task == "copy":
        assert drawn[0] == [32, 70, 95, 54, 69, 1, 70, 95, 54, 69, 16]


@pytest.mark.parametrize("task", LEARNT)
def test_no_document_is_in_both_splits_and_levels_come_in_turn(task: str) -> None:
    order = Order(task).complete()
    order = replace(order, levels=order.levels[:2])
    train, held_out = (documents(order, split, 400) for split in ("train", "validation"))
    assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in held_out}
    assert Counter(ids[-1] for ids in held_out) == {16: 200, 17: 200}


def test_a_fact_is_told_as_often_as_its_level_says_and_validation_asks_only_what_was_told() -> None:
    order = Order("facts", 600, 90, (2, 10)).complete()
    told = Counter(tuple(ids) for ids in documents(order, "train", 600))
    assert Counter((times, ids[-1] - 16) for ids, times in told.items()) == {(2, 0): 150, (10, 1): 30}
    subjects = [ids[1:4] for ids in told]
    assert len(set(subjects)) == len(subjects) and all(ids[4] == 1 and len(ids) == 8 for ids in told)
    asked = Counter(tuple(ids) for ids in documents(order, "validation", 90))
    assert asked.keys() <= told.keys() and sum(ids[-1] == 17 for ids in asked) == 30


def test_questions_of_mqar_come_early_and_every_pair_is_asked_once() -> None:
    order = Order("mqar", levels=(8,)).complete()
    slots = Counter()
    for ids in documents(order, "train", 400):
        _, tokens, _ = read(ids)
        found = [(place - 18) // 4 for place, token in enumerate(tokens) if token == "="]
        assert len({tokens[18 + 4 * slot - 1] for slot in found}) == len(found) == 8
        slots.update(found)
    # Zoology's law: slot x has the weight 1 / x, and slots are drawn without replacement.
    weights = 1 / np.arange(1, 25)
    random = np.random.default_rng(0)
    drawn = [random.choice(24, 8, replace=False, p=weights / weights.sum()) for _ in range(8000)]
    expected = np.bincount(np.concatenate(drawn), minlength=24) / 8000
    found = np.array([slots[slot] for slot in range(24)]) / 400
    assert np.abs(found - expected).max() < 4 * (0.25 / 400) ** 0.5
    assert found[0] > 0.9 and found[12] < 0.3


def test_a_number_of_a_document_and_the_seed_say_what_it_is() -> None:
    order = Order("copy").complete()
    drawn = documents(order, "train", 8)
    assert [ids.tolist() for ids in generate(order, "train", range(5, 8))] == drawn[5:]
    assert documents(replace(order, seed=1), "train", 8) != drawn


class Guesser:
    """An engine for the task `answers`: `guess(before, level)` names the answer to a question, as numbers."""

    world = World.single()

    def __init__(self, guess: Callable[[list[Token], int], list[Token]], levels: Sequence[int]) -> None:
        self.guess, self.levels = guess, levels

    def evaluate(self, batch: Batch, by_token: bool = False) -> Any:
        hits_BT = torch.zeros(batch.labels_BT.shape, dtype=torch.bool)
        for row, ids in enumerate(batch.rows_BW.tolist()):
            for start in [place for place, number in enumerate(ids) if number in BEGINS]:
                stop = next(place for place in range(start, len(ids)) if 16 <= ids[place] < 32)
                _, tokens, end = read(ids[start : stop + 1])
                for before, answer in questions(tokens):
                    guessed = self.guess(before, self.levels[end])
                    for offset, (one, other) in enumerate(zip(guessed, answer, strict=True)):
                        hits_BT[row, start + 1 + len(before) + offset] = one == other
        return SimpleNamespace(tokens=SimpleNamespace(hits=hits_BT, nats=(~hits_BT).double()))


@pytest.mark.parametrize(
    ("task", "chance"),
    [
        ("copy", 64),
        ("induction", 64),
        ("mqar", 32),
        ("recall", 32),
        ("khop", 64),
        ("arithmetic", None),
        ("listops", None),
    ],
)
def test_the_solver_scores_1_and_a_constant_answer_what_chance_gives(
    task: str, chance: int | None, small: list[str], tmp_path: Path
) -> None:
    order = Order(task, 50, 300).complete()
    longest = write_task(order, tmp_path)["validation"].corpus["longest"]
    data = [f"data.{split}={tmp_path / split}" for split in ("train", "validation")]
    rows = ["data.packing=best_fit", f"model.seq_len={longest}", f"data.cache_dir={tmp_path}", "validation.rows=0"]
    (_, scored) = open_tasks(compose([*small, *data, *rows, "evaluation.tasks=[answers]"]))
    best = evaluate(Guesser(SOLVERS[task], order.levels), [scored])  # type: ignore[arg-type]
    for name, value in best.items():
        assert value == (0.0 if "loss" in name else 1.0)

    symbol = 40 if chance else 0
    width = {"copy": lambda b, n: n, "arithmetic": lambda b, n: {"+": n + 1, "-": n, "*": 2 * n}[b[n]]}
    constant = Guesser(lambda before, n: [symbol] * width.get(task, lambda b, n: 1)(before, n), order.levels)
    found = evaluate(constant, [scored])  # type: ignore[arg-type]
    answers = [answer for ids in documents(order, "validation", 300) for _, answer in questions(read(ids)[1])]
    labels = list(chain(*answers))
    assert found["evaluation/answers/token_accuracy"] == labels.count(symbol) / len(labels)
    assert found["evaluation/answers/answer_accuracy"] == sum(set(one) == {symbol} for one in answers) / len(answers)
    if chance:
        deviation = (chance * len(labels)) ** -0.5
        assert abs(found["evaluation/answers/token_accuracy"] - 1 / chance) < 4 * deviation


def kha(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_command_writes_both_splits_and_the_settings_of_a_run(tmp_path: Path) -> None:
    options = ("--documents", 90, "--validation-documents", 30, "--levels", "2,5", "--symbols", 7, "--seed", 4)
    answer = kha("synthetic", "copy", "--out", tmp_path / "copy", *options)
    assert answer["settings"] == "model.vocab_size=256 model.seq_len=13 data.packing=best_fit"
    assert (answer["train"]["documents"], answer["validation"]["documents"]) == (90, 30)
    opened = ShardSet.open(tmp_path / "copy" / "train")
    assert opened.manifest.corpus["answers"]["ends"] == {"16": 2, "17": 5}
    order = Order("copy", 90, 30, (2, 5), 7, 256, 4).complete()
    assert opened.read(0, 0, opened.manifest.tokens).tolist() == [*chain(*documents(order, "train", 90))]
    assert kha("verify", tmp_path / "copy" / "train")
    (shown,) = kha("inspect", tmp_path / "copy" / "train", "--samples", 1, "--tokens", 13).values()
    text = shown["samples"][0]["text"].split()
    assert text[0] == "<copy>" and text[3] == "=" and text[1:3] == text[4:6] and text[6] == "end0‖<copy>"


def test_datasets_of_one_vocabulary_share_a_tokenizer_and_others_do_not(tmp_path: Path) -> None:
    hashes = []
    for number, order in enumerate(
        (Order("copy", 8, 8), Order("copy", 8, 8, seed=1), Order("copy", 8, 8, vocab_size=300))
    ):
        made = write_task(order.complete(), tmp_path / str(number))
        hashes.append(made["train"].tokenizer.sha256)
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("order", "field"),
    [
        (Order("copi"), "task"),
        (Order("copy", vocab_size=49), "--vocab-size"),
        (Order("copy", symbols=209), "--symbols"),
        (Order("copy", levels=(8, 4)), "--levels"),
        (Order("copy", levels=(0, 4)), "--levels"),
        (Order("copy", levels=tuple(range(1, 18))), "--levels"),
        (Order("mqar", levels=(8, 33)), "--levels"),
        (Order("recall", levels=(9, 16)), "--levels"),
        (Order("khop", symbols=15), "--symbols"),
        (Order("arithmetic", symbols=11), "--symbols"),
        (Order("listops", vocab_size=57), "--vocab-size"),
        (Order("facts", documents=191), "--documents"),
    ],
)
def test_an_order_that_cannot_be_filled_is_refused_with_its_option(order: Order, field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        order.complete()
    assert refused.value.field == field


def test_a_level_with_too_few_documents_to_hold_some_out_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too few different documents"):
        write_task(Order("induction", 4, 4, levels=(2,), symbols=2).complete(), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


def test_existing_datasets_are_replaced_only_when_asked(tmp_path: Path) -> None:
    order = Order("copy", 8, 8).complete()
    made = write_task(order, tmp_path)
    with pytest.raises(ConfigError, match="already holds a dataset"):
        write_task(order, tmp_path)
    assert write_task(order, tmp_path, overwrite=True) == made
    ids = np.fromfile(tmp_path / "train" / "shard-00000.tok", dtype="<u2")
    assert len(ids) == made["train"].tokens
