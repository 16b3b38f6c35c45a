"""Disks, limits of the operating system, and SLURM."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from kha_train.config.home import in_home
from kha_train.config.schema import RunConfig
from kha_train.estimate.counts import count_parameters
from kha_train.estimate.plan import checkpoint_bytes, ring_checkpoints
from kha_train.operate.doctor.checks import Check, State

GIB = 2**30
LITTLE_SHARED = GIB
"""Below this size of /dev/shm, ranks of one node may fail to share memory."""
FEW_FILES = 1024
FEW_PROCESSES = 1024


def check_storage(config: RunConfig) -> Iterator[Check]:
    """Whether the places that a run writes to can be written, and have room for its checkpoints."""
    size = checkpoint_bytes(config, count_parameters(config))
    # One more than is kept exists while the oldest is still there.
    kept = size * (config.checkpoint.keep_last + 1 + ring_checkpoints(config))
    yield _place("run.dir", Path(config.run.dir), kept, "the run's checkpoints need")
    paths = [config.data.train, config.data.validation, *(source.path for source in config.data.sources)]
    if any("://" in path for path in paths):
        cached = int(config.data.cache_gib * GIB)
        # The cache may hold less than it is allowed, and part of it may be there already.
        yield _place("data.cache_dir", in_home(config.data.cache_dir), cached, "data.cache_gib allows", "WARN")
    yield _place("temporary files", Path(tempfile.gettempdir()), 0, "")
    yield _place("home", Path(os.path.expanduser("~")), 0, "")
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        fix = "several ranks on one node need more: `docker run --shm-size=8g`, or remount it"
        little = total < LITTLE_SHARED
        found = f"{shared} has {total / GIB:.2f} GiB"
        yield Check("storage", "shared memory", "WARN" if little else "OK", found, fix if little else "")


def _place(name: str, path: Path, needed: int, what: str, short: State = "FAIL") -> Check:
    """Whether `path`, or the nearest directory above it that exists, can be written and has `needed` bytes left;
    `short` if it has less.
    """
    # `Path.is_dir` raises below a directory that may not be searched.
    above = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.isdir(place))
    if not os.access(above, os.W_OK | os.X_OK):
        fix = f"{name}=SOMEWHERE_ELSE" if needed else "make it writable, or set HOME or TMPDIR to another"
        return Check("storage", name, "FAIL" if needed else "WARN", f"{above} cannot be written", fix)
    free = shutil.disk_usage(above).free
    found = f"{free / GIB:.1f} GiB free in {above}"
    if free < needed:
        fix = f"free some space, or {name}=SOMEWHERE_ELSE"
        return Check("storage", name, short, f"{found}; {what} {needed / GIB:.1f} GiB", fix)
    return Check("storage", name, "OK", found + (f"; {what} {needed / GIB:.2f} GiB" if needed else ""))


def check_limits(config: RunConfig) -> Iterator[Check]:
    """The limits of this shell (`ulimit`) that a run may meet."""
    largest = checkpoint_bytes(config, count_parameters(config))
    for name, option, which, least in (
        ("open files", "n", resource.RLIMIT_NOFILE, FEW_FILES),
        ("processes and threads", "u", resource.RLIMIT_NPROC, FEW_PROCESSES),
    ):
        soft, hard = resource.getrlimit(which)
        found = f"{_number(soft)} (at most {_number(hard)})"
        if resource.RLIM_INFINITY != soft < least:
            yield Check("limits", name, "WARN", found, f"ulimit -{option} {min(4096, hard) if hard > 0 else 4096}")
        else:
            yield Check("limits", name, "OK", found)
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if resource.RLIM_INFINITY != size < largest:
        found = f"{size / GIB:.2f} GiB, and a checkpoint may have {largest / GIB:.2f}"
        yield Check("limits", "size of a file", "FAIL", found, "ulimit -f unlimited")
    memory = resource.getrlimit(resource.RLIMIT_AS)[0]
    if memory != resource.RLIM_INFINITY:
        yield Check("limits", "address space", "WARN", f"{memory / GIB:.1f} GiB", "ulimit -v unlimited")
    group = _memory_of_group()
    if group is not None:
        yield Check("limits", "memory of this container", "OK", f"{group / GIB:.1f} GiB")


def _memory_of_group() -> int | None:
    """The memory that the control group of this process may use, in bytes; None where there is no limit."""
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        if text.isdecimal() and int(text) < 2**60:
            return int(text)
    return None


def _number(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def check_slurm(environ: Mapping[str, str]) -> Iterator[Check]:
    """Whether jobs can be submitted from here, and the job that this shell is part of."""
    path = shutil.which("sbatch", path=environ.get("PATH"))
    if path is None:
        yield Check("slurm", "sbatch", "WARN", "not installed here", "sweep on this machine: `kha sweep ... --local`")
    else:
        asked = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20)
        yield Check("slurm", "sbatch", "OK", f"{path}: {asked.stdout.strip() or 'unknown version'}")
    if "SLURM_JOB_ID" in environ:
        told = f"{environ['SLURM_JOB_ID']} on {environ.get('SLURM_JOB_NODELIST', 'unknown nodes')}"
        yield Check("slurm", "job", "OK", told)
