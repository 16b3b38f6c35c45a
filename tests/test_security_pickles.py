"""Once a process has joined a run, nothing in it loads a pickle that runs code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from kha_train import distributed
from kha_train.errors import ConfigError


class Canary:
    """Unpickling it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def single(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process; whatever joining sets in the environment is undone after the test."""
    for name in (*distributed.TORCHRUN, "TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)


def test_security_even_a_library_that_asks_for_it_cannot_load_a_pickle_that_runs_code(single, tmp_path) -> None:
    torch.save(Canary(tmp_path / "executed"), tmp_path / "evil.pt")
    distributed.start("cpu", 60.0)
    try:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "evil.pt", weights_only=False)
    finally:
        distributed.stop()
    assert not (tmp_path / "executed").exists()


def test_security_an_environment_that_would_allow_it_is_refused(single, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ConfigError, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        distributed.start("cpu", 60.0)
