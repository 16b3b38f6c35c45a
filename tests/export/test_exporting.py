"""Exports of trained-looking checkpoints: what transformers computes of them, what is refused, what is left behind."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from picklescan.scanner import scan_directory_path
from torch import Tensor
from typer.testing import CliRunner

from kha_train.checkpoint.pieces import Piece
from kha_train.checkpoint.reader import open_verified
from kha_train.checkpoint.weights import write_weights
from kha_train.cli.main import app
from kha_train.config.build import to_plain
from kha_train.config.compose import compose
from kha_train.config.compose import load as load_config
from kha_train.config.resolve import resolve_decoding
from kha_train.decode.absorb import absorb
from kha_train.decode.generate import generate, materialise
from kha_train.decode.sampling import Sampling
from kha_train.distributed import World
from kha_train.errors import KhaError
from kha_train.export import exporting, hugging_face
from kha_train.export.hugging_face import load
from kha_train.export.importing import prepare
from kha_train.export.links import Part
from kha_train.export.weights import Weights
from kha_train.model.decoder import Decoder, build_decoder

pytest.importorskip("transformers")

SMALL = (
    "model=tiny",
    "model.layers=2",
    "model.hidden_size=64",
    "model.head_dim=16",
    "model.vocab_size=256",
    "model.seq_len=320",
    "moe.expert_width=40",
)
MLA = "attention=mla attention.base.latent_width=40 attention.base.rotary_dim=16"
LINEAR_MLA = f"{MLA} interaction@attention.interaction=knocking_linear"

Save = Callable[..., tuple[Path, Decoder]]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """`save(overrides)`: a run directory whose checkpoint holds values as after training, and its decoder."""

    def make(*overrides: str) -> tuple[Path, Decoder]:
        config = compose([*SMALL, *overrides])
        decoder, generator = build_decoder(config, resolve_decoding(config)), torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            for router in decoder.routers() if config.moe.bias_update_rate else []:
                router.selection_bias.normal_(0, 0.05, generator=generator)
        run = tmp_path_factory.mktemp("run")
        state = decoder.state_dict()
        names = [name for name, _ in decoder.named_parameters()]
        pieces = [Piece(name, "master", tuple(state[name].shape), 0, state[name].flatten()) for name in names]
        buffers = {name: state[name] for name in state.keys() - {*names, "head.weight"}}
        write_weights(run, to_plain(config), pieces, buffers)
        return run, decoder.eval()

    return make


def asked(run: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["export", str(run), "--out", str(out), "--no-tokenizer", "--json", *options])


def exported(run: Path, out: Path, *options: str) -> dict[str, Any]:
    answer = asked(run, out, *options)
    assert answer.exit_code == 0, answer.output
    report: dict[str, Any] = json.loads(answer.stdout)
    return report


def refused(run: Path, out: Path, *options: str) -> KhaError:
    answer = asked(run, out, *options)
    assert isinstance(answer.exception, KhaError), answer.output
    assert not answer.stdout and "\n" not in answer.exception.line()
    return answer.exception


def continued(decoder: Decoder, prompt: Tensor, tokens: int) -> Tensor:
    """The likeliest continuation."""
    drawn = torch.stack(list(generate(decoder, prompt, Sampling(tokens, temperature=0))), dim=1)
    return torch.cat((prompt, drawn), dim=1)


def equal_up_to_a_tie(ours: Tensor, theirs: Tensor, decoder: Decoder) -> bool:
    """Whether continuations are equal, or differ first where our two best logits are less than 1e-4 apart."""
    for row, other in zip(ours, theirs, strict=True):
        differing = (row != other).nonzero().flatten().tolist()
        if differing:
            with torch.no_grad():
                best = decoder(row[None, : differing[0]]).logits_BTV[0, -1].topk(2).values
            if best[0] - best[1] > 1e-4:
                return False
    return True


TOKENS = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(5))


def held_against_ours(out: Path, decoder: Decoder, new: int) -> torch.nn.Module:
    """The export as transformers loads it, after comparing logits, and a continuation of `new` tokens from a cache."""
    model = load(out)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, decoder(TOKENS).logits_BTV, rtol=0, atol=1e-5)
    prompt = TOKENS[:, :16]
    theirs = model.generate(prompt, max_new_tokens=new, do_sample=False, use_cache=True, pad_token_id=0)
    assert theirs.shape == (1, 16 + new)
    assert equal_up_to_a_tie(continued(decoder, prompt, new), theirs, decoder)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("Glm4MoeForCausalLM", "attention=gqa"),
        ("Glm4MoeForCausalLM", "attention=kha_linear moe.shared_experts=1 moe.dense_layers=1 moe.dense_width=48"),
        ("DeepseekV3ForCausalLM", LINEAR_MLA),
    ],
)
def test_security_an_export_is_a_stock_model_without_code_with_our_logits_and_comes_back(
    name: str, overrides: str, save: Save, tmp_path: Path
) -> None:
    run, decoder = save(*overrides.split())
    out = tmp_path / "out"
    report = exported(run, out, "--shard-size", "200KB")
    assert report == json.loads((out / "export_report.json").read_text())
    assert report["class"] == name and report["process"]["trainer"] == "cannot be imported"
    assert report["logits"]["largest_difference"] < 1e-5 and report["logits"]["compared"] > 200
    assert len(list(out.glob("model-*.safetensors"))) > 2 and not list(out.glob("kha_heads*"))
    assert type(held_against_ours(out, decoder, 256)).__module__.startswith("transformers.")
    assert "license" not in (out / "README.md").read_text().split("---")[1]

    scanned = scan_directory_path(str(out))
    assert (scanned.issues_count, scanned.infected_files, scanned.scan_err) == (0, 0, False)
    assert {path.suffix for path in out.iterdir()} == {".safetensors", ".json", ".md"}
    assert not [path for path in out.glob("*.json") if "auto_map" in path.read_text()]

    prepare(out, tmp_path / "back").write(tmp_path / "back")
    checkpoint = open_verified(tmp_path / "back", World.single())
    back = materialise(load_config(tmp_path / "back" / "config.yaml"), checkpoint, torch.device("cpu")).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS).logits_BTV, decoder(TOKENS).logits_BTV, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "overrides", "options"),
    [
        ("kha_mlp", "attention=kha_mlp attention.interaction.projections=[q,v]", ()),
        ("mea", "attention=mea", ("--no-absorb",)),
        ("gated", "attention=kha_linear attention.base.output_gate=elementwise", ()),
        ("kha_mlp", "attention=kha_mlp attention.base.output_gate=headwise", ()),
    ],
)
def test_what_acts_on_activations_is_a_stock_model_with_heads(
    heads: str, overrides: str, options: tuple[str, ...], save: Save, tmp_path: Path
) -> None:
    run, decoder = save(*overrides.split())
    report = exported(run, tmp_path / "out", *options)
    assert report["heads"] == heads and report["class"] == "Glm4MoeForCausalLM"
    held_against_ours(tmp_path / "out", decoder, 64)
    assert "kha_heads.load" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_the_flavour_for_vllm_in_bf16_computes_what_ours_does_with_the_rounded_weights(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = save("attention=kha_linear")
    monkeypatch.chdir(tmp_path)
    report = exported(run, Path("out"), "--vllm", "--dtype", "bfloat16")
    assert report["flavour"] == "vllm" and report["logits"]["largest_difference"] < 1e-5
    assert 1e-4 < report["rounding"]["largest_difference"] and 0 < report["rounding"]["mean_divergence_nats"] < 1e-2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["n_shared_experts"] == 1 and config["tie_word_embeddings"] is False
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"lm_head.weight", "model.layers.0.mlp.shared_experts.down_proj.weight"} <= index.keys()


@pytest.mark.slow
def test_an_export_that_computes_something_else_ends_with_4_and_leaves_nothing(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = save("attention=gqa")
    read = Weights.read
    monkeypatch.setattr(
        Weights, "read", lambda self, part: read(self, part) * (1.01 if "1.attention.key" in part.name else 1.0)
    )
    error = refused(run, tmp_path / "place" / "out")
    assert error.exit_code == 4 and "logits differ" in error.line()
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.slow
def test_writing_takes_less_memory_than_the_weights_and_a_shard(
    tmp_path: Path, clean_environment: dict[str, str]
) -> None:
    command = [sys.executable, str(Path(__file__).with_name("export_memory_worker.py")), str(tmp_path)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=clean_environment)
    written, grown = map(float, answer.stdout.split())
    assert written > 200
    # The largest tensor has 16 MiB; a shard, of which none is held, 32. For four times the weights it grows alike.
    assert grown < written / 2


@pytest.mark.parametrize("overrides", ["attention=kha_linear", "attention=mea", LINEAR_MLA])
def test_a_tensor_that_is_read_alone_is_that_of_the_absorbed_decoder(overrides: str, save: Save) -> None:
    run, decoder = save(*overrides.split())
    checkpoint, whole = open_verified(run, World.single()), absorb(decoder)
    weights = Weights(checkpoint, decoder.config, whole.config)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(weights.read(Part(name)), tensor), name


def test_what_cannot_be_exported_is_one_line_before_anything_is_written(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = save("attention=gqa")
    out = tmp_path / "place" / "out"
    assert refused(run, out, "--dtype", "int8").field == "--dtype"
    assert refused(run, out, "--shard-size", "5").field == "--shard-size"
    assert refused(tmp_path, out).exit_code == 4
    assert refused(save("attention=gta")[0], out).field == "attention.base.name"
    late = ("attention=mea", "attention.interaction.mix_after_rope=true")
    assert refused(save(*late)[0], out).field == "attention.interaction.name"
    assert refused(save("attention=kha_mlp")[0], out, "--vllm").field == "--vllm"
    assert not out.parent.exists()
    without = CliRunner().invoke(app, ["export", str(run), "--out", str(out)])
    assert without.exception.field == "data.validation" and "--no-tokenizer" in without.exception.line()
    monkeypatch.setattr(hugging_face, "missing", lambda: "transformers is not installed")
    assert "pip install" in refused(run, out).line()
    assert not out.parent.exists()


def test_a_full_disk_leaves_nothing_behind(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "write_shards", full)
    answer = asked(save("attention=gqa")[0], tmp_path / "out")
    assert isinstance(answer.exception, OSError) and list(tmp_path.iterdir()) == []


def test_an_existing_place_is_never_written_over(save: Save, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    assert refused(save("attention=gqa")[0], tmp_path).field == "--out"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_damaged_checkpoint_is_not_exported(save: Save, tmp_path: Path) -> None:
    run, _ = save("attention=gqa")
    (weights,) = run.glob("checkpoints/*/model-*.safetensors")
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert refused(run, tmp_path / "out").exit_code == 4 and not (tmp_path / "out").exists()


def test_the_process_that_verifies_refuses_the_trainer() -> None:
    fence = hugging_face.Fence()
    for name in ("kha_train", "kha_train.export", "data_tools.corpus"):
        with pytest.raises(ImportError):
            fence.find_spec(name, None)
    assert fence.find_spec("kha_heads", None) is None
