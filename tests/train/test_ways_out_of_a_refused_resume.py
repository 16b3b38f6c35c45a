"""A refused resume offers only fixes that work: a setting that may change, or a new run with these weights."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from kha_train.config.compose import compose
from kha_train.errors import CheckpointError, KhaError, ResumeError
from kha_train.record import Marker, set_marker
from kha_train.train.run import train

pytestmark = pytest.mark.slow

ALLOW, BEGIN = "resume.allow_changes", "run.init_from"
CHANGES = {
    "a rate": ("optim.lr=3e-3", True, True),
    "the length of the run": ("run.steps=4", True, True),
    "the length of a row": ("model.seq_len=32", True, True),
    "clipping by the norms' own statistics": ("stability.zclip=true", True, True),
    "what a forgotten buffer would count": ("moe.routing_warmup_steps=2", False, True),
    "an auxiliary loss with a buffer": (
        "moe.auxiliary_loss.weight=0.1 moe.auxiliary_loss.scope=previous_step",
        False,
        True,
    ),
    "another interaction": ("attention=kha_mlp", False, True),
    "another base": ("attention=mla", False, True),
    "more layers": ("model.layers=3", False, True),
    "more experts": ("moe.experts=32", False, False),
    "both allowed and not": ("optim.lr=3e-3 attention=kha_mlp", False, True),
    "one more than is allowed": (f"optim.lr=3e-3 optim.eps=1e-6 {ALLOW}=[optim.eps]", True, True),
}


@pytest.fixture(scope="module")
def begun(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(overrides, directory) of a GQA run that stopped after its first step of three."""
    run_dir = tmp_path_factory.mktemp("begun") / "run"
    settings = [*small, "attention=gqa", "run.steps=3", "validation.every_steps=0", "checkpoint.background=false"]
    run_dir.mkdir()
    set_marker(run_dir, Marker.STOP)
    train(compose([*settings, f"run.dir={run_dir}"]))
    return settings, run_dir


@pytest.mark.parametrize("change", CHANGES)
def test_each_way_that_a_refused_resume_offers_works_and_no_other_would(
    change: str, begun: tuple[list[str], Path], tmp_path: Path
) -> None:
    typed, allows, begins = CHANGES[change]
    settings, first = begun
    run_dir = tmp_path / "run"
    shutil.copytree(first, run_dir)
    refused = [*settings, f"run.dir={run_dir}", *typed.split()]

    with pytest.raises(ResumeError) as raised:
        train(compose(refused))
    ways = [shlex.split(way.typed) for way in raised.value.typed_fixes]
    assert any(ALLOW in str(way) for way in ways) == allows
    assert any(BEGIN in str(way) for way in ways) == begins
    # What was allowed before stays so.
    assert typed.partition(f"{ALLOW}=[")[2].rstrip("]") in str(ways)
    for way in ways:
        assert train(compose([*refused, *way])).finished, way

    if not allows:
        # What is not offered does not work: everything may change, and the checkpoint does not fit all the same.
        with pytest.raises((ResumeError, CheckpointError)):
            train(compose([*refused, f"{ALLOW}=[attention,model,moe,optim]"]))
    if not begins:
        checkpoint = next((first / "checkpoints").iterdir())
        with pytest.raises(KhaError):
            train(compose([*refused, f"run.dir={tmp_path}/other", f"{BEGIN}={checkpoint}"]))
