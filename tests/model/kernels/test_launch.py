"""What a kernel is handed: rows it can walk over, and the device they are on."""

# B batch   T tokens   H heads   K head width

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from kha_train.model.kernels.launch import Call, Launch, as_rows

LAYOUTS = {
    "dense": (lambda: torch.rand(2, 3, 4, 16), True),
    "a slice of a projection": (lambda: torch.rand(2, 3, 6, 16)[:, :, 2:4], True),
    "every other token": (lambda: torch.rand(2, 6, 4, 16)[:, ::2], True),
    "some tokens of each row": (lambda: torch.rand(2, 6, 4, 16)[:, :3], False),
    "heads first": (lambda: torch.rand(2, 4, 3, 16).transpose(1, 2), False),
    "one token, heads first": (lambda: torch.rand(2, 4, 1, 16).transpose(1, 2), False),
    "width before heads": (lambda: torch.rand(2, 3, 16, 4).transpose(2, 3), False),
}


@pytest.mark.parametrize(("make", "as_it_is"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_one_stride_leads_from_token_to_token_across_rows_of_the_batch(make, as_it_is) -> None:
    x_BTHK = make()
    rows_BTHK = as_rows(x_BTHK)
    batch, tokens, heads, width = x_BTHK.shape
    strides = (*rows_BTHK.stride()[1:3], 1)
    walked = rows_BTHK.as_strided((batch * tokens, heads, width), strides)
    assert torch.equal(walked, x_BTHK.flatten(0, 1))
    assert (rows_BTHK is x_BTHK) == as_it_is


def test_a_kernel_starts_on_the_device_of_its_tensors_whichever_is_current(monkeypatch) -> None:
    x, current, started = torch.rand(2), ["another"], []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: started.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    Call(Kernel(), 1, (x, 2), {}, Launch(1, 1, 1, 1)).start()
    assert started == [x] and current == ["another"]
