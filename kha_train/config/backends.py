"""What each backend of softmax(QK)V can do, so that a configuration is judged without torch and without a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kha_train.errors import ConfigError, Settings, either

if TYPE_CHECKING:
    from kha_train.config.schema import RunConfig

BackendName = Literal["auto", "sdpa", "eager", "cudnn", "varlen", "flash_attn"]


@dataclass(frozen=True)
class Traits:
    """`cuda`: runs on CUDA alone, in half precision; `splits`: keeps documents of one row apart; `biased`: adds a bias
    to the scores, which ALiBi needs; `packed`: reads the borders of documents and needs no mask; `oldest`: the least
    compute capability of CUDA; `only`: the one it is used on."""

    cuda: bool = False
    splits: bool = True
    biased: bool = False
    packed: bool = False
    oldest: tuple[int, int] = (0, 0)
    only: tuple[int, int] | None = None


TRAITS: dict[str, Traits] = {
    "eager": Traits(biased=True),
    "sdpa": Traits(biased=True),
    "cudnn": Traits(cuda=True, splits=False, only=(9, 0)),
    "varlen": Traits(cuda=True, packed=True, oldest=(8, 0)),
    "flash_attn": Traits(cuda=True, packed=True, oldest=(8, 0)),
}


def invalid_backend(config: RunConfig) -> ConfigError | None:
    """Why the chosen backend cannot compute what the configuration asks for, or None."""
    name = config.attention.backend
    if name == "auto":
        return None
    traits = TRAITS[name]
    if traits.cuda and config.engine.device == "cpu":
        return _refused(name, "runs on CUDA alone, and engine.device=cpu")
    if traits.cuda and config.engine.precision == "fp32":
        return _refused(name, "computes in bf16, and engine.precision=fp32")
    if not traits.splits and config.data.isolate_documents:
        return _refused(
            name,
            "admits only unsplit causal rows, and data.isolate_documents=true splits rows into documents",
            Settings(
                "data.isolate_documents=false data.packing=concat",
                "{} (another experiment: tokens then see earlier documents)",
            ),
        )
    if not traits.biased and config.attention.positions == "alibi":
        return _refused(name, "adds no bias to the scores, and attention.positions=alibi")
    return None


def _refused(name: str, reason: str, *further: Settings) -> ConfigError:
    fix = either(Settings("attention.backend=sdpa"), *further)
    return ConfigError(reason, field="attention.backend", value=name, fix=fix)
