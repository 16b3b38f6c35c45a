"""`hydra/launcher=kha_slurm`: submits plain Hydra's `--multirun` as one SLURM job array, as `kha sweep` does.

Hydra imports every plugin at every start, so heavy imports wait until jobs are launched. The submitter may log out:
each point trains, is requeued and resumes on its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.plugins.launcher import Launcher

OPTIONS = {
    "_target_": "hydra_plugins.kha_slurm.KhaSlurmLauncher",
    "name": "sweep",
    "dir": "runs",
    "equal": "steps",
    "nodes": 1,
    "gpus_per_node": 0,
    "parallel": 0,
    "sbatch": [],
    "site": "",
    "retry_failed": False,
}
"""The settings `hydra.launcher.KEY`; the same as the options of `kha sweep`. Not a dataclass: Hydra runs this file
without making it a module, and a dataclass needs one.
"""


class KhaSlurmLauncher(Launcher):
    """Validates every point, submits those that are missing, and returns without waiting for them."""

    def __init__(self, **options: Any) -> None:
        self._options = options

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Keeps nothing: a job composes its own configuration from its overrides."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """One result per point, with its job's id as the value (None where nothing had to be started). A user's mistake
        ends the process with its line and exit code, as `kha sweep` does.
        """
        from kha_train.cli.main import complain_of
        from kha_train.errors import KhaError

        try:
            return self._submit(job_overrides, initial_job_idx)
        except KhaError as error:
            complain_of(error)
            # Hydra would always end with 1.
            sys.exit(error.exit_code)

    def _submit(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from kha_train.operate.slurm import JobOptions, parse_sbatch, start_missing
        from kha_train.operate.sweep import plan_points, sweep_directory

        chosen = self._options
        directory = sweep_directory(Path(chosen["dir"]), chosen["name"])
        overrides = [list(filter_overrides(point)) for point in job_overrides]
        points = plan_points(directory, overrides, chosen["equal"])
        options = JobOptions(
            nodes=chosen["nodes"],
            gpus_per_node=chosen["gpus_per_node"],
            parallel=chosen["parallel"],
            sbatch=parse_sbatch(list(chosen["sbatch"])),
            site=chosen["site"],
        )
        started = start_missing(directory, points, options, equal=chosen["equal"], retry_failed=chosen["retry_failed"])
        print(f"{directory}: job {started.job}, {len(started.points)} of {len(points)} points submitted", flush=True)
        return [self._answer(point, number, started) for number, point in enumerate(points, start=initial_job_idx)]

    def _answer(self, point: Any, number: int, started: Any) -> JobReturn:
        answer = JobReturn(overrides=list(point.overrides), working_dir=point.run_dir, status=JobStatus.COMPLETED)
        answer.task_name = f"{number}-{point.label}"
        answer.return_value = started.job if point in started.points else None
        return answer


ConfigStore.instance().store(group="hydra/launcher", name="kha_slurm", node=OPTIONS, provider="kha_train")
