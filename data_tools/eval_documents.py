"""Makes drawn documents of the package's own tasks for lm-evaluation-harness, in `data_tools/eval_tasks/data`.

    python -m data_tools.eval_documents

The texts beside them (prose, code, multilingual) were written for this package. All are small: they show that an
evaluation works, and how a task file reads a JSON file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "eval_tasks" / "data"
WORDS = tuple(
    "apple bird cloud door egg fish glass hand ink jar key lamp moon nest oven pen rain salt tree wall".split()  # noqa: SIM905
)
NUMBERS, CHOICES, INDUCTIONS = 12, 60, 60
"""How many documents of each drawn kind."""


KINDS = ("numbers", "choice", "induction")


def documents(kind: str) -> Iterator[dict[str, Any]]:
    """The documents of `kind`: numbers have a `text`; choice has `question`, `choices` and the number of the `answer`;
    induction has `context` and `target`."""
    drawn = random.Random(kind)
    if kind == "numbers":
        for _ in range(NUMBERS):
            pairs = [(drawn.randrange(10, 100), drawn.randrange(10, 100)) for _ in range(6)]
            yield {"text": "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)}
    elif kind == "choice":
        yield from (_choice(drawn) for _ in range(CHOICES))
    else:
        yield from (_induction(drawn) for _ in range(INDUCTIONS))


def _choice(drawn: random.Random) -> dict[str, Any]:
    """Which word continues a pattern of two or three words that is repeated; the choices are other words beside it."""
    pattern = drawn.sample(WORDS, drawn.choice((2, 3)))
    shown = (pattern * 4)[: 2 * len(pattern) + drawn.randrange(1, len(pattern) + 1)]
    right = pattern[len(shown) % len(pattern)]
    choices = drawn.sample([word for word in WORDS if word != right], 3)
    answer = drawn.randrange(4)
    choices.insert(answer, right)
    return {"question": " ".join(shown), "choices": choices, "answer": answer}


def _induction(drawn: random.Random) -> dict[str, Any]:
    """Pairs of words, then one of the first words again: the second of its pair follows."""
    words = drawn.sample(WORDS, 8)
    pairs = list(zip(words[::2], words[1::2], strict=True))
    key, value = drawn.choice(pairs)
    return {"context": " ".join([*(f"{a} {b}" for a, b in pairs), key]), "target": f" {value}"}


def text_of(kind: str) -> str:
    """The file of `kind`."""
    return "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents(kind))


if __name__ == "__main__":
    for kind in KINDS:
        (FOLDER / f"{kind}.jsonl").write_text(text_of(kind), encoding="utf-8")
