"""The variables of the environment that change a run, and W&B."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from kha_train.config.schema import RunConfig
from kha_train.errors import ConfigError
from kha_train.operate.doctor.checks import Check, State
from kha_train.record.redact import is_secret_name
from kha_train.telemetry.server import has_key

PREFIXES = (
    "CUDA_", "DS_", "GLOO_", "HF_", "HYDRA_", "KHA_", "MASTER_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_",
    "TORCHINDUCTOR_", "TRITON_", "TRANSFORMERS_", "WANDB_",
)  # fmt: skip
"""Variables that this program or the libraries below it obey begin like these."""
DANGEROUS: dict[str, tuple[State, str]] = {
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": ("FAIL", "a run refuses to start: checkpoints could run code"),
    "TRITON_INTERPRET": ("WARN", "kernels run in an interpreter, very slowly"),
    "CUDA_LAUNCH_BLOCKING": ("WARN", "the CPU waits for every kernel"),
    "NCCL_P2P_DISABLE": ("WARN", "GPUs of one node do not talk directly"),
    "NCCL_IB_DISABLE": ("WARN", "InfiniBand is not used"),
}
"""Variables that harm a run where they are set, except to 0."""


def check_environment(environ: Mapping[str, str]) -> Iterator[Check]:
    """The variables that change what a run does, and whether they say which rank this process is."""
    from kha_train.distributed import World

    try:
        world = World.from_environment(environ)
        yield Check("environment", "ranks", "OK", f"rank {world.rank} of {world.size}")
    except ConfigError as error:
        yield Check("environment", "ranks", "FAIL", error.problem, str(error.fix))
    for name in sorted(environ):
        if not name.startswith(PREFIXES):
            continue
        value = "set, not shown" if is_secret_name(name) else environ[name]
        state, harm = DANGEROUS.get(name, ("OK", ""))
        if not harm or environ[name] in ("", "0"):
            yield Check("environment", name, "OK", value)
        else:
            yield Check("environment", name, state, f"{value}: {harm}", f"unset {name}")


def check_wandb(config: RunConfig) -> Iterator[Check]:
    """The mode that W&B would work in, if it is a sink, and whether there is a key. A key is never shown."""
    if "wandb" not in config.telemetry.sinks:
        return
    from kha_train.telemetry.wandb import DEFAULT_HOST, safely_chosen_mode

    mode, reason = safely_chosen_mode(config.telemetry.wandb.mode)
    key = "a key is present" if has_key(os.environ.get("WANDB_BASE_URL") or DEFAULT_HOST) else "no key"
    if reason:
        fix = "`wandb login`, or telemetry.wandb.mode=offline to expect no server"
        yield Check("wandb", "mode", "WARN", f"{mode}, {key}: {reason}", fix)
    else:
        yield Check("wandb", "mode", "OK", f"{mode}, {key}")
