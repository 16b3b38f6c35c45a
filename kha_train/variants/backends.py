"""What each backend of attention supports, so that a configuration can be checked without torch and without a
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BackendName = Literal[
    "auto", "sdpa", "eager", "cudnn", "varlen", "flash_attn", "flash_attn_3", "flash_attn_4", "chunked"
]
Asked = Literal["softmax", "scores", "linear"]
"""What a base asks of its backend: softmax(QK)V; the scores of softmax(QK)V, to work on them; (QK)V."""


@dataclass(frozen=True)
class Traits:
    """`cuda`: runs only on CUDA, in half precision; `splits`: keeps documents of one row apart; `biased`: adds a bias
    to the scores; `packed`: reads the borders of documents and needs no mask; `cached`: supports fewer queries than
    keys, which decoding needs; `serves`: what it can be asked for; `oldest`: the minimum compute capability of CUDA;
    `only`: the only one it is used on, and why; `install`: how to install the package that it needs ("" for none).
    """

    cuda: bool = False
    splits: bool = True
    biased: bool = False
    packed: bool = False
    cached: bool = False
    serves: tuple[Asked, ...] = ("softmax",)
    oldest: tuple[int, int] = (0, 0)
    only: tuple[int, int] | None = None
    only_because: str = ""
    install: str = ""


TRAITS: dict[str, Traits] = {
    "eager": Traits(biased=True, cached=True, serves=("softmax", "scores", "linear")),
    "sdpa": Traits(biased=True, cached=True),
    "cudnn": Traits(
        cuda=True,
        splits=False,
        only=(9, 0),
        only_because="slower on older devices, and seen to corrupt on newer ones",
    ),
    "varlen": Traits(cuda=True, packed=True, oldest=(8, 0)),
    "flash_attn": Traits(cuda=True, packed=True, oldest=(8, 0), install="flash-attn: pip install 'kha_train[gpu]'"),
    "flash_attn_3": Traits(
        cuda=True,
        packed=True,
        only=(9, 0),
        only_because="it was written for this device",
        install="flash_attn_3: python setup.py install, in hopper/ of github.com/Dao-AILab/flash-attention",
    ),
    "flash_attn_4": Traits(
        cuda=True, packed=True, oldest=(9, 0), install="flash-attn-4: pip install --pre flash-attn-4"
    ),
    "chunked": Traits(packed=True, cached=True, serves=("linear",)),
}
