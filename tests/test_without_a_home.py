"""No part of the program needs a home directory: in a container there may be none, or none that is writable, and no
user name. Everything that a run writes is under its run directory.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kha_train.config.home import CACHES, in_home, provide_home
from kha_train.telemetry.backlog import rows_noted

NOBODY = 12345
"""A user without an entry in passwd."""
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
AS_NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
"""May read this installation, wherever it is, and write only what is its own."""
needs_root = pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("setpriv") is None, reason="becoming another user needs root and setpriv"
)
CASES = [
    pytest.param([], "/nonexistent", id="a home that does not exist"),
    pytest.param(AS_NOBODY, None, id="no home and no name", marks=needs_root),
    pytest.param(AS_NOBODY, "/usr", id="a home that cannot be written", marks=needs_root),
]


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user may enter, as pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("become, home", CASES)
def test_a_run_without_a_home_keeps_everything_under_its_directory(
    become: list[str], home: str | None, small: list[str], place: Path
) -> None:
    run_dir, elsewhere = place / "run", place / "tmp"
    for folder in (run_dir, elsewhere):
        folder.mkdir()
        os.chown(folder, *([NOBODY, NOBODY] if become else [-1, -1]))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(elsewhere)}
    environment |= {"OMP_NUM_THREADS": "1"} | ({} if home is None else {"HOME": home})
    settings = [*small, "model.layers=1", "run.steps=2", f"run.dir={run_dir}", "data.packing=best_fit"]
    settings += ["telemetry.wandb.mode=offline", "telemetry.console=auto"]
    command = [*become, sys.executable, "-m", "kha_train", *settings]
    told = {"capture_output": True, "text": True, "env": environment, "cwd": place}
    done = subprocess.run(command, check=False, timeout=240, **told)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Traceback" not in said and "W&B is" not in said, said
    assert (run_dir / "DONE").exists() and rows_noted(run_dir) == 2
    (tables,) = run_dir.glob("wandb/offline-run-*/files/media/table/spike")
    assert len(list(tables.iterdir())) == 3
    assert list((run_dir / ".home/.cache/kha_train/data").glob("best-fit-*")), "the cache of the data"
    assert [path for path in elsewhere.rglob("*") if path.is_file()] == []


def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "KHA_HOME", *CACHES):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_user_without_name_and_home_gets_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nameless(monkeypatch)
    with pytest.raises(RuntimeError):
        Path.home()
    provide_home(tmp_path)
    assert Path.home() == tmp_path / ".home" and getpass.getuser() == f"uid-{os.getuid()}"
    assert in_home("~/.cache/x") == tmp_path / ".home/.cache/x"
    assert in_home("/else/where") == Path("/else/where")
    assert all(os.environ[name].startswith(str(tmp_path)) for name in CACHES)


def test_a_home_that_can_be_read_stays_and_what_the_user_set_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nameless(monkeypatch)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    provide_home(tmp_path / "run")
    assert "KHA_HOME" not in os.environ and in_home("~/x") == home / "x", "it can be written: nothing is to be done"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    provide_home(tmp_path / "run")
    assert (os.environ["HOME"], os.environ["TRITON_CACHE_DIR"]) == (str(home), "/mine")
    assert in_home("~/x") == tmp_path / "run/.home/x"
