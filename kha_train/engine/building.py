"""What all engines share: building the decoder and its optimiser, and finding the state that is saved besides
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType

import torch
from torch import Tensor, nn

from kha_train.config.resolve import Resolved, precision_on
from kha_train.config.schema import RunConfig
from kha_train.distributed import World
from kha_train.engine.contract import Changed, Engine, Fragment, InitialValue
from kha_train.engine.expert_groups import apart_by_ranks
from kha_train.model.decoder import Decoder, DecoderOutput, build_decoder
from kha_train.model.device import DTYPES
from kha_train.model.host import spare_the_compiler, use_tensor_cores
from kha_train.model.init import initial_value, initial_values, interaction_identities, linear_maps, reset_buffers
from kha_train.model.moe.experts import Experts
from kha_train.model.moe.parallel import ExpertRanks
from kha_train.optim import Part, ShareOptimizer
from kha_train.variants.registry import OPTIMIZERS

GRAPHS_OF_BLOCKS = 24
"""Maximum number of graphs that the compiler may make of `Block.forward`, which all blocks share. Twelve are usual:
dense or with experts, in training or evaluation, for first sizes, varying sizes and single rows. Statistics of layers
add those of training once more. torch's own limit is 8.
"""


def resolve_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """The dtype of parameters and activations on `device`, see `precision_on`."""
    return DTYPES[precision_on(config, device.type)]


def prepare_device(world: World, dtype: torch.dtype) -> None:
    """Set torch's process-wide settings for parameters of `dtype`."""
    if world.device.type == "cuda":
        use_tensor_cores(dtype)


def materialise(
    config: RunConfig,
    resolved: Resolved,
    world: World,
    initial: InitialValue,
    keep: Callable[[nn.Parameter], None] = lambda parameter: None,
    ranks: ExpertRanks | None = None,
) -> tuple[Decoder, dict[str, tuple[int, ...]]]:
    """The decoder on the device of `world`, as `resolved` says, and the global shape of each of its parameters by name.

    It is built on `meta` and filled one parameter at a time. Each is passed to `keep`, which may free a part of it, so
    that no rank holds the whole model in fp32. With `ranks` this one holds its part of the experts. Buffers stay fp32.
    Collective.
    """
    with torch.device("meta"):
        decoder = build_decoder(config, resolved)
    shapes, dtype = {}, DTYPES[resolved.precision]
    for module, name, full_name, default in list(initial_values(decoder, config.run.seed)):
        # An engine may shard each parameter by a collective: an unreadable one must not leave a rank waiting.
        with world.agreed(f"make {full_name}"):
            whole = initial(full_name, default)
            value = (ranks.own(whole) if ranks and isinstance(module, Experts) else whole).to(world.device, dtype)
        shapes[full_name] = tuple(whole.shape)
        module._parameters[name] = parameter = nn.Parameter(value)
        keep(parameter)
    decoder.tie_weights()
    if ranks:
        for module in decoder.modules():
            if isinstance(module, Experts):
                module.spread(ranks)
    with world.device:
        reset_buffers(decoder, config.run.seed)
    if config.engine.compile == "block":
        _compile_blocks(decoder)
    return decoder, shapes


def _compile_blocks(decoder: Decoder) -> None:
    import torch._dynamo.config

    # Process-wide: torch has one such number.
    torch._dynamo.config.recompile_limit = max(GRAPHS_OF_BLOCKS, torch._dynamo.config.recompile_limit)
    for block in decoder.blocks:
        block.compile()


def build_optimizer(
    config: RunConfig,
    decoder: Decoder,
    named: Iterable[tuple[str, nn.Parameter]],
    shapes: Mapping[str, tuple[int, ...]],
) -> ShareOptimizer:
    """The optimiser of `config` for the `named` parameters of `decoder`, or for the tensors that stand for them."""
    optimizer_class: type[ShareOptimizer] = OPTIMIZERS[config.optim.name].load()
    groups = optimizer_class.group(named, config.optim, interaction_identities(decoder), shapes, linear_maps(decoder))
    groups = apart_by_ranks(groups)
    return optimizer_class(groups, config.optim)


