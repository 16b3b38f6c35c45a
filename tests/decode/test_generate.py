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

from data_tools.encode import encode_corpus
from data_tools.train_tokenizer import train_tokenizer
from kha_train.cli.main import app
from kha_train.config.compose import compose
from kha_train.config.resolve import resolve_decoding
from kha_train.decode.generate import absorbing_helps, generate
from kha_train.decode.sampling import Sampling
from kha_train.decode.writing import Order, write
from kha_train.errors import ConfigError
from kha_train.literal import LINES, visible
from kha_train.model.attention.backends import sdpa
from kha_train.model.decoder import Decoder, build_decoder
from kha_train.record import read_metrics
from kha_train.variants.registry import BASES

PRESETS = ("gqa", "gta", "mla", "talking_heads", "diff", "linear", "gated", "kha_linear", "kha_mlp", "kha_gate", "mea")
SMALL = ("model.layers=2", "model.hidden_size=32", "model.head_dim=8", "model.vocab_size=64", "model.seq_len=24")


def decoder_of(preset: str, *settings: str) -> Decoder:
    config = compose([*SMALL, f"attention={preset}", "moe.backend=loop", *settings])
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


def test_a_model_whose_positions_are_stretched_decodes_as_it_computes_whole_rows() -> None:
    stretched = ("model.rope_scaling=yarn", "model.rope_factor=3", "model.rope_original_seq_len=8")
    decoder, tokens = decoder_of("gqa", *stretched), prompt()
    first = decoder(tokens).logits_BTV
    assert not torch.equal(first, decoder_of("gqa")(tokens).logits_BTV)
    for _ in range(8):
        tokens = torch.cat((tokens, decoder(tokens).logits_BTV[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert drawn(decoder, Sampling(tokens=8, temperature=0)) == tokens[:, 6:].tolist()


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


@pytest.mark.parametrize(
    "settings", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"seed": 2**63}, {"top_k": -1}]
)
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


@pytest.mark.parametrize("preset", ["gqa", "kha_mlp", "mla"])
def test_a_text_is_the_same_alone_and_in_any_batch(preset: str) -> None:
    """Greedy and drawn, of prompts of several lengths and several samples, whatever goes together."""
    decoder = decoder_of(preset)
    prompts = [[1, 2, 3], [4, 5], [7, 8, 9], [1, 2, 3], [6, 6, 6, 6, 6]]
    for sampling in (
        Sampling(tokens=7, temperature=0),
        Sampling(tokens=7, temperature=1.5, top_k=20, top_p=0.9, seed=3),
    ):
        each = [written(decoder, [one], sampling) for one in prompts]
        expected = [ids for texts in each for ids in texts]
        for batch in (1, 2, 16):
            assert written(decoder, prompts, sampling, batch) == expected
        assert (each[0][0] != each[0][1]) == (sampling.temperature > 0) and each[0] == each[3]
        assert expected[::2] == written(decoder, prompts, sampling, samples=1)


def written(
    decoder: Decoder, prompts: list[list[int]], sampling: Sampling, batch: int = 16, samples: int = 2
) -> list[list[int]]:
    order = Order(prompts, sampling, samples, batch)
    return [one.ids for one in write(order, lambda rows, how: generate(decoder, rows, how), str)]


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
    assert answer["ends"] == ["length"] * 2 and answer["ids"][0] != answer["ids"][1]
    step = run / "checkpoints" / "step-00000002"
    greedy = ["--ids", "1,2,3", "--tokens", "5", "--temperature", "0"]
    one, other = (CliRunner().invoke(app, ["generate", str(place), *greedy]) for place in (run, step))
    assert one.exit_code == 0 and one.stdout == other.stdout and one.stdout.count(",") == 4


@pytest.mark.slow
def test_a_run_on_text_of_a_tokenizer_json_trains_is_scored_and_continues_texts(
    small: list[str], tmp_path: Path, train_run: Callable[[list[str]], None]
) -> None:
    (tmp_path / "corpus").mkdir()
    for split in ("train", "validation"):
        rows = (json.dumps({"text": f"Grüße, {i} words of text {i * i}\n" * 4}) for i in range(200))
        (tmp_path / "corpus" / f"{split}.jsonl").write_text("\n".join(rows))
    tokenizer = train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer.json", vocab_size=300)
    encode_corpus(tmp_path / "corpus", tokenizer.padded(310), tmp_path / "shards")
    run = tmp_path / "run"
    data = [f"data.train={tmp_path}/shards/train", f"data.validation={tmp_path}/shards/validation"]
    settings = ["model.vocab_size=310", "run.steps=2", "validation.every_steps=2", f"run.dir={run}"]
    train_run([*small, *data, *settings])
    assert 0 < read_metrics(run)[-1]["validation/bits_per_byte"] < 12

    def kha(*words: str) -> str:
        """What `kha generate` prints."""
        result = CliRunner().invoke(app, ["generate", str(run), "--tokens", "20", *words], input="Grü\nsome words\n")
        assert result.exit_code == 0, result.output
        return result.stdout

    one = json.loads(kha("--prompt", "Grü", "--json"))
    assert kha("--prompt", "Grü") == "Grü" + visible(one["texts"][0], LINES) + "\n"
    both = json.loads(kha("--prompts", "-", "--batch", "1", "--json"))
    assert both["texts"][0] == one["texts"][0] and len(both["texts"]) == 2
    (tmp_path / "p.jsonl").write_text('{"prompt": "Grü"}\n"some words"\n')
    again = json.loads(kha("--prompts", str(tmp_path / "p.jsonl"), "--json"))
    assert again["texts"] == both["texts"] and again["prompts"] == both["prompts"]
    stop = one["texts"][0][2:4]
    cut = json.loads(kha("--prompt", "Grü", "--stop", stop, "--json"))
    assert cut["texts"] == [one["texts"][0][: one["texts"][0].find(stop)]] and cut["ends"] == ["stop"]


@pytest.fixture
def train_run(clean_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Train in this process."""
    from kha_train.train.run import train

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return lambda overrides: train(compose(overrides))
