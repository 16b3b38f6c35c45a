"""Commands typed in a shell of `srun --pty`, on a real SLURM: one process there, ranks where srun starts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(300)]

ASK = "from kha_train.distributed import World\nprint('size', World.from_environment().size)\n"


def test_a_shell_in_a_job_is_one_process_and_srun_inside_it_starts_ranks(
    cluster, job_environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "ask.py").write_text(ASK)
    ask = f"{sys.executable} {tmp_path}/ask.py"
    # `--overlap`: the step of the shell itself holds the processors.
    (tmp_path / "typed").write_text(f"{ask}\nsrun --overlap -n2 {ask}\necho variables: ${{!SLURM_PTY*}}\n")
    shell = f"srun -n2 --pty bash {tmp_path}/typed"
    # `script` gives the command a terminal.
    said = cluster.run("script", "-qec", shell, "/dev/null", env=job_environment).replace("\r", "").splitlines()
    # A terminal echoes what it gets before the first line.
    assert [line[-6:] for line in said if "size" in line] == ["size 1", "size 2", "size 2"], said
    assert any("SLURM_PTY_PORT" in line for line in said), f"by this SLURM knows such a shell: {said}"
