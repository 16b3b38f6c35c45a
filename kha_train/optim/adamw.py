"""AdamW, the default optimiser."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from kha_train.optim.contract import Groups, ShareOptimizer
from kha_train.variants.optimizer import AdamWOptions


class AdamW(ShareOptimizer, torch.optim.AdamW):
    """torch's AdamW, step for step, without the decorator that imports torch's compiler at the first step, which takes
    seconds.
    """

    def __init__(self, groups: Groups, options: AdamWOptions) -> None:
        torch.optim.AdamW.__init__(
            self,
            groups,
            lr=options.lr,
            betas=options.betas,
            eps=options.eps,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.adopt(options)

    def step_group(self, group: dict[str, Any]) -> None:
        """Step all shares of `group` in one call of the fused kernel, which also counts the step."""
        inspect.unwrap(torch.optim.AdamW.step)(self)
