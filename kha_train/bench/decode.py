"""Measures what a token costs to decode with the whole cache and with half of the key/value heads, with QK-norm and
without it: under the norm, virtual keys are composed, normalised and rotated again for every token.
"""

# B rows   T = 1 token

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kha_train.bench.protocol import Clock, Ratio, Timing, compare, environment, interleave, plain, shown, timing, told
from kha_train.config.compose import compose
from kha_train.config.resolve import resolve_decoding
from kha_train.decode.virtual_heads import compress
from kha_train.errors import ConfigError
from kha_train.model.attention.cache import Cache
from kha_train.model.decoder import Decoder, build_decoder

NORMS = ("per_head", "none")


@dataclass(frozen=True)
class Measured:
    """Seconds of a token of all rows by arm, the ratio to the whole cache of the same norm, and the bytes cached per
    token and row in fp32, with the measurement protocol.
    """

    seconds: dict[str, Timing]
    against_whole: dict[str, Ratio]
    cache_bytes: dict[str, int]
    context: int
    rows: int
    blocks: int
    clock: Clock
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def measure(overrides: Sequence[str], context: int, rows: int, blocks: int, clock: Clock = "wall") -> Measured:
    """Measure the decoder of `overrides`, fresh, on the CPU, after `context` tokens in each of `rows` rows.

    Raises ConfigError as `compose`, for a base without heads in its cache, and for a single key/value head.
    """
    device = torch.device("cpu")
    arms: dict[str, Callable[[], None]] = {}
    caches: dict[str, Cache] = {}
    for norm in NORMS:
        longest = f"model.seq_len={context + blocks + 1}"
        config = compose([*overrides, f"attention.qk_norm={norm}", longest])
        heads = config.attention.heads().kv_heads
        if heads < 2:
            raise ConfigError("has no half", field="model.kv_heads", value=heads, allowed="2 or more")
        whole = build_decoder(config, resolve_decoding(config)).eval()
        half = compress(whole, [heads // 2] * config.model.layers)
        for name, decoder in ((f"{norm} whole", whole), (f"{norm} half", half)):
            caches[name] = Cache(context + blocks + 1)
            arms[name] = _decoding(decoder, caches[name], context, rows)
    seconds = interleave(arms, blocks=blocks, device=device, clock=clock)
    return Measured(
        seconds={name: timing(taken) for name, taken in seconds.items()},
        against_whole={name: compare(taken, seconds[f"{name.split()[0]} whole"]) for name, taken in seconds.items()},
        cache_bytes={name: 4 * cache.numbers() for name, cache in caches.items()},
        context=context,
        rows=rows,
        blocks=blocks,
        clock=clock,
        about=environment(device),
    )


def format_measured(found: Measured) -> str:
    """The figures and their protocol, as text."""
    protocol = f"{found.blocks} interleaved blocks, {found.clock} clock; medians, ratio to the whole cache with 95 %"
    lines = [
        f"one token of {found.rows} rows after {found.context} tokens, fp32",
        f"{protocol} interval; {told(found.about)}",
    ]
    for name, taken in found.seconds.items():
        ratio = shown(plain(found.against_whole[name]), found.blocks)
        lines.append(f"  {name:<15} {1000 * taken.seconds:9.2f} ms  {ratio}  {found.cache_bytes[name]:,} bytes a token")
    return "\n".join(lines)


@torch.no_grad()
def _decoding(decoder: Decoder, cache: Cache, context: int, rows: int) -> Callable[[], None]:
    """A function that decodes one token more with every call, after the first `context`."""
    tokens_BT = torch.arange(context).expand(rows, -1) % decoder.config.model.vocab_size
    decoder(tokens_BT, cache=cache)

    @torch.no_grad()
    def next_token() -> None:
        decoder(tokens_BT[:, :1], cache=cache)

    return next_token
