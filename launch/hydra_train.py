"""The run as a plain Hydra application, for those who sweep with Hydra itself:

    python launch/hydra_train.py -m attention=gqa,kha_mlp run.seed=0,1 hydra/launcher=kha_slurm hydra.launcher.name=two

`kha sweep` submits the same jobs without it.
"""

from __future__ import annotations

from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig

from kha_train.cli.main import run
from kha_train.config.compose import shipped


@hydra.main(config_path=str(shipped("configs")), config_name="config", version_base="1.3")
def main(config: Any) -> None:
    """Train what Hydra composed, from the overrides it was composed of."""
    run(["train", *HydraConfig.get().overrides.task])


if __name__ == "__main__":
    main()
