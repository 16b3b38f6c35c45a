"""What each backend of softmax(QK)V supports, so that a configuration can be checked without torch and without a
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BackendName = Literal["auto", "sdpa", "eager", "cudnn", "varlen", "flash_attn"]


@dataclass(frozen=True)
class Traits:
    """`cuda`: runs only on CUDA, in half precision; `splits`: keeps documents of one row apart; `biased`: adds a bias
    to the scores; `packed`: reads the borders of documents and needs no mask; `cached`: supports fewer queries than
    keys, which decoding needs; `holds_scores`: holds all scores, so that a base may work on them; `oldest`: the minimum
    compute capability of CUDA; `only`: the only one it is used on.
    """

    cuda: bool = False
    splits: bool = True
    biased: bool = False
    packed: bool = False
    cached: bool = False
    holds_scores: bool = False
    oldest: tuple[int, int] = (0, 0)
    only: tuple[int, int] | None = None


TRAITS: dict[str, Traits] = {
    "eager": Traits(biased=True, cached=True, holds_scores=True),
    "sdpa": Traits(biased=True, cached=True),
    "cudnn": Traits(cuda=True, splits=False, only=(9, 0)),
    "varlen": Traits(cuda=True, packed=True, oldest=(8, 0)),
    "flash_attn": Traits(cuda=True, packed=True, oldest=(8, 0)),
}
