"""The engine that runs use. Code outside this room constructs it only through `DefaultEngine`."""

from __future__ import annotations

from kha_train.engine import deepspeed
from kha_train.engine.contract import Engine

DefaultEngine: type[Engine] = deepspeed.Engine
