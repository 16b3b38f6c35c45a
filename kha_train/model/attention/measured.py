"""`attention.backend=auto` on CUDA: measures the backends that compute the same function when a run starts, and selects
the fastest. Each is first compared with the formula, so one that computes wrong numbers is excluded.
"""

# S document borders

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import torch

from kha_train.config.resolve import backend_problem, invalid_backend, precision_on
from kha_train.config.schema import RunConfig
from kha_train.distributed import Caught
from kha_train.errors import ConfigError
from kha_train.model.attention.backends import BACKENDS, Documents, lay_out_documents
from kha_train.model.attention.choice import attention_inputs, check_against_maths
from kha_train.model.device import DTYPES, device_facts
from kha_train.variants.backends import TRAITS, BackendName

WARM_UP, ROUNDS = 3, 7
DOCUMENT_TOKENS = 835
"""Mean length of the documents in the isolated rows used for the measurement."""

Timer = Callable[[Callable[[], None], torch.device], float]


def measure(config: RunConfig, device: torch.device, earlier: str = "") -> str:
    """The selected backend, a space, and the measurements in words, for this rank alone and without collectives. It is
    the configured backend where nothing needs measuring: a named backend, no CUDA, or only one candidate. With `auto`
    it is `earlier` if that is still a candidate, so that a resumed run keeps its kernel.

    All ranks then use the first rank's result through `settled`, because they must not use different kernels. Raises
    ConfigError when none of several backends works.
    """
    names = candidates(config, device) if device.type == "cuda" else []
    if config.attention.backend != "auto" or len(names) < 2:
        return f"{config.attention.backend} "
    dtype = DTYPES[precision_on(config, device.type)]
    return " ".join(fastest(config, names, device, dtype, cuda_seconds, earlier))


def settled(config: RunConfig, answer: str) -> tuple[RunConfig, str]:
    """The configuration with the backend that `measure` selected, and the measurements in words ("" where nothing was
    measured).
    """
    name, _, told = answer.partition(" ")
    return _with_backend(config, name), told


def candidates(config: RunConfig, device: torch.device) -> list[str]:
    """The backends that can run here and compute what the configuration needs, without the formula itself."""
    facts, precision = device_facts(device), precision_on(config, device.type)
    return [
        name
        for name in TRAITS
        if name != "eager"
        and not invalid_backend(_with_backend(config, name))
        and not backend_problem(name, facts, precision)
    ]


def fastest(
    config: RunConfig, names: list[str], device: torch.device, dtype: torch.dtype, seconds: Timer, earlier: str = ""
) -> tuple[str, str]:
    """The fastest of `names` at the shape of a micro-batch, forward and backward, or `earlier` if it works; and the
    measurements in words. A backend that computes wrong numbers, or fails in any way, is excluded. Raises ConfigError
    when none remains.
    """
    taken: dict[str, float] = {}
    refused: list[str] = []
    for name in names:
        # Third-party code, possibly built for another torch, may raise any error.
        with Caught() as caught:
            check_against_maths(config, name, device, dtype)
            taken[name] = seconds(_attention_of(config, name, device, dtype), device)
        if caught.error:
            first, *_ = str(caught.error).splitlines() or [""]
            refused.append(f"{name} failed: {type(caught.error).__name__}: {first}")
    if not taken:
        raise ConfigError(
            f"no backend computes the formula correctly here: {'; '.join(refused)}",
            field="attention.backend",
            value=config.attention.backend,
            fix="another device; attention.backend=eager holds all scores, and is the formula",
        )
    order = sorted(taken, key=lambda name: taken[name])
    told = [f"{name} {1000 * taken[name]:.2f} ms" for name in order]
    kept = f"; {earlier} kept, because the run began with it" if earlier in taken else ""
    words = f"measured, forward and backward of a layer: {', '.join([*told, *refused])}{kept}"
    return earlier if kept else order[0], words


def cuda_seconds(run: Callable[[], None], device: torch.device) -> float:
    """The median over some rounds of the time between two events."""
    for _ in range(WARM_UP):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for first, last in pairs:
        first.record()
        run()
        last.record()
    torch.cuda.synchronize(device)
    milliseconds: list[float] = [first.elapsed_time(last) for first, last in pairs]
    return statistics.median(milliseconds) / 1000


def _attention_of(config: RunConfig, name: str, device: torch.device, dtype: torch.dtype) -> Callable[[], None]:
    rows, tokens = config.engine.micro_batch_size, config.model.seq_len
    q, k, v = (x.requires_grad_() for x in attention_inputs(config, rows, tokens, device, dtype))
    documents = _documents(config, rows, tokens, device, masked=not TRAITS[name].packed)

    def run() -> None:
        out = BACKENDS[name](q, k, v, documents, q.shape[-1] ** -0.5)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return run


def _documents(config: RunConfig, rows: int, tokens: int, device: torch.device, masked: bool) -> Documents:
    """Rows as in the run: whole, or cut into documents of typical length."""
    if not config.data.isolate_documents:
        return lay_out_documents(rows, tokens, device)
    ends = sorted({*range(0, rows * tokens, tokens), *range(0, rows * tokens, DOCUMENT_TOKENS), rows * tokens})
    borders_S = torch.tensor(ends, dtype=torch.int32, device=device)
    return lay_out_documents(rows, tokens, device, borders_S, max(b - a for a, b in pairwise(ends)), masked=masked)


def _with_backend(config: RunConfig, name: str) -> RunConfig:
    names = get_args(BackendName)
    backend: BackendName = names[names.index(name)]
    return replace(config, attention=replace(config.attention, backend=backend))
