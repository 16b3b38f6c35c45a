"""Initial values. Each is a pure function of (run seed, full parameter name, shape), drawn in fp32 on the CPU, so it is
the same for every device, world size, ZeRO stage and attention variant.

A module declares what it owns with `DeclaredModule.declare_parameter` and `declare_buffer`; nothing is drawn while a
module is built. `initialise` fills a whole decoder. An engine that shards parameters iterates over `initial_values`
instead and materialises one parameter at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from kha_train.config.schema import RunConfig
from kha_train.variants.optimizer import LinearMap


class Initial(Protocol):
    """A rule that makes the initial value of one parameter."""

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The fp32 CPU value of that shape; random rules use only `generator`."""
        ...


@dataclass(frozen=True)
class Normal:
    """Normal with mean 0."""

    std: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """See `Initial.draw`."""
        empty = torch.empty(shape, dtype=torch.float32, device="cpu")
        return empty.normal_(0.0, self.std, generator=generator)


@dataclass(frozen=True)
class SizeKeeping:
    """For x M with M [..., inputs, outputs]: normal with deviation `scale` / sqrt(inputs), so that x M is as large as x
    times `scale`.
    """

    scale: float = 1.0

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """See `Initial.draw`."""
        return Normal(self.scale / math.sqrt(shape[-2])).draw(shape, generator)


@dataclass(frozen=True)
class Orthogonal:
    """A random orthogonal matrix times `scale`, uniform over all of them (the Q of a normal matrix, with R's diagonal
    made positive: Mezzadri, arXiv math-ph/0609050), so that x M is exactly as large as x times `scale`. One that is not
    square has orthonormal rows (fewer rows than columns) or columns. Leading dimensions count matrices, each drawn by
    itself.
    """

    scale: float = 1.0

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """See `Initial.draw`."""
        normal = Normal(1.0).draw(shape, generator).double()
        wide = shape[-2] < shape[-1]
        # In fp64: rounded to fp32, the product with its transpose is then the identity to some 1e-7.
        q, r = torch.linalg.qr(normal.mT if wide else normal)
        q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        value: Tensor = self.scale * (q.mT if wide else q)
        return value.float().contiguous()


@dataclass(frozen=True)
class Constant:
    """All elements equal."""

    value: float

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """See `Initial.draw`."""
        return torch.full(shape, self.value, dtype=torch.float32, device="cpu")


@dataclass(frozen=True)
class Identity:
    """The identity matrix times `scale`; leading dimensions count matrices."""

    scale: float = 1.0

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """See `Initial.draw`."""
        eye = torch.eye(*shape[-2:], dtype=torch.float32, device="cpu")
        return (self.scale * eye).expand(shape).clone()


@dataclass(frozen=True)
class Blocks:
    """For heads O composed of heads I by a matrix [I, O], times `scale`. Of fewer components, each serves a block of
    consecutive heads, as in grouped-query attention; of more, each head is the sum of a block of components, divided by
    the root of their number, which keeps its size. Of as many it is the identity.
    """

    scale: float = 1.0

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """See `Initial.draw`."""
        inputs, outputs = shape
        most, least = max(shape), min(shape)
        place = torch.arange(most, device="cpu")
        block = place * least // most
        value = torch.zeros(shape, dtype=torch.float32, device="cpu")
        if inputs <= outputs:
            value[block, place] = self.scale
        else:
            value[place, block] = self.scale * torch.bincount(block)[block].rsqrt()
        return value


class DeclaredModule(nn.Module):
    """A module that owns parameters or buffers and declares their initial values.

    Parameters are created empty on the current device. Buffers keep their declared dtype when the module is cast: a
    selection bias moves in steps of 1e-3 and a rotary angle reaches thousands, which bf16 cannot represent.
    """

    def __init__(self) -> None:
        super().__init__()
        self.initial: dict[str, Initial] = {}
        self.frozen: dict[str, Initial] = {}
        self.identities: dict[str, Initial | None] = {}
        self.linear_shapes: dict[str, LinearMap] = {}
        self.fresh_buffers: dict[str, Callable[[], Tensor]] = {}

    def declare_parameter(self, name: str, shape: tuple[int, ...], initial: Initial) -> None:
        """Register the parameter `name`, uninitialised, and remember its rule."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.initial[name] = initial

    def declare_frozen(self, name: str, shape: tuple[int, ...], initial: Initial) -> None:
        """Register `name`, uninitialised, as a persistent fp32 buffer that is never trained, and remember its rule: it
        has the values that a parameter of this name and rule starts from, but no gradient and no optimiser state.
        """
        self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=True)
        self.frozen[name] = initial

    def declare_interaction(self, name: str, identity: Initial | None) -> None:
        """Declare that heads exchange information through the parameter or frozen matrix `name`; with the value
        `identity` they pass unchanged (None: there is no such value). The optimiser may treat such parameters
        separately (`optim.interaction_decay`).
        """
        self.identities[name] = identity

    def declare_map(self, name: str, along: int = -1, sizes: tuple[int, ...] = ()) -> None:
        """Declare that the parameter `name` is a linear map of features, [..., rows, columns], with leading dimensions
        that count maps; or several side by side, with these `sizes` in dimension `along`. The optimiser may treat such
        parameters as matrices (`optim=muon`).
        """
        self.linear_shapes[name] = LinearMap(along, sizes)

    def declare_buffer(
        self, name: str, shape: tuple[int, ...], fresh: Callable[[], Tensor], *, persistent: bool
    ) -> None:
        """Register the fp32 buffer `name`; `fresh()` makes its fp32 CPU value. Only persistent ones are
        checkpointed."""
        self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=persistent)
        self.fresh_buffers[name] = fresh

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DeclaredModule:
        declared = {name: self.get_buffer(name) for name in (*self.fresh_buffers, *self.frozen)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, without annotations
        for name, buffer in declared.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class Linear(DeclaredModule):
    """y = x W^T without bias; `weight` is [outputs, inputs]. Outputs that are several maps side by side are declared by
    their sizes in `fused`.
    """

    weight: nn.Parameter

    def __init__(self, inputs: int, outputs: int, initial: Initial, fused: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.declare_parameter("weight", (outputs, inputs), initial)
        self.declare_map("weight", -2, fused)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in the dtype of `x`."""
        return nn.functional.linear(x, self.weight)


