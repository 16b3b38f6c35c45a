"""The run as a plain Hydra application, for those who sweep with Hydra itself:

    python launch/hydra_train.py -m attention=gqa,kha_mlp run.seed=0,1 hydra/launcher=kha_slurm hydra.launcher.name=two

`kha sweep` submits the same jobs without it. Without that launcher Hydra would train all points in this one process,
which a run ends: `-m` is then refused, with the `kha sweep` command to type.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig

from kha_train.cli.main import complain_of, run
from kha_train.config.compose import compose, shipped
from kha_train.errors import ConfigError

SLURM = "hydra/launcher=kha_slurm"
OF_MULTIRUN = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep")
"""Settings of Hydra that act on a multirun alone."""


@hydra.main(config_path=str(shipped("configs")), config_name="config", version_base="1.3")
def main(config: Any) -> None:
    """Train what Hydra composed, from the overrides it was composed of."""
    run(["train", *HydraConfig.get().overrides.task])


def check(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would take and the run would not see. Raises ConfigError for other configuration files, what
    `kha train` refuses, settings of a multirun without one, a multirun without the SLURM launcher or with a secret."""
    asked = get_args_parser().parse_args(arguments)
    if asked.help or asked.hydra_help or asked.cfg or asked.info or asked.shell_completion:
        return
    own = [text for text in asked.overrides if not text.lstrip("+~").startswith("hydra")]
    hydras = [text for text in asked.overrides if text not in own]
    for flag in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(asked, flag):
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError("the run is composed of its own files", field=name, fix="name all settings as KEY=VALUE")
    if asked.multirun or "hydra.mode=MULTIRUN" in hydras:
        if SLURM not in hydras:
            run(["train", "--multirun", *own])
        from kha_train.operate.sweep import refuse_secrets

        # Hydra writes them into a file of its own before it launches anything.
        refuse_secrets(asked.overrides)
        return
    for text in hydras:
        if text.lstrip("+~").startswith(OF_MULTIRUN):
            raise ConfigError("acts on a multirun alone", field=text, fix="add -m, or leave it out")
    compose(own)


if __name__ == "__main__":
    try:
        check(sys.argv[1:])
    except ConfigError as error:
        complain_of(error)
        sys.exit(error.exit_code)
    main()
