"""Every form in which a library reports a lack of memory gives the same error."""

from __future__ import annotations

import pytest
import torch

from kha_train.config.compose import compose
from kha_train.config.constants import ROUNDING
from kha_train.distributed import World
from kha_train.errors import ConfigError, MachineError
from kha_train.train.memory import explained_when_out_of_memory

ON_A_DEVICE = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("NCCL error: unhandled cuda error\nCuda failure 'out of memory'"),
]
ON_THE_HOST = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")]


def run_into(error: BaseException, small: list[str], has_fitted: bool = False) -> None:
    """A run in which `error` comes up."""
    with explained_when_out_of_memory(compose(small), World.single(), lambda: has_fitted):
        raise error


@pytest.mark.parametrize("error", ON_A_DEVICE, ids=lambda error: str(error)[:40])
@pytest.mark.parametrize(("has_fitted", "kind"), [(False, ConfigError), (True, MachineError)])
def test_a_device_that_never_had_enough_is_a_matter_of_the_settings(error, has_fitted, kind, small) -> None:
    with pytest.raises(kind, match="rank 0 is out of memory: planned"):
        run_into(error, small, has_fitted)


def test_the_settings_that_save_most_are_offered_and_admitted(small) -> None:
    """All of them leave results as they are, up to rounding; the micro-batch is halved."""
    settings = [*small, "engine.micro_batch_size=4", "engine.compile=block", "model.seq_len=2048"]
    with pytest.raises(ConfigError) as raised:
        run_into(ON_A_DEVICE[0], settings)
    offered = [text.split() for text in raised.value.fix.split(" or ")]
    assert 1 < len(offered) <= 3 and "engine.micro_batch_size=2" in [words[0] for words in offered]
    assert all(words[0].partition("=")[0] in ROUNDING for words in offered)
    saved = [float(words[2]) for words in offered]
    assert saved == sorted(saved, reverse=True)
    for words in offered:
        compose([*settings, words[0]])


@pytest.mark.parametrize("error", ON_THE_HOST, ids=lambda error: type(error).__name__)
def test_a_host_without_memory_may_have_some_the_next_time(error, small) -> None:
    with pytest.raises(MachineError, match="rank 0 is out of host memory"):
        run_into(error, small)


def test_any_other_error_goes_on_as_it_is(small) -> None:
    with pytest.raises(RuntimeError, match="a shape does not fit"):
        run_into(RuntimeError("a shape does not fit"), small)
