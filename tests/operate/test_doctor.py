"""`kha doctor` says what is in the way, with its fix, and asks the resolver what would run."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from email import message_from_string
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kha_train.config.compose import compose
from kha_train.config.resolve import Device, decide, resolve
from kha_train.model.decoder import lay_out_decoder
from kha_train.operate.doctor import examine, machine, services, versions
from kha_train.operate.doctor.checks import Check
from kha_train.operate.doctor.device import check_device, check_operations
from tests.conftest import Kha

CANARY = "canary-0123456789abcdef"


def by_name(checks: object) -> dict[str, Check]:
    return {check.name: check for check in checks}  # type: ignore[attr-defined]


def test_a_machine_that_runs_the_tests_passes_and_the_answer_is_the_table(kha: Kha) -> None:
    code, out, _ = kha("doctor", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["ok"] and answer["counts"]["FAIL"] == 0
    assert all(check["fix"] for check in answer["checks"] if check["state"] != "OK")
    topics = {check["topic"] for check in answer["checks"]}
    assert topics >= {"versions", "device", "kernels", "communication", "storage", "limits", "slurm", "wandb"}
    code, out, _ = kha("doctor")
    assert code == 0 and all(check["name"] in out for check in answer["checks"])


@pytest.mark.parametrize("device", [Device("cpu", lacks=lambda name: "absent"), Device("cuda", (9, 0))])
def test_what_computes_an_operation_is_the_answer_of_the_resolver(device: Device) -> None:
    config = compose(["attention=kha_mlp", "attention.backend=auto"])
    lines, decided = by_name(check_operations(config, device)), decide(config, device)
    assert lines["backend"].found == f"{decided.backend.name}: {decided.backend.why}"
    assert lines["interaction"].found == f"{decided.interaction.name}: {decided.interaction.why}"
    assert lines["precision"].found == decided.precision == ("bf16" if device.kind == "cuda" else "fp32")
    assert (lines["attention.backend=varlen"].state == "OK") == (device.kind == "cuda")
    assert (lines["moe.backend=megablocks"].state == "OK") == (device.kind == "cuda")
    for setting in ("attention.backend=auto", "engine.kernels=auto"):
        assert (setting in lines) == (device.kind == "cuda"), "a run on CUDA measures, and may select others"


def test_a_choice_that_cannot_run_here_fails_with_a_setting_that_can() -> None:
    refused, cpu = ["attention.backend=varlen", "engine.precision=bf16"], Device("cpu")
    failed = [check for check in check_operations(compose(refused), cpu) if check.state == "FAIL"]
    assert [check.name for check in failed] == ["attention.backend"] and "needs a CUDA device" in failed[0].found
    resolve(compose([*refused, failed[0].fix.partition(" or ")[0]]), cpu)


@pytest.mark.parametrize("there", [False, True])
def test_a_gpu_that_cannot_be_used_fails_only_the_settings_that_ask_for_one(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `kha train`: `auto` takes the CPU, `cuda` refuses."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if there:
        which = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: name if name == "nvidia-smi" else which(name))
        monkeypatch.setattr(Path, "glob", lambda path, pattern: iter([path / "nvidia0"]))
    for asked, state in {"auto": "WARN", "cpu": "WARN", "cuda": "FAIL"}.items():
        line = by_name(check_device(compose([f"engine.device={asked}"])))["gpu"]
        assert line.state == state and ("built for CPUs" in line.found) == there, line
        assert ("training runs on the CPU" in line.found) == (state == "WARN")


def test_packages_are_held_against_the_declared_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"torch": "2.10.0", "pyarrow": "17.0.0", "tokenizers": "0.1"}

    def version(name: str) -> str:
        if name not in there:
            raise versions.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(versions, "version", version)
    lines = by_name(versions.check_versions())
    assert lines["python"].state == "OK"
    assert lines["torch"].state == "FAIL" and "'torch<2.14,>=2.11'" in lines["torch"].fix
    assert lines["numpy"].found == "not installed" and lines["numpy"].state == "FAIL"
    assert lines["extra data"].state == "WARN" and "'tokenizers>=0.22'" in lines["extra data"].fix
    assert "pyarrow" not in lines["extra data"].fix and "extra dev" not in lines


def test_an_installed_wheel_tells_its_requirements_by_its_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = (
        "Requires-Python: >=3.11\nProvides-Extra: gpu\nProvides-Extra: far\n"
        "Requires-Dist: torch<2.14,>=2.11\nRequires-Dist: colorama; sys_platform == 'win32'\n"
        "Requires-Dist: flash-attn==2.8; extra == 'gpu'\nRequires-Dist: fsspec>=1; extra == 'far'\n\n"
    )
    monkeypatch.setattr(versions, "PACKAGE", tmp_path / "kha_train")
    monkeypatch.setattr(versions, "metadata", lambda name: message_from_string(told))
    python, groups = versions.requirements()
    assert str(python) == ">=3.11"
    assert {extra: [one.name for one in wanted] for extra, wanted in groups.items()} == {
        "": ["torch"], "gpu": ["flash-attn"], "far": ["fsspec"],
    }  # fmt: skip


def test_a_disk_without_room_for_the_checkpoints_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([f"run.dir={tmp_path}/a/b", "checkpoint.keep_last=1"])
    assert by_name(machine.check_storage(config))["run.dir"].state == "OK"
    # AdamW keeps 12 bytes a parameter; an older checkpoint stays until the new one is whole.
    parameters = 12 * 2 * sum(tensor.numel() for tensor in lay_out_decoder(config).parameters())
    for free, state in ((parameters, "OK"), (parameters - 1, "FAIL")):
        usage = SimpleNamespace(free=free, total=2**40)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert by_name(machine.check_storage(config))["run.dir"].state == state
    # Beside these two, the ring leaves up to four.
    ring = replace(config, checkpoint=replace(config.checkpoint, ring_steps=4))
    for free, state in ((3 * parameters, "OK"), (3 * parameters - 1, "FAIL")):
        usage = SimpleNamespace(free=free, total=2**40)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert by_name(machine.check_storage(ring))["run.dir"].state == state


def test_a_disk_smaller_than_the_cache_may_become_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are there already take no further room, and a small dataset never fills it."""
    config = compose(["data.train=s3://bucket/shards", "data.cache_gib=2.0"])
    for free, state in ((2 * 2**30, "OK"), (2 * 2**30 - 1, "WARN")):
        usage = SimpleNamespace(free=free, total=2**40)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert by_name(machine.check_storage(config))["data.cache_dir"].state == state