def residual_std(config: RunConfig) -> float:
    """Standard deviation of matrices that write into the residual stream (attention output, expert down projection):
    scaled by 1 / sqrt(2 * layers) with `model.scale_residual_init`, so that the stream's variance does not grow with
    depth.
    """
    depth = 2 * config.model.layers if config.model.scale_residual_init else 1
    return config.model.init_std / math.sqrt(depth)


def initial_value(initial: Initial, seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The fp32 CPU value of the parameter `name`; it depends only on the seed, the name and the shape."""
    key = f"{seed}|{name}|{','.join(map(str, shape))}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return initial.draw(shape, generator)


def initial_values(decoder: nn.Module, seed: int) -> Iterator[tuple[nn.Module, str, str, Callable[[], Tensor]]]:
    """Each parameter once (a tied one under its first name): its owner, its local name, its full name and a thunk that
    draws its fp32 CPU value. Nothing is drawn before a thunk is called, so this works on a decoder on `meta`.

    After replacing parameters, rather than filling them, call `Decoder.tie_weights`.
    """
    seen: set[int] = set()
    for prefix, module in decoder.named_modules():
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            assert isinstance(module, DeclaredModule), f"{prefix} owns {local} without declaring its initial value"
            name = f"{prefix}.{local}" if prefix else local
            yield module, local, name, partial(initial_value, module.initial[local], seed, name, tuple(parameter.shape))


def frozen_values(decoder: nn.Module, seed: int) -> Iterator[tuple[nn.Module, str, str, Callable[[], Tensor]]]:
    """The same for each frozen matrix (`DeclaredModule.declare_frozen`)."""
    for prefix, module in decoder.named_modules():
        if isinstance(module, DeclaredModule):
            for local, initial in module.frozen.items():
                name = f"{prefix}.{local}" if prefix else local
                shape = tuple(module.get_buffer(local).shape)
                yield module, local, name, partial(initial_value, initial, seed, name, shape)


def interaction_identities(decoder: nn.Module) -> dict[str, Initial | None]:
    """The parameters and frozen matrices through which heads exchange information, by full name, each with the rule of
    its identity.
    """
    return {
        f"{prefix}.{name}" if prefix else name: identity
        for prefix, module in decoder.named_modules()
        if isinstance(module, DeclaredModule)
        for name, identity in module.identities.items()
    }


def linear_maps(decoder: nn.Module) -> dict[str, LinearMap]:
    """The parameters that are linear maps of features, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: shape
        for prefix, module in decoder.named_modules()
        if isinstance(module, DeclaredModule)
        for name, shape in module.linear_shapes.items()
    }


def not_identities(decoder: nn.Module, seed: int, names: Container[str]) -> list[str]:
    """Those of the weights `names` with which heads do not begin unchanged."""
    identities, found = interaction_identities(decoder), []
    for module, local, name, draw in (*initial_values(decoder, seed), *frozen_values(decoder, seed)):
        if name in names:
            identity, shape = identities.get(name), tuple(getattr(module, local).shape)
            if identity is None or not torch.equal(draw(), identity.draw(shape, torch.Generator())):
                found.append(name)
    return found


def initialise(decoder: nn.Module, seed: int) -> None:
    """Fill every parameter and buffer of a decoder that is not on `meta`, in place."""
    with torch.no_grad():
        for owner, local, _, value in initial_values(decoder, seed):
            getattr(owner, local).copy_(value())
    reset_buffers(decoder, seed)


def reset_buffers(decoder: nn.Module, seed: int | None = None, device: torch.device | str | None = None) -> None:
    """Recompute every declared buffer (rotary tables, zero selection biases, frozen matrices) in fp32. `seed` is the
    run's, which only frozen matrices need.

    On `device` if given; otherwise on the buffer's device or, if that is `meta`, on torch's current default device.
    """

    def place(module: nn.Module, name: str, value: Tensor) -> None:
        here = module.get_buffer(name).device
        target = device or (torch.get_default_device() if here.type == "meta" else here)
        module._buffers[name] = value.to(target)

    for module in decoder.modules():
        for name, fresh in module.fresh_buffers.items() if isinstance(module, DeclaredModule) else ():
            place(module, name, fresh())
    for module, name, _, value in frozen_values(decoder, -1 if seed is None else seed):
        assert seed is not None, "frozen matrices follow from the seed of the run"
        place(module, name, value())
