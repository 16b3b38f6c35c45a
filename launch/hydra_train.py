"""`kha train` as a plain Hydra application, for sweeps with Hydra itself:

    python launch/hydra_train.py -m attention=gqa,kha_mlp run.seed=0,1 hydra/launcher=kha_slurm hydra.launcher.name=two

`kha sweep` submits the same jobs without Hydra's launcher. Without that launcher, Hydra would train all points in this
one process, but a run ends its process. So `-m` is then refused, and the error shows the `kha sweep` command to type.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

try:
    import hydra
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    from kha_train.cli.main import complain_of, run
    from kha_train.config.compose import compose, shipped
    from kha_train.errors import ConfigError
    from kha_train.operate.sweep import refuse_secrets
except ModuleNotFoundError as error:
    print(
        f"configuration error: {sys.executable} has no {error.name}: activate the environment that kha_train is "
        "installed in, `source .venv/bin/activate` (`make quickstart` makes it), or name its Python",
        file=sys.stderr,
    )
    sys.exit(2)

SLURM = "hydra/launcher=kha_slurm"
PARAMS = "hydra.sweeper.params"
QUOTES = "'\""
OF_MULTIRUN = ("hydra/launcher", "hydra/sweeper", "hydra.launcher", "hydra.sweep")
"""Hydra settings that only affect a multirun."""


@hydra.main(config_path=str(shipped("configs")), config_name="config", version_base="1.3")
def main(config: Any) -> None:
    """Train what Hydra composed, using the same overrides."""
    # The SLURM launcher trains no point in this process, so another launcher was chosen, in whatever spelling.
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        _refuse_multirun(get_args_parser().parse_args(sys.argv[1:]).overrides)
    run(["train", *HydraConfig.get().overrides.task])


def check(arguments: Sequence[str]) -> None:
    """Refuse what Hydra would accept and the run would ignore. Raises ConfigError for other configuration files, for
    anything that `kha train` refuses, for multirun settings without a multirun, for a multirun without the SLURM
    launcher, and for secrets.
    """
    asked = get_args_parser().parse_args(arguments)
    if asked.help or asked.hydra_help or asked.cfg or asked.info or asked.shell_completion:
        return
    # Hydra writes all overrides into its own files before it starts anything.
    refuse_secrets(asked.overrides)
    own = [text for text in asked.overrides if not _is_hydras(text)]
    hydras = [text for text in asked.overrides if _is_hydras(text)]
    for flag in ("config_path", "config_name", "config_dir", "experimental_rerun"):
        if getattr(asked, flag):
            name = f"--{flag.replace('_', '-')}"
            raise ConfigError("a run is composed from its own files", field=name, fix="write all settings as KEY=VALUE")
    if asked.multirun or "hydra.mode=MULTIRUN" in hydras:
        # Hydra uses the last of several.
        launchers = [text for text in hydras if text.lstrip("+~").startswith("hydra/launcher")]
        if launchers[-1:] != [SLURM]:
            _refuse_multirun(asked.overrides)
        return
    for text in hydras:
        if text.lstrip("+~").startswith(OF_MULTIRUN):
            raise ConfigError("only affects a multirun", field=text, fix="add -m, or leave it out")
    compose(own)


def _refuse_multirun(overrides: Sequence[str]) -> None:
    """Raises ConfigError with the `kha sweep` command that trains all points, including those of
    `hydra.sweeper.params`.
    """
    axes = [axis for text in overrides for axis in (_axes(text) if _is_hydras(text) else [text])]
    run(["train", "--multirun", *axes])


def _axes(text: str) -> list[str]:
    """The axes of `hydra.sweeper.params.KEY=A,B`, or of a whole mapping of them, as `KEY=A,B`; nothing for other
    settings.
    """
    key, _, value = text.lstrip("+~").partition("=")
    if not key.startswith(PARAMS):
        return []
    if key != PARAMS:
        return [f"{key.removeprefix(PARAMS + '.')}={value.strip(QUOTES)}"]
    mapping = OverridesParser.create().parse_override(text).value()
    return [f"{name}={getattr(one, 'text', one)}" for name, one in mapping.items()] if isinstance(mapping, dict) else []


def _is_hydras(text: str) -> bool:
    return text.lstrip("+~").startswith("hydra")


if __name__ == "__main__":
    try:
        check(sys.argv[1:])
    except ConfigError as error:
        complain_of(error)
        sys.exit(error.exit_code)
    main()
