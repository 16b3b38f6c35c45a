"""The backends that need a GPU, against the formula in fp32: forward and backward, whole rows and rows of documents."""

from __future__ import annotations

import pytest
import torch

from kha_train.config.compose import compose
from kha_train.model.attention.backends import BACKENDS, FLASH, eager, flash_problem, lay_out_documents
from kha_train.model.attention.choice import check_against_maths
from kha_train.model.device import resolve_on
from kha_train.variants.backends import TRAITS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA_ONLY = sorted(name for name, traits in TRAITS.items() if traits.cuda)
SHAPES = {"gqa": (8, 2, 64, 64), "mha": (4, 4, 128, 128), "mla": (4, 4, 192, 128)}
TOLERANCE = 2e-2


def skip_what_is_missing(name: str) -> None:
    if name in FLASH and flash_problem(name):
        pytest.skip(f"{name}: {flash_problem(name)}")
    capability, traits = torch.cuda.get_device_capability(), TRAITS[name]
    if traits.only not in (None, capability) or capability < traits.oldest:
        pytest.skip(f"{name} is not used on sm_{capability[0]}{capability[1]}")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("borders", [None, [0, 100, 256, 300, 512]], ids=["whole rows", "documents"])
@pytest.mark.parametrize("name", [*CUDA_ONLY, "sdpa"])
def test_it_gives_the_numbers_of_the_formula(name: str, borders: list[int] | None, shape: str) -> None:
    skip_what_is_missing(name)
    if borders and not TRAITS[name].splits:
        pytest.skip("admits only unsplit rows")
    heads, groups, width, value_width = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(2, 256, heads, width), (2, 256, groups, width), (2, 256, groups, value_width)]
    exact = [torch.randn(size, device="cuda", generator=generator).bfloat16().float() for size in sizes]
    borders_S = None if borders is None else torch.tensor(borders, dtype=torch.int32, device="cuda")
    results = []
    for backend, dtype, masked in (
        (BACKENDS[name], torch.bfloat16, not TRAITS[name].packed),
        (eager, torch.float32, True),
    ):
        inputs = [x.detach().to(dtype).requires_grad_() for x in exact]
        documents = lay_out_documents(2, 256, inputs[0].device, borders_S, masked=masked)
        out = backend(*inputs, documents, width**-0.5)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        assert (found.float() - expected).norm() / expected.norm() < TOLERANCE


@pytest.mark.parametrize("name", CUDA_ONLY)
def test_it_is_admitted_and_passes_its_check(name: str) -> None:
    skip_what_is_missing(name)
    config = compose([f"attention.backend={name}", "data.isolate_documents=false"])
    device = torch.device("cuda", torch.cuda.current_device())
    assert resolve_on(config, device).backend.name == name
    check_against_maths(config, name, device, torch.bfloat16)
