"""Interaction between attention heads for other people's models: Knocking-Heads Attention and its relatives, inserted
into a model of transformers or OLMo-core. It needs torch alone, and safetensors for files.

    insert(model, "kha_mlp")         # before attention, heads exchange information; logits stay bit-equal at first
    save(model, directory)           # two files beside the model's own
    load(stock_model, directory)     # the same model again
    fold(model)                      # where the interaction is linear: the stock model, with other weights

This package is also built as a distribution of its own, `kha-heads` (module `kha_heads`), from these very files. So it
imports nothing of the trainer, and itself only relatively.
"""

from __future__ import annotations

from .errors import HeadsError
from .folding import fold
from .insertion import insert
from .layouts import FAMILIES, LAYOUTS
from .saving import load, save

__all__ = ["FAMILIES", "LAYOUTS", "HeadsError", "fold", "insert", "load", "save"]