@pytest.mark.parametrize(
    ("limit", "value", "name", "state"),
    [
        (resource.RLIMIT_NOFILE, 256, "open files", "WARN"),
        (resource.RLIMIT_FSIZE, 1024, "size of a file", "FAIL"),
        (resource.RLIMIT_AS, 2**33, "address space", "WARN"),
    ],
)
def test_a_limit_that_a_run_would_meet_is_named_with_its_ulimit(
    limit: int, value: int, name: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (value, value) if which == limit else free)
    found = by_name(machine.check_limits(compose()))[name]
    assert found.state == state and found.fix.startswith("ulimit -")


def test_variables_are_shown_with_their_harm_and_secrets_are_not(
    kha: Kha, monkeypatch: pytest.MonkeyPatch, environment: Callable[[dict[str, str]], dict[str, Check]]
) -> None:
    lines = environment({"TRITON_INTERPRET": "1", "WANDB_API_KEY": CANARY, "NCCL_P2P_DISABLE": "0", "EDITOR": "vi"})
    assert lines["TRITON_INTERPRET"].state == "WARN" and lines["TRITON_INTERPRET"].fix == "unset TRITON_INTERPRET"
    assert lines["NCCL_P2P_DISABLE"].state == "OK" and "EDITOR" not in lines
    assert CANARY not in str(lines["WANDB_API_KEY"])
    assert environment({"RANK": "0"})["ranks"].state == "FAIL"
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    code, out, err = kha("doctor")
    assert code == 2 and "a key is present" in out and "unset TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in out
    assert CANARY not in out + err
    assert list(services.check_wandb(compose(["telemetry.sinks=[tensorboard]"]))) == []


@pytest.fixture
def environment() -> Callable[[dict[str, str]], dict[str, Check]]:
    return lambda variables: by_name(services.check_environment(variables))


def test_a_machine_without_a_compiler_fails_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nowhere0")
    for compiled, state in {"none": "WARN", "block": "FAIL"}.items():
        config = compose([f"engine.compile={compiled}", "telemetry.wandb.mode=disabled"])
        lines = [check for check in examine(config) if check.topic in ("device", "communication")]
        assert by_name(lines)["compiler"].state == state
    interface = by_name(lines)["GLOO_SOCKET_IFNAME"]
    assert interface.state == "FAIL" and interface.found == "no interface nowhere0" and "lo" in interface.fix
