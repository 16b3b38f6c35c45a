"""The rules of SECURITY.md that concern no single room: configurations, ranks, dependencies, files of a whole run."""

from __future__ import annotations

import ast
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from picklescan.scanner import scan_directory_path

from kha_train.config.compose import compose, load, load_plain, shipped
from kha_train.errors import ConfigError
from kha_train.operate import launcher
from kha_train.operate.doctor.versions import requirements
from kha_train.train.run import train

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "override",
    [
        "+_target_=os.system",
        "+run._target_=os.system",
        "run={_target_: os.system, dir: x}",
        "+optim.schedule._partial_=true",
        "data.sources=[{_target_: os.system, name: a, path: b, weight: 1}]",
        "evaluation.tasks=[{_target_: torch.load, name: context}]",
        "run.name=${oc.env:HOME}",
        "run.name=${oc.decode:x}",
        "run.name=${hydra:runtime.cwd}",
        "hydra/launcher=basic",
        "hydra.run.dir=/tmp",
        "+hydra.job_logging=none",
        "model=/etc/passwd",
        "model=../../../secret",
        "attention.base.name=os.system",
        "optim.name=torch.load",
        "engine.name=../evil",
        "telemetry.sinks=[../evil]",
    ],
)
def test_security_no_configuration_calls_anything(override: str) -> None:
    with pytest.raises(ConfigError):
        compose([override])


def test_security_no_shipped_preset_has_a_target() -> None:
    files = sorted(shipped("configs").rglob("*.yaml"))
    assert len(files) > 50
    assert [file for file in files if re.search(r"^\s*_\w+_?:", file.read_text(encoding="utf-8"), re.MULTILINE)] == []


def test_security_a_saved_configuration_is_data(tmp_path: Path) -> None:
    """It is read by readers of runs, which show or compare it; a reader that builds it refuses the key."""
    mark = tmp_path / "executed"
    values = {"run": {"_target_": "os.mkdir", "path": str(mark)}, "model": {"layers": "${oc.env:HOME}"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_plain(tmp_path / "config.yaml")["model"]["layers"] == "${oc.env:HOME}"
    with pytest.raises(ConfigError):
        load(tmp_path / "config.yaml")
    assert not mark.exists()


def test_security_ranks_exchange_no_objects() -> None:
    """torch's collectives of objects unpickle what another rank sends; rpc runs what it is sent."""
    offenders = []
    for path in [*(ROOT / "kha_train").rglob("*.py"), *(ROOT / "data_tools").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        objects = {
            name for name in names if re.fullmatch(r"(all_gather|gather|send|recv)_object|\w+_object_list", name)
        }
        offenders += [f"{path}: {name}" for name in sorted(objects | (names & {"rpc", "rpc_sync", "rpc_async"}))]
    assert offenders == []


LISTENERS = """
import os, pathlib, sys, torch.distributed as ranks
ranks.init_process_group("gloo")
ranks.barrier()
files = [file for pid in (os.getpid(), os.getppid()) for file in pathlib.Path(f"/proc/{pid}/fd").iterdir()]
ours = {os.readlink(file) for file in files if file.is_symlink()}
lines = [line.split() for kind in ("tcp", "tcp6") for line in open(f"/proc/net/{kind}").readlines()[1:]]
listening = [line[1].rpartition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in ours]
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(listening))
ranks.barrier()
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc here")
def test_security_ranks_of_one_machine_meet_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher and its ranks listen on the loopback address alone, and so nobody else reaches them."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert launcher.launch(2, ["-c", LISTENERS, str(tmp_path)]) == 0
    for rank in ("0", "1"):
        listening = (tmp_path / rank).read_text().split()
        assert len(listening) >= 2 and set(listening) == {"0100007F"}


def test_security_dependencies_are_above_their_floors() -> None:
    """Of the installed versions, and of every version that pyproject.toml admits."""
    floors = dict(re.findall(r"^\| ([a-z-]+) \| (\d[\d.]*) \|", PAGE, flags=re.MULTILINE))
    assert floors.keys() == {"torch", "deepspeed", "hydra-core", "transformers", "sentencepiece"}
    _, groups = requirements()
    admitted: dict[str, list[Requirement]] = {}
    for requirement in (one for wanted in groups.values() for one in wanted):
        admitted.setdefault(requirement.name, []).append(requirement)
    for name, floor in floors.items():
        assert Version(version(name)) >= Version(floor), name
        below = [Version(text) for text in ("0.1", "0.2.0", "0.15.0", "1.3.7", "2.9.1", "5.2.9")]
        for requirement in admitted[name]:
            assert not [old for old in below if old < Version(floor) and old in requirement.specifier], name


def test_security_no_file_of_a_run_is_a_pickle(small: list[str], tmp_path: Path) -> None:
    settings = [*small, "engine.name=plain", "model.layers=1", "run.steps=1", "telemetry.sinks=[tensorboard]"]
    train(compose([*settings, f"run.dir={tmp_path}/run"]))
    assert {"config.yaml", "run.json", "checkpoints", "tensorboard"} <= {
        one.name for one in (tmp_path / "run").iterdir()
    }
    found = scan_directory_path(str(tmp_path / "run"))
    assert (found.infected_files, found.issues_count, found.scan_err) == (0, 0, False)
    # A pickle begins with its protocol, also where nobody would look for one.
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert [path for path in files if path.read_bytes()[:1] == b"\x80" and path.suffix != ".safetensors"] == []


def test_security_this_page_names_tests_that_exist() -> None:
    rules = re.findall(r"^\| (\d) \| (.+) \| (.+) \|$", PAGE, flags=re.MULTILINE)
    assert [number for number, *_ in rules] == [str(number) for number in range(1, 10)]
    for number, _, cell in rules:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_security_\w+)`", cell)
        assert named, f"rule {number} has no test"
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name
