"""Generation: which tokens are drawn, that a cache changes nothing, that a finished run generates text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from kha_train.cli.main import app
from kha_train.config.compose import compose
from kha_train.config.resolve import resolve_decoding
from kha_train.decode.generate import Sampling, absorbing_helps, draw, generate
from kha_train.errors import ConfigError
from kha_train.model.attention.backends import sdpa
from kha_train.model.decoder import Decoder, build_decoder
from kha_train.variants.registry import BASES

PRESETS = ("gqa", "gta", "mla", "talking_heads", "diff", "linear", "gated", "kha_linear", "kha_mlp", "kha_gate", "mea")
SMALL = ("model.layers=2", "model.hidden_size=32", "model.head_dim=8", "model.vocab_size=64", "model.seq_len=24")


def decoder_of(preset: str) -> Decoder:
    config = compose([*SMALL, f"attention={preset}", "moe.backend=loop"])
    decoder = build_decoder(config, resolve_decoding(config))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder


def test_a_model_is_absorbed_only_where_the_cache_does_not_grow() -> None:
    """Two components compose four heads: absorbed, a layer would cache four of keys and values instead of two."""
    for overrides, simpler in (
        (("attention=kha_linear",), True),
        (("attention=kha_mlp",), False),
        (("attention=mea",), True),
        (("attention=mea", "model.kv_heads=4", "attention.interaction.component_heads=2"), False),
        (("attention=mea", "attention.interaction.component_heads=6"), True),
    ):
        assert absorbing_helps(compose([*SMALL, *overrides])) == simpler, overrides


def prompt(rows: int = 2, tokens: int = 6) -> Tensor:
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(5))


def drawn(decoder: Decoder, sampling: Sampling, stop: int | None = None) -> list[list[int]]:
    return torch.stack(list(generate(decoder, prompt(), sampling, stop)), dim=1).tolist()


def test_the_presets_tried_cover_every_base() -> None:
    assert set(BASES) <= set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_likeliest_tokens_are_those_of_whole_forwards(preset: str) -> None:
    decoder, tokens = decoder_of(preset), prompt()
    for _ in range(8):
        tokens = torch.cat((tokens, decoder(tokens).logits_BTV[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert drawn(decoder, Sampling(tokens=8, temperature=0)) == tokens[:, 6:].tolist()


def test_the_same_seed_draws_the_same_and_another_something_else() -> None:
    decoder = decoder_of("gqa")
    first, again, other = (drawn(decoder, Sampling(tokens=10, temperature=2.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_draws_follow_the_probabilities_and_top_p_leaves_out_the_tail() -> None:
    probability = torch.tensor([0.1, 0.5, 0.15, 0.25])
    logits = probability.log().expand(20_000, -1)
    for sampling, expected in (
        (Sampling(tokens=1), probability),
        (Sampling(tokens=1, temperature=0.5), probability**2 / (probability**2).sum()),
        (Sampling(tokens=1, top_p=0.7), torch.tensor([0, 2 / 3, 0, 1 / 3])),
        (Sampling(tokens=1, top_p=0.01), torch.tensor([0.0, 1.0, 0.0, 0.0])),
        (Sampling(tokens=1, temperature=0), torch.tensor([0.0, 1.0, 0.0, 0.0])),
    ):
        counts = draw(logits, sampling, torch.Generator().manual_seed(0)).bincount(minlength=4) / len(logits)
        torch.testing.assert_close(counts, expected, atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 5e-324])
def test_the_smallest_temperatures_draw_the_likeliest_token(temperature: float) -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(3)) * 1e-3
    drawn_B = draw(logits, Sampling(tokens=1, temperature=temperature), torch.Generator().manual_seed(0))
    assert torch.equal(drawn_B, logits.argmax(-1))


@pytest.mark.parametrize("settings", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"seed": 2**63}])
def test_sampling_that_cannot_be_is_refused(settings: dict[str, float]) -> None:
    assert Sampling(tokens=1, **settings).invalid() is not None


def test_a_row_that_has_stopped_stays_stopped_and_all_stopped_rows_end_it() -> None:
    decoder = decoder_of("gqa")
    free = drawn(decoder, Sampling(tokens=12, temperature=3.0))
    stop = free[0][3]
    rows = drawn(decoder, Sampling(tokens=12, temperature=3.0), stop)
    first = free[0].index(stop)
    assert rows[0][: first + 1] == free[0][: first + 1] and set(rows[0][first:]) == {stop}
    assert len(rows[0]) == 12 or all(row[-1] == stop for row in rows)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"tokens": 0}, "tokens"),
        ({"tokens": 19}, "tokens"),
        ({"tokens": 1, "temperature": -1.0}, "temperature"),
        ({"tokens": 1, "top_p": 0.0}, "top_p"),
    ],
)
def test_settings_that_cannot_be_name_their_field(settings: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        next(generate(decoder_of("gqa"), prompt(), Sampling(**settings)))
    assert refused.value.field == field


def test_decoding_takes_a_backend_for_fewer_queries_than_keys_and_folds_nothing() -> None:
    config = compose([*SMALL, "attention=kha_mlp", "attention.interaction.impl=folded"])
    config = replace(config, attention=replace(config.attention, backend="varlen"))
    resolved = resolve_decoding(config)
    assert resolved.backend.name == "sdpa" and not resolved.interaction.folded
    decoder = build_decoder(config, resolved)
    assert not decoder.blocks[0].attention.interaction.folded and decoder.blocks[0].attention.attend is sdpa


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["kha_linear", "kha_mlp"])
def test_a_finished_run_speaks(
    preset: str, small: list[str], tmp_path: Path, train_run: Callable[[list[str]], None]
) -> None:
    run = tmp_path / preset
    train_run([*small, f"attention={preset}", f"run.dir={run}", "run.steps=2", "optim.lr=1e-2"])
    arguments = ["generate", str(run), "--ids", "1,2,3", "--tokens", "5", "--samples", "2", "--json"]
    first, again = (CliRunner().invoke(app, arguments) for _ in range(2))
    assert first.exit_code == 0, first.output
    answer = json.loads(first.stdout)
    assert answer["step"] == 2 and answer["prompt"] == [1, 2, 3] and [len(row) for row in answer["ids"]] == [5, 5]
    assert first.stdout == again.stdout


@pytest.fixture
def train_run(clean_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Train in this process."""
    from kha_train.train.run import train

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return lambda overrides: train(compose(overrides))