def start_optimizer(engine: Engine, optimizer: ShareOptimizer, shares: Sequence[Tensor]) -> None:
    """Tell the optimiser what its `shares` hold and make its states. `shares` are in the same order on every rank.
    Collective.
    """
    config, parts = engine.config, [(share, list[Part]()) for share in shares]
    of = dict(parts)
    for fragment in engine.fragments():
        length = fragment.views["master"].numel()
        of[fragment.flat].append(Part(fragment.name, fragment.start, length, fragment.offset))
    optimizer.lay_out(parts, engine.shapes, linear_maps(engine.decoder), engine.world)
    optimizer.start(shares, moment_dtype(config))
    _share_identities(config, engine.decoder, optimizer, engine.fragments())


def _share_identities(
    config: RunConfig, decoder: Decoder, optimizer: ShareOptimizer, fragments: Iterable[Fragment]
) -> None:
    """Give the optimiser the targets of `optim.interaction_decay`, cut like the masters."""
    if config.optim.interaction_decay != "identity":
        return
    rules, shared = interaction_identities(decoder), optimizer.identities
    for fragment in fragments:
        rule = rules.get(fragment.name)
        if rule is not None:
            if fragment.flat not in shared:
                shared[fragment.flat] = torch.zeros_like(fragment.flat, requires_grad=False)
            length = fragment.views["master"].numel()
            whole = initial_value(rule, 0, fragment.name, fragment.shape).flatten()
            part = whole[fragment.start : fragment.start + length]
            shared[fragment.flat].narrow(0, fragment.offset, length).copy_(part)


@contextmanager
def told_of_changes(
    optimizer: ShareOptimizer, fragments: Iterable[Fragment], changed: Changed | None
) -> Iterator[None]:
    """While inside, `changed` (see `contract.Engine.apply`) is told what `optimizer` makes of the `fragments`. None
    costs nothing."""
    if changed is None:
        yield
        return
    parts: dict[Tensor, list[tuple[str, int, int]]] = {}
    for fragment in fragments:
        length = fragment.views["master"].numel()
        parts.setdefault(fragment.flat, []).append((fragment.name, fragment.offset, length))

    def stepped(share: Tensor, change: Tensor) -> None:
        for name, offset, length in parts.get(share, []):
            changed(name, change.narrow(0, offset, length))

    optimizer.stepped = stepped
    try:
        yield
    finally:
        optimizer.stepped = None


def scaled_loss(output: DecoderOutput, loss_scale: float, token_scale: float) -> Tensor:
    """The value to back-propagate for a micro-batch, see `contract.Engine.accumulate`."""
    assert output.loss_sum is not None, "the batch has labels"
    loss = output.loss_sum * loss_scale
    return loss if output.auxiliary is None else loss + output.auxiliary.total_sum * token_scale


def moment_dtype(config: RunConfig) -> torch.dtype:
    """The dtype in which the optimiser keeps its states."""
    return torch.bfloat16 if config.engine.moment_dtype == "bf16" else torch.float32


def persistent_buffers(decoder: Decoder) -> dict[str, Tensor]:
    """The buffers that a checkpoint stores, by name, as live tensors."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in decoder.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def check_buffers_are_wide(decoder: Decoder) -> None:
    """Buffers must not be bf16: updates of 1e-3 would vanish."""
    for name, buffer in decoder.named_buffers():
        assert buffer.dtype != torch.bfloat16, f"{name} lost its precision"


def spare_optimizers_the_compiler() -> None:
    """Let torch's optimizers step without importing torch's compiler, which takes seconds."""
    for method in vars(torch.optim.Optimizer).values():
        if isinstance(method, FunctionType) and method.__code__.co_filename.endswith("_compile.py"):
            spare_the_compiler(method)
