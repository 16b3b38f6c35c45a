"""Optimisers: how flat fp32 shares are stepped, in which groups and at which rate."""

from __future__ import annotations

from kha_train.optim.adamw import AdamW
from kha_train.optim.contract import Part, ShareOptimizer
from kha_train.optim.groups import interaction_settings, parameter_groups
from kha_train.optim.schedule import learning_rate

__all__ = ["AdamW", "Part", "ShareOptimizer", "interaction_settings", "learning_rate", "parameter_groups"]
