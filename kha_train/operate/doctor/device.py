"""CPU, GPU, compiler and communication, and what computes each operation of a run on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kha_train.config.resolve import Device, backend_problem, decide, resolve, triton_problem
from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.operate.ahead import processors
from kha_train.operate.doctor.checks import Check
from kha_train.variants.backends import TRAITS

if TYPE_CHECKING:
    import torch

NO_TORCH = "see the line about torch above"


def check_device(config: RunConfig) -> Iterator[Check]:
    """The processor, the GPUs, what computes each operation of `config`, the compiler, and how ranks communicate."""
    yield _processor()
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("device", "torch", "FAIL", f"cannot be imported: {error}", NO_TORCH)
        return
    yield from _gpus(torch.version.cuda or torch.version.hip, config.engine.device)
    from kha_train.model.device import device_facts

    cuda = torch.cuda.is_available() and config.engine.device != "cpu"
    facts = device_facts(torch.device("cuda" if cuda else "cpu"))
    yield from check_operations(config, facts)
    yield _compiler(needed=cuda or config.engine.compile != "none")
    yield from _communication(cuda)


def check_operations(config: RunConfig, device: Device) -> Iterator[Check]:
    """What computes each operation of `config` on `device`, why, and what cannot be used there."""
    decided = decide(config, device)
    for name, choice in decided._asdict().items():
        yield Check("kernels", name.replace("_", " "), "OK", _told(choice))
    open_ones = {"attention.backend": config.attention.backend, "engine.kernels": config.engine.kernels}
    for setting, value in open_ones.items():
        if device.kind == "cuda" and value == "auto":
            told = "compared with the plain computation and timed when a run starts, which may select others than above"
            yield Check("kernels", f"{setting}=auto", "OK", told)
    try:
        resolve(config, device)
    except ConfigError as error:
        yield Check(
            "kernels", error.field or "", "FAIL", f"{error.value} {error.problem}", error.fix or "another value"
        )
    problems = {f"attention.backend={name}": backend_problem(name, device, decided.precision) for name in TRAITS}
    problems["engine.kernels=triton"] = triton_problem(device, decided.precision)
    problems["moe.backend=megablocks"] = device.lacks("megablocks")
    for setting, problem in problems.items():
        if problem is None:
            yield Check("kernels", setting, "OK", "can be used")
        else:
            fix = "only needed for this setting" if device.kind == "cuda" else "nothing to do on a CPU"
            yield Check("kernels", setting, "WARN", problem, fix)


def _told(choice: Any) -> str:
    """A decision of `config.resolve` in words: a name, or a name with its reason."""
    return f"{choice.name}: {choice.why}" if hasattr(choice, "why") else str(choice)


def _processor() -> Check:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), os.uname().machine)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Check("device", "cpu", "OK", f"{name}, {processors()} cores for this process, {memory / 2**30:.1f} GiB")


def _gpus(built_for: str | None, asked: str) -> Iterator[Check]:
    """A line for each GPU that torch sees, or the reason why it sees none. `built_for` is torch's CUDA or ROCm, `asked`
    the setting `engine.device`: only `cuda` refuses to train on the CPU.
    """
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            yield _gpu(number, torch.cuda.get_device_properties(number))
        return
    there = bool(shutil.which("nvidia-smi")) and any(Path("/dev").glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if there and hidden in ("", "-1"):
        found, fix = f"hidden by CUDA_VISIBLE_DEVICES={hidden}", "unset CUDA_VISIBLE_DEVICES"
    elif there and not built_for:
        found = "there is one, but this torch was built for CPUs"
        fix = "install the build of the same torch for your CUDA, from https://pytorch.org/get-started"
    elif there:
        found = f"there is one, but torch for {built_for} cannot use it"
        fix = "compare the driver's version (`nvidia-smi`) with the CUDA of torch"
    else:
        found = "none"
        fix = "nothing for tiny and small models; larger ones need a GPU: `kha plan cluster=h100_1x8`"
    if asked == "cuda":
        fix = "engine.device=auto, to train on the CPU" if found == "none" else fix
        yield Check("device", "gpu", "FAIL", f"{found}; engine.device=cuda needs one", fix)
    else:
        yield Check("device", "gpu", "WARN", f"{found}: training runs on the CPU", fix)


def _gpu(number: int, properties: torch.cuda._CudaDeviceProperties) -> Check:
    import torch

    told = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.1f} GiB"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check("device", f"gpu {number}", "WARN", f"{told}, without bf16", "engine.precision=fp32")
    return Check("device", f"gpu {number}", "OK", told)


def _compiler(needed: bool) -> Check:
    command = os.environ.get("CXX") or "c++"
    path = shutil.which(command)
    if path is None:
        use = "engine.compile=block and, on a GPU, Triton's kernels need it"
        return Check("device", "compiler", "FAIL" if needed else "WARN", f"no {command}: {use}", "install g++")
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=20).stdout
    return Check("device", "compiler", "OK", f"{path}: {(shown.splitlines() or ['unknown version'])[0]}")


def _communication(cuda: bool) -> Iterator[Check]:
    """The library through which ranks communicate, the name of this host, and the network interface that was chosen."""
    from torch import cuda as torch_cuda
    from torch import distributed

    available = distributed.is_nccl_available() if cuda else distributed.is_gloo_available()
    name = "nccl" if cuda else "gloo"
    if not available:
        yield Check("communication", name, "FAIL", "this torch was built without it", "install another build of torch")
    elif cuda:
        yield Check("communication", name, "OK", ".".join(map(str, torch_cuda.nccl.version())))
    else:
        yield Check("communication", name, "OK", "part of torch")
    host = socket.gethostname()
    try:
        address = socket.getaddrinfo(host, None)[0][4][0]
        yield Check("communication", "host name", "OK", f"{host} is {address}")
    except OSError as error:
        yield Check("communication", "host name", "WARN", f"{host}: {error.strerror}", f"add {host} to /etc/hosts")
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        yield from _interface(variable, os.environ.get(variable, ""))


def _interface(variable: str, value: str) -> Iterator[Check]:
    """Whether the network interfaces that `variable` names exist. NCCL takes prefixes, `=` for whole names and `^` for
    exclusion.
    """
    there = [name for _, name in socket.if_nameindex()]
    for wanted in filter(None, value.split(",") if not value.startswith("^") else []):
        prefix = variable.startswith("NCCL") and not wanted.startswith("=")
        exact = wanted.removeprefix("=")
        if any(name.startswith(exact) if prefix else name == exact for name in there):
            yield Check("communication", variable, "OK", f"{exact} is there")
        else:
            yield Check("communication", variable, "FAIL", f"no interface {exact}", f"one of {', '.join(there)}")
