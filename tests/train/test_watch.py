"""What the judge of a step reports about clipping."""

from __future__ import annotations

import pytest

from kha_train import compose
from kha_train.stability.events import Observation
from kha_train.train.resume import FREE_TO_CHANGE
from kha_train.train.watch import Watch


@pytest.fixture
def told(small: list[str]):
    """`told(*overrides)`: (clipped, ZClip's limit, kinds of events) of 61 steps whose last norm stands out."""

    def run(*overrides: str) -> list[tuple[bool, float | None, list[str]]]:
        watch, answers = Watch(compose([*small, *overrides])), []
        for step in range(1, 62):
            norm = 0.5 + 0.01 * (step % 5) if step < 61 else 0.9
            ruling = watch.judge(Observation(step, 3.0, norm, samples_first=8 * step, samples_last=8 * step + 7))
            assert ruling.apply
            kinds = [kind for kind, _ in watch.happenings(None)]
            answers.append((watch.clipped, watch.metrics().get("train/zclip_limit"), kinds))
        return answers

    return run


def test_zclip_never_intervenes_without_saying_so(told) -> None:
    *usual, (clipped, limit, kinds) = told("stability.zclip=true", "optim.grad_clip=1.0")
    assert {(clipped, *kinds) for clipped, _, kinds in usual} == {(False,)}
    assert clipped and kinds == ["zclip"]
    assert 0.52 < limit < 0.9


def test_without_zclip_only_grad_clip_clips_and_no_limit_is_recorded(told) -> None:
    assert told("optim.grad_clip=1.0")[-1] == (False, None, [])
    assert told("optim.grad_clip=0.7")[-1] == (True, None, [])


def test_zclip_takes_no_credit_for_what_grad_clip_does(told) -> None:
    clipped, limit, kinds = told("stability.zclip=true", "optim.grad_clip=0.4")[-1]
    assert clipped and limit > 0.4 and kinds == []


def test_of_the_stability_settings_only_the_probe_may_change_on_resume() -> None:
    assert [name for name in FREE_TO_CHANGE if name.startswith("stability")] == ["stability.probe_every"]
