"""F16, F17: corrupted memory, and missing memory."""

from __future__ import annotations

import re

import pytest

from kha_train.record import first_failure

pytestmark = pytest.mark.slow

AUDITED = ("attention=kha_mlp", "engine.audit_every=1")


@pytest.mark.parametrize(("rank", "stage"), [(0, 1), (1, 2), (1, 3)])
def test_f16_a_bit_that_flips_in_one_ranks_weights_is_found_before_the_step_and_the_rank_named(
    rank, stage, make_run, straight
) -> None:
    settings = (*AUDITED, f"engine=zero{stage}")
    run = make_run(*settings)
    assert run.start({"at": "gradient:5", "do": "flip", "rank": rank}, ranks=2) == [75, 75], run.log.read_text()
    assert f"silent corruption on rank {rank}: its copy of" in run.log.read_text()
    assert len(run.curve()) == 4 and not (run.run_dir / "FATAL").exists()
    assert run.newest().name == "step-00000002", "the save begun after step 4 is in doubt"
    run.to_the_end(ranks=2)
    assert run.equals(straight(*settings, ranks=2))


def test_f16_a_bit_that_flips_in_what_all_ranks_hold_alike_is_found(make_run) -> None:
    run = make_run(*AUDITED, "engine=zero2")
    assert run.start({"at": "gradient:5", "do": "flip_bias", "rank": 1}, ranks=2) == [75, 75], run.log.read_text()
    assert "its buffers differs" in run.log.read_text()


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "fp32")])
def test_f16_an_audit_changes_nothing(stage, precision, make_run, straight) -> None:
    settings = ("attention=kha_mlp", f"engine=zero{stage}", f"engine.precision={precision}")
    run = make_run(*settings, "engine.audit_every=1")
    run.to_the_end(ranks=2)
    twin = straight(*settings, "engine.audit_every=0", ranks=2)
    tensors = [{name: sha for name, sha in one.final_state().items() if "json" not in name} for one in (run, twin)]
    assert run.curve() == twin.curve() and tensors[0] == tensors[1]


@pytest.mark.parametrize(("do", "step", "code"), [("oom", 1, 2), ("oom", 5, 75), ("host_oom", 1, 75)])
def test_f17_out_of_memory_is_told_against_the_plan_and_leaves_the_checkpoint(do, step, code, make_run) -> None:
    """What a step once had room for is worth another start, and so is a host that others use too."""
    run = make_run("attention=gqa", "engine=zero1")
    codes = run.start({"at": f"gradient:{step}", "do": do, "rank": 1}, ranks=2, patience=60)
    assert codes[1] == code and codes[0] not in (0, None), run.log.read_text()
    assert (run.run_dir / "FATAL").exists() == (code == 2)
    told = run.log.read_text()
    assert "memory: planned" in told and "held at most" in told
    assert re.search(r"fix: .*engine\.micro_batch_size=2 \(saves (?!0 )[\d.]+ MiB\)", told)
    failure = first_failure(run.run_dir)
    assert failure is not None
    run.to_the_end(ranks=2)
    # The save after step 4 may not stand yet when the run dies in step 5.
    assert run.starts()[-1] in ((0,) if step == 1 else (2, 4)) and len(run.curve()) == 6
