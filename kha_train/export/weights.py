"""The tensors of a checkpoint as those of the decoder that is exported, read one at a time in fp32.

The exported decoder may have its interaction multiplied into the projections, an output layer of its own where the
trained one used the embedding, and a shared expert that the trained one lacks, which is zero. Of what is
absorbed the projections of one layer are kept, else nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kha_train.checkpoint.reader import Checkpoint
from kha_train.config.schema import RunConfig
from kha_train.decode.absorb import AbsorbedWeights
from kha_train.export.links import Part
from kha_train.model.decoder import lay_out_decoder
from kha_train.variants.optimizer import MASTER

EMBEDDING, HEAD = "embedding.weight", "head.weight"


class Weights:
    """`shapes` are those of the exported decoder: its parameters and selection biases, by name. `trained` is the
    configuration of the checkpoint, `exported` that of the decoder.
    """

    def __init__(self, checkpoint: Checkpoint, trained: RunConfig, exported: RunConfig) -> None:
        self._checkpoint, self._buffers = checkpoint, checkpoint.buffers()
        self._stored = checkpoint.names()
        absorbs = trained.attention.interaction != exported.attention.interaction
        self._absorbed = AbsorbedWeights(trained, checkpoint) if absorbs else None
        state = lay_out_decoder(exported).state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def read(self, part: Part) -> Tensor:
        """A parameter or buffer, or one of a stack, fp32 on the CPU. Raises CheckpointError when it is damaged."""
        shape = part.shape(self.shapes)
        if self._absorbed is not None and part.name in self._absorbed.names:
            return self._absorbed.weight(part.name).view(shape)
        name = EMBEDDING if part.name == HEAD and HEAD not in self._stored else part.name
        if name in self._buffers:
            return self._buffers[name]
        if name not in self._stored:
            assert ".shared." in name, f"{name} is neither trained nor made"
            return torch.zeros(shape)
        size = math.prod(shape)
        return self._checkpoint.read(name, MASTER, (part.at or 0) * size, size).view(shape)
