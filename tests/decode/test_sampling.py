"""Which token a random number chooses, checked by exact shares: numbers spread evenly count the probabilities."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from kha_train.decode.sampling import Sampling, Streams, choose, draw
from kha_train.errors import DivergedError

N = 960
SPREAD = (torch.arange(N, dtype=torch.float64) + 0.5) / N
SHARES = [Fraction(1, 10), Fraction(1, 2), Fraction(3, 20), Fraction(1, 4)]


def counted(sampling: Sampling) -> list[int]:
    """How many of N evenly spread numbers choose each of four tokens with the probabilities `SHARES`."""
    logits = torch.tensor([float(share) for share in SHARES], dtype=torch.float64).log().expand(N, -1)
    return choose(logits, sampling, SPREAD).bincount(minlength=4).tolist()


def expected(shares: list[Fraction]) -> list[int]:
    """The same by exact arithmetic: token i takes [before, before + share) of the numbers, the likeliest first."""
    total, before, counts = sum(shares), Fraction(0), [0] * 4
    for token in sorted(range(4), key=lambda token: -SHARES[token]):
        after = before + shares[token] / total
        counts[token] = sum(before <= Fraction(2 * i + 1, 2 * N) < after for i in range(N))
        before = after
    return counts


KEPT = {
    "all": (Sampling(tokens=1), SHARES),
    "temperature": (Sampling(tokens=1, temperature=0.5), [share**2 for share in SHARES]),
    "top p": (Sampling(tokens=1, top_p=0.7), [0, SHARES[1], 0, SHARES[3]]),
    "a small top p": (Sampling(tokens=1, top_p=0.01), [0, 1, 0, 0]),
    "top k": (Sampling(tokens=1, top_k=3), [0, *SHARES[1:]]),
    "top k above all": (Sampling(tokens=1, top_k=9), SHARES),
    # Of the two left by top k, the first alone has a share of 2/3.
    "top k, then top p": (Sampling(tokens=1, top_k=2, top_p=0.66), [0, 1, 0, 0]),
    "temperature, then top p": (Sampling(tokens=1, temperature=0.5, top_p=0.8), [0, SHARES[1] ** 2, 0, SHARES[3] ** 2]),
}


@pytest.mark.parametrize("name", KEPT)
def test_shares_of_drawn_tokens_are_the_softmax_of_what_is_kept(name: str) -> None:
    sampling, shares = KEPT[name]
    assert counted(sampling) == expected([Fraction(share) for share in shares])


def test_numbers_at_the_ends_and_equal_logits_choose_kept_tokens() -> None:
    logits = torch.zeros(2, 5)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert choose(logits, Sampling(tokens=1, top_k=2), ends).tolist() == [0, 1]
    assert choose(logits, Sampling(tokens=1), ends).tolist() == [0, 4]


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324])
def test_the_smallest_temperatures_draw_the_likeliest_token(temperature: float) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(3)) * 1e-3
    sampling = Sampling(tokens=1, temperature=temperature)
    assert torch.equal(draw(logits, sampling, Streams(sampling, 64)), logits.argmax(-1))


def test_a_row_has_the_numbers_of_its_seed_and_stream_whatever_the_other_rows() -> None:
    def numbers(seed: int, *streams: int) -> list[list[float]]:
        """Three numbers of each row."""
        drawn = Streams(Sampling(tokens=1, seed=seed, streams=streams), len(streams))
        return torch.stack([drawn.next() for _ in range(3)], dim=1).tolist()

    one, two = numbers(7, 0, 1)
    assert numbers(7, 1) == [two] and numbers(7, 5, 0, 1)[1:] == [one, two]
    assert len({*one, *two, *numbers(8, 0)[0]}) == 9 and all(0 <= number < 1 for number in one + two)


def test_logits_that_are_not_finite_are_told() -> None:
    sampling = Sampling(tokens=1)
    with pytest.raises(DivergedError):
        draw(torch.tensor([[0.0, float("nan")]]), sampling, Streams(sampling, 1))
