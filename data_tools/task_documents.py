"""Documents of the synthetic tasks: a question whose answer a program can work out, and the answer.

A document is `BEGIN of the task, question, "=", answer, END of its level`, as ids of one vocabulary that all tasks
share. Only mqar has several questions in a document. What a level counts is the task's own: symbols to copy, tokens
between a pair and its question, hops, digits. The END comes after every answer, so a causal model cannot use it.
docs/tasks.md has the definitions and their sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count

import numpy as np

from kha_train.data.format.canonical import canonical_json
from kha_train.data.sampling.order import Permutation, keyed_hash

MARKS = ("<pad>", "=", "?", "+", "-", "*", ">", "max", "min", "med", "sum", "]", ".")
"""Ids 0, 1, ...; up to `FIRST_END` there is room for more."""
PAD, ANSWER, QUERY, PLUS, MINUS, TIMES, HOP, MAX, MIN, MEDIAN, SUM, CLOSE, NOISE = range(len(MARKS))
FIRST_END, FIRST_BEGIN, FIRST_SYMBOL = 16, 32, 48
MOST_LEVELS = FIRST_BEGIN - FIRST_END

_HASHES = 64
"""Random numbers made in one call: a call has a fixed cost."""
NEAREST = 10
"""The least level of recall: the question right after the pairs, whichever is asked."""
SUBJECT = 3
"""Symbols of the subject of a fact."""
_PAIRS, _NODES, _OBJECT = 4, 16, 2
"""Pairs of a document of recall, nodes of one of khop, symbols of the object of a fact."""


class Draws:
    """Random numbers for one document: the same for the same `key` on every machine."""

    def __init__(self, *key: str | int) -> None:
        digest = hashlib.blake2b(canonical_json(list(key)), digest_size=8).digest()
        self._numbers = _stream(np.frombuffer(digest, dtype="<u8").astype(np.uint64)[0])

    def below(self, n: int) -> int:
        """A number in [0, n)."""
        return next(self._numbers) % n

    def many(self, amount: int, n: int) -> list[int]:
        """`amount` numbers in [0, n), independent of each other."""
        return [self.below(n) for _ in range(amount)]

    def distinct(self, amount: int, n: int) -> list[int]:
        """`amount` different numbers in [0, n), in random order."""
        pool = list(range(n))
        for i in range(amount):
            j = i + self.below(n - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:amount]


def _stream(key: np.uint64) -> Iterator[int]:
    for start in count(0, _HASHES):
        yield from keyed_hash(np.arange(start, start + _HASHES, dtype=np.uint64), key).tolist()


@dataclass(frozen=True)
class SyntheticTask:
    """`between(draws, level, symbols)` makes the ids of a document between BEGIN and END, using `symbols` symbols.

    `level` says what a level counts, `levels` are those of a dataset unless it is asked for others, and the allowed
    ones begin with `least`; `most` is the highest for a number of symbols. `symbols` is the number used unless another
    is given; with `digits` it is fixed. `memorised`: the answer does not follow from the question, so validation asks
    what training told, and `between` is given the number of a fact instead of a level.
    """

    level: str
    levels: tuple[int, ...]
    between: Callable[[Draws, int, int], list[int]]
    least: int = 1
    most: Callable[[int], int] = lambda symbols: 1 << 16
    symbols: int = 64
    fewest_symbols: int = 2
    digits: bool = False
    memorised: bool = False


def _copy(draws: Draws, level: int, symbols: int) -> list[int]:
    text = _ids(draws.many(level, symbols))
    return [*text, ANSWER, *text]


def _induction(draws: Draws, level: int, symbols: int) -> list[int]:
    """Of `level` random symbols one is unique; it is asked which symbol came after it."""
    key, place = draws.below(symbols), draws.below(level - 1)
    others = [number + (number >= key) for number in draws.many(level - 1, symbols - 1)]
    text = [*others[:place], key, *others[place:]]
    return [*_ids(text), QUERY, *_ids([key]), ANSWER, *_ids([text[place + 1]])]


def _mqar(draws: Draws, level: int, symbols: int) -> list[int]:
    """Each of `level` pairs is asked once, in a random one of three times as many slots: slot x with weight 1/x, so
    that most questions come early, as in Zoology. The other slots are noise."""
    keys, values = _pairs(draws, level, symbols)
    asked: dict[int, int] = {}
    for pair in range(level):
        while True:
            slot = draws.below(3 * level)
            if slot not in asked and not draws.below(slot + 1):
                break
        asked[slot] = pair
    ids = [number for pair in zip(keys, values, strict=True) for number in pair]
    for slot in range(3 * level):
        pair_of = asked.get(slot)
        if pair_of is None:
            ids += [NOISE, *_noise(draws, 3, symbols)]
        else:
            ids += [QUERY, keys[pair_of], ANSWER, values[pair_of]]
    return ids


def _recall(draws: Draws, level: int, symbols: int) -> list[int]:
    """Noise between the pairs and the question, so that `level` tokens lie from the key to the key of the question."""
    keys, values = _pairs(draws, _PAIRS, symbols)
    pair = draws.below(_PAIRS)
    noise = _noise(draws, level - NEAREST + 2 * pair, symbols)
    ids = [number for pair in zip(keys, values, strict=True) for number in pair]
    return [*ids, NOISE, *noise, QUERY, keys[pair], ANSWER, values[pair]]


def _khop(draws: Draws, level: int, symbols: int) -> list[int]:
    """The arrows of one cycle through all nodes, shuffled; it is asked where `level` arrows lead from a node."""
    nodes = _ids(draws.distinct(_NODES, symbols))
    arrows = [(nodes[place], nodes[(place + 1) % _NODES]) for place in draws.distinct(_NODES, _NODES)]
    start = draws.below(_NODES)
    ids = [number for arrow in arrows for number in arrow]
    return [*ids, QUERY, nodes[start], *[HOP] * level, ANSWER, nodes[(start + level) % _NODES]]


def _arithmetic(draws: Draws, level: int, symbols: int) -> list[int]:
    """A sum, a difference that is not negative, or a product of numbers of `level` digits, with leading zeros."""
    sign = (PLUS, MINUS, TIMES)[draws.below(3)]
    a, b = draws.many(2, 10**level)
    if sign == MINUS:
        a, b = max(a, b), min(a, b)
    result, width = {PLUS: (a + b, level + 1), MINUS: (a - b, level), TIMES: (a * b, 2 * level)}[sign]
    return [*_digits(a, level), sign, *_digits(b, level), ANSWER, *_digits(result, width)]


def _listops(draws: Draws, level: int, symbols: int) -> list[int]:
    ids, value = _operation(draws, level)
    return [*ids, ANSWER, *_ids([value])]


def _operation(draws: Draws, depth: int) -> tuple[list[int], int]:
    """An operation on 2 to 4 arguments that is nested exactly `depth` deep, and its value."""
    sign, amount = (MAX, MIN, MEDIAN, SUM)[draws.below(4)], 2 + draws.below(3)
    deepest = draws.below(amount)
    ids, values = [sign], []
    for place in range(amount):
        inner = (
            depth - 1 if place == deepest else (1 + draws.below(depth - 1) if depth > 1 and not draws.below(4) else 0)
        )
        if inner:
            part, value = _operation(draws, inner)
        else:
            value = draws.below(10)
            part = _ids([value])
        ids += part
        values.append(value)
    low, high = sorted(values)[(amount - 1) // 2], sorted(values)[amount // 2]
    known = {MAX: max(values), MIN: min(values), MEDIAN: (low + high) // 2, SUM: sum(values) % 10}
    return [*ids, CLOSE], known[sign]


def _facts(draws: Draws, fact: int, symbols: int) -> list[int]:
    """The subject is the number of the fact, permuted, so no two facts share one; the object is drawn."""
    number, subject = int(_subjects(symbols).forward(np.array([fact]))[0]), []
    for _ in range(SUBJECT):
        number, symbol = divmod(number, symbols)
        subject.append(symbol)
    return [*_ids(subject), ANSWER, *_ids(draws.many(_OBJECT, symbols))]


@cache
def _subjects(symbols: int) -> Permutation:
    return Permutation(symbols**SUBJECT, seed=0, source="facts", epoch=0)


def _pairs(draws: Draws, amount: int, symbols: int) -> tuple[list[int], list[int]]:
    """Different keys, from the first half of the symbols, and values, from the second."""
    half = symbols // 2
    return _ids(draws.distinct(amount, half)), _noise(draws, amount, symbols)


def _noise(draws: Draws, amount: int, symbols: int) -> list[int]:
    """Symbols that are no keys."""
    half = symbols // 2
    return _ids([half + number for number in draws.many(amount, symbols - half)])


def _digits(number: int, width: int) -> list[int]:
    return _ids([int(digit) for digit in str(number).zfill(width)])


def _ids(numbers: list[int]) -> list[int]:
    return [FIRST_SYMBOL + number for number in numbers]


TASKS: dict[str, SyntheticTask] = {
    "copy": SyntheticTask("symbols to copy", (4, 8, 16), _copy),
    "induction": SyntheticTask("symbols before the question", (8, 16, 32), _induction, least=2),
    "mqar": SyntheticTask("pairs", (4, 8, 16), _mqar, most=lambda symbols: symbols // 2),
    "recall": SyntheticTask(
        "tokens from the pair to the question", (16, 32, 64, 128), _recall, least=NEAREST, fewest_symbols=2 * _PAIRS
    ),
    "khop": SyntheticTask("hops", (1, 2, 3, 4), _khop, most=lambda symbols: _NODES - 1, fewest_symbols=_NODES),
    "arithmetic": SyntheticTask("digits", (1, 2, 3, 4), _arithmetic, most=lambda symbols: 9, symbols=10, digits=True),
    "listops": SyntheticTask("depth", (1, 2, 3, 4), _listops, most=lambda symbols: 10, symbols=10, digits=True),
    "facts": SyntheticTask("training documents that tell the fact", (4, 16, 64), _facts, memorised=True),
}
"""The order gives the id of a task's BEGIN: a new task comes last."""


def begin_id(task: str) -> int:
    """The first id of the task's documents."""
    return FIRST_BEGIN + list(TASKS).index(task)


def names(vocab_size: int) -> list[str]:
    """What each id is called where ids are shown; a symbol is called by its number."""
    ends = [f"end{level}" for level in range(MOST_LEVELS)]
    begins = [f"<{task}>" for task in TASKS]
    unused = ["<unused>"] * FIRST_SYMBOL
    named = (MARKS + tuple(unused))[:FIRST_END], ends, (begins + unused)[: FIRST_SYMBOL - FIRST_BEGIN]
    return [*named[0], *named[1], *named[2], *map(str, range(vocab_size - FIRST_SYMBOL))]
