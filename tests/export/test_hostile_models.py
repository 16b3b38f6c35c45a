"""A foreign model directory is data: whatever is wrong with it is refused in one line, and nothing is written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kha_train.errors import CheckpointError, ConfigError, KhaError
from kha_train.export.importing import prepare

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 32, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False,
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16), "self_attn.q_norm": (8,), "self_attn.k_norm": (8,),
    "input_layernorm": (16,), "post_attention_layernorm": (16,),
    "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    "model.norm.weight": (16,),
    **{f"model.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in LAYER.items()},
}
SECOND = "model.layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
FIRST_FILE, SECOND_FILE = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
EVIL = Path("ran")


class Evil:
    """Whoever unpickles it runs a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(EVIL),)


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A whole small Qwen3 in two files with an index; written by hand, as transformers write it."""
    directory = tmp_path / "stock"
    directory.mkdir()
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    files = [FIRST_FILE, SECOND_FILE]
    place = {name: files["layers.1" in name] for name in weights}
    for file in files:
        save_file({name: weights[name] for name in weights if place[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (directory / "config.json").write_text(json.dumps(QWEN3))
    return directory


def change_config(**changes: Any) -> Callable[[Path], None]:
    """Damage that gives entries of config.json other values."""
    return lambda directory: (directory / "config.json").write_text(json.dumps(QWEN3 | changes)) and None


def change_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    """Damage to the map from tensors to files."""

    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def change_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Damage to the tensors of the second file; the index says what is in it then."""

    def damage(directory: Path) -> None:
        file = directory / SECOND_FILE
        weights = load_file(file)
        change(weights)
        save_file(weights, file)
        index = json.loads((directory / INDEX).read_text())
        kept = {name: place for name, place in index["weight_map"].items() if place != file.name}
        (directory / INDEX).write_text(json.dumps({"weight_map": kept | dict.fromkeys(weights, file.name)}))

    return damage


def only_pickles(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def pickled_shard(directory: Path) -> None:
    (directory / "evil.bin").write_bytes(pickle.dumps(Evil()))
    change_index(lambda places: places.update({SECOND: "evil.bin"}))(directory)


def pickle_in_disguise(directory: Path) -> None:
    (directory / SECOND_FILE).write_bytes(pickle.dumps(Evil()))


def linked_away(directory: Path) -> None:
    file = directory / SECOND_FILE
    shutil.move(file, directory.parent / "blob")
    file.symlink_to("../blob")


def config_linked_away(directory: Path) -> None:
    shutil.move(directory / "config.json", directory.parent / "blob")
    (directory / "config.json").symlink_to("../blob")


def truncated(directory: Path) -> None:
    file = directory / SECOND_FILE
    os.truncate(file, file.stat().st_size - 100)


def huge_header(directory: Path) -> None:
    file = directory / SECOND_FILE
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def climbing_shape(directory: Path) -> None:
    header = json.dumps({SECOND: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}).encode()
    file = directory / SECOND_FILE
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


def heads(tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Callable[[Path], None]:
    """Damage to the heads that were saved beside the model: of KHA-Linear, on the values."""

    def damage(directory: Path) -> None:
        file, sha256 = directory / "kha_heads.safetensors", "0" * 64
        if tensors:
            save_file(tensors, file)
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        saved = {"format": "kha-heads", "version": 1, "interaction": "kha_linear", "options": {"projections": ["v"]}}
        saved |= {"layouts": {}, "sha256": sha256}
        (directory / "kha_heads.json").write_text(json.dumps(saved | changes))

    return damage


def many_experts(directory: Path) -> None:
    """Each number is at most that of the tensors, and their product is four million."""
    change_weights(lambda weights: weights.update({f"empty.{i}": torch.zeros(0) for i in range(2000)}))(directory)
    experts = {"model_type": "qwen3_moe", "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    change_config(**experts, num_hidden_layers=2000, num_experts=2000)(directory)


def not_a_number(weights: dict[str, torch.Tensor]) -> None:
    weights[SECOND][3, 4] = float("nan")


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[KhaError], str]] = {
    "no configuration": (lambda d: (d / "config.json").unlink(), ConfigError, "holds no config.json"),
    "a configuration that is no JSON": (
        lambda d: (d / "config.json").write_text("{"), CheckpointError, "cannot be read as JSON"),
    "a configuration that is a list": (lambda d: (d / "config.json").write_text("[]"), CheckpointError, "an object"),
    "a configuration without end": (
        lambda d: (d / "config.json").write_text("[" * 10**5), CheckpointError, "cannot be read as JSON"),
    "a configuration elsewhere": (config_linked_away, CheckpointError, "link that leaves the directory"),
    "code of its own": (
        change_config(auto_map={"AutoModelForCausalLM": "evil--modeling.Evil"}), ConfigError, "names code of its own"),
    "a class that is not known": (change_config(model_type="gpt2"), ConfigError, "model_type = 'gpt2'"),
    "a class that is no text": (change_config(model_type={"a": 1}), ConfigError, "model_type"),
    "quantised weights": (change_config(quantization_config={"bits": 4}), ConfigError, "quantization_config"),
    "scaled positions": (
        change_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}), ConfigError, "rope_scaling"),
    "scaled positions of a new release": (
        change_config(rope_parameters={"rope_type": "longrope", "factor": 8.0}), ConfigError, "longrope"),
    "an unknown option of positions": (
        change_config(rope_parameters={"rope_type": "default", "twist": 2}), ConfigError, "rope_parameters.twist"),
    "a window": (change_config(use_sliding_window=True), ConfigError, "use_sliding_window = True"),
    "layers with a window": (
        change_config(layer_types=["full_attention", "sliding_attention"]), ConfigError, "sliding_attention"),
    "biases": (change_config(attention_bias=True), ConfigError, "attention_bias = True"),
    "another activation": (change_config(hidden_act="gelu"), ConfigError, "hidden_act = 'gelu'"),
    "dropout": (change_config(attention_dropout=0.1), ConfigError, "attention_dropout = 0.1"),
    "an unknown option": (change_config(residual_scale=2.0), ConfigError, "residual_scale = 2.0"),
    "an unknown option without a value": (change_config(residual_scale=None), ConfigError, "residual_scale = 'null'"),
    "a width of text": (change_config(hidden_size="16"), ConfigError, "hidden_size = '16'"),
    "a width of 0": (change_config(hidden_size=0), ConfigError, "hidden_size = 0"),
    "an absurd width": (change_config(hidden_size=2**62), ConfigError, "hidden_size"),
    "absurdly many layers": (change_config(num_hidden_layers=2**30), ConfigError, "1073741824 layers"),
    "absurdly many layers of experts": (many_experts, ConfigError, "2000 layers of 2000 experts"),
    "an eps that is no number": (change_config(rms_norm_eps=float("nan")), ConfigError, "rms_norm_eps"),
    "another width than the weights": (change_config(intermediate_size=32), CheckpointError, "another shape"),
    "more layers than weights": (change_config(num_hidden_layers=3), CheckpointError, "lacks a tensor"),
    "fewer layers than weights": (change_config(num_hidden_layers=1), CheckpointError, "does not have"),
    "an output layer that is missing": (change_config(tie_word_embeddings=False), CheckpointError, "lm_head.weight"),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), ConfigError, "adapter_config.json"),
    "heads without a description": (
        lambda d: (d / "kha_heads.json").write_text("{}"), CheckpointError, "kha_heads.json format"),
    "heads of another kind": (heads(interaction="evil"), CheckpointError, "interaction = 'evil'"),
    "heads with an unknown option": (heads(options={"x=1 y": 2}), CheckpointError, "options = 'x=1 y'"),
    "heads with an option that is no word": (heads(options={"share": "heads} a=1"}), CheckpointError, "share"),
    "heads whose tensors are gone": (heads(), CheckpointError, "kha_heads.safetensors"),
    "heads whose tensors are others": (heads({"a": torch.zeros(2)}, sha256="0" * 64), CheckpointError, "sha256"),
    "heads that are nowhere": (heads({"a": torch.zeros(2)}), CheckpointError, "'a'"),
    "heads of one layer alone": (
        heads({"model.layers.0.self_attn.kha.v.map": torch.eye(8)}), CheckpointError, "blocks.1"),
    "no weights": (lambda d: [file.unlink() for file in d.glob("model*")], ConfigError, "no weights"),
    "pickled weights": (only_pickles, ConfigError, "pytorch_model.bin"),
    "a pickled shard": (pickled_shard, CheckpointError, "'evil.bin'"),
    "a pickle under another name": (pickle_in_disguise, CheckpointError, "cannot be read as safetensors"),
    "weights twice": (
        lambda d: shutil.copy(d / FIRST_FILE, d / "model.safetensors"), ConfigError, "not clear"),
    "an index that climbs out": (
        change_index(lambda places: places.update({SECOND: "../blob.safetensors"})), CheckpointError, "../blob"),
    "an absolute index": (
        change_index(lambda places: places.update({SECOND: "/etc/passwd"})), CheckpointError, "/etc/passwd"),
    "an index of numbers": (change_index(lambda places: places.update({SECOND: 7})), CheckpointError, "weight_map"),
    "an index without a map": (lambda d: (d / INDEX).write_text("{}"), CheckpointError, "weight_map"),
    "a file that is not there": (
        change_index(lambda places: places.update({SECOND: "gone.safetensors"})), CheckpointError, "gone.safetensors"),
    "a tensor that is elsewhere": (
        change_index(lambda places: places.update({SECOND: FIRST_FILE})), CheckpointError, SECOND),
    "a tensor that is not listed": (change_index(lambda places: places.pop(SECOND)), CheckpointError, SECOND),
    "a link that climbs out": (linked_away, CheckpointError, "cp -rL"),
    "a truncated file": (truncated, CheckpointError, "cannot be read as safetensors"),
    "an empty file": (
        lambda d: (d / SECOND_FILE).write_bytes(b""), CheckpointError, "as safetensors"),
    "a header without end": (huge_header, CheckpointError, "cannot be read as safetensors"),
    "a shape beyond the file": (climbing_shape, CheckpointError, "cannot be read as safetensors"),
    "a missing tensor": (change_weights(lambda weights: weights.pop(SECOND)), CheckpointError, SECOND),
    "a tensor too many": (
        change_weights(lambda weights: weights.update(extra=torch.zeros(2))), CheckpointError, "'extra'"),
    "a bias that is no option": (
        change_weights(lambda w: w.update({"model.layers.1.self_attn.q_proj.bias": torch.zeros(16)})),
        CheckpointError, "q_proj.bias"),
    "a tensor turned round": (
        change_weights(lambda weights: weights.update({SECOND: torch.zeros(16, 24)})), CheckpointError, "[16, 24]"),
    "whole numbers": (
        change_weights(lambda weights: weights.update({SECOND: torch.zeros(24, 16, dtype=torch.int8)})),
        CheckpointError, "'I8'"),
    "numbers of eight bits": (
        change_weights(lambda weights: weights.update({SECOND: torch.zeros(24, 16).to(torch.float8_e4m3fn)})),
        CheckpointError, "F8_E4M3"),
    "a value that is not finite": (change_weights(not_a_number), CheckpointError, "not finite"),
    "an output layer that is not the embedding": (
        change_weights(lambda weights: weights.update({"lm_head.weight": torch.ones(32, 16)})),
        CheckpointError, "not the embedding"),
}  # fmt: skip
"""What is done to the directory, the kind of error, and what its line says."""


def import_it(stock: Path, out: Path, overrides: tuple[str, ...] = ()) -> None:
    """As `kha import`."""
    prepare(stock, out, overrides).write(out)


@pytest.mark.parametrize("name", DAMAGE)
def test_security_a_damaged_or_hostile_directory_is_refused_in_one_line_and_nothing_is_written(
    name: str, stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, kind, told = DAMAGE[name]
    damage(stock)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KhaError) as raised:
        import_it(stock, tmp_path / "run")
    line = raised.value.line()
    assert type(raised.value) is kind and told in line, line
    assert "\n" not in line and len(line) < 600, line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_is_no_weight_of_the_decoder_is_passed_over_and_told(stock: Path, tmp_path: Path) -> None:
    (stock / "training_args.bin").write_bytes(pickle.dumps(Evil()))
    (stock / "modeling_evil.py").write_text("raise SystemExit")
    shared = load_file(stock / FIRST_FILE)["model.embed_tokens.weight"]
    further = {"lm_head.weight": shared, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(lambda weights: weights.update(further))(stock)
    imported = prepare(stock, tmp_path / "run").write(tmp_path / "run")
    told = " ".join(imported.left_out)
    assert "training_args.bin" in told and "1 tables of rotary frequencies" in told
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "config.yaml", "import.json"]
    assert not (tmp_path / EVIL).exists()


def test_an_interrupted_import_leaves_nothing_and_a_directory_in_use_is_not_touched(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare(stock, tmp_path / "run")

    def stop(elements: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ready.write(tmp_path / "run", stop)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        ready.write(tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "stock"]
    assert (tmp_path / "mine" / "notes").read_text() == "mine"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)
ENTRIES = st.sampled_from([*QWEN3, "rope_scaling", "layer_types", "quantization_config", "use_sliding_window", "dtype"])


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose files the tests below replace."""
    directory = tmp_path_factory.mktemp("fuzzed")
    save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, directory / "model.safetensors")
    return directory


def refused_in_one_line(stock: Path) -> bool:
    """Whether a directory is refused, in one line. Raises whatever else happens."""
    try:
        prepare(stock, stock.parent / "run")
    except KhaError as error:
        assert "\n" not in error.line() and len(error.line()) < 1000
        return True
    return False


@settings(max_examples=25)
@given(changes=st.dictionaries(ENTRIES, ANYTHING, min_size=1, max_size=2))
def test_any_configuration_is_imported_or_refused_in_one_line(changes: dict[str, Any], fuzzed: Path) -> None:
    (fuzzed / "config.json").write_text(json.dumps(QWEN3 | changes))
    refused_in_one_line(fuzzed)


@settings(max_examples=100)
@given(raw=st.binary(max_size=200), places=st.dictionaries(st.text(max_size=20), ANYTHING, max_size=3))
def test_any_index_and_any_header_that_are_not_those_of_the_model_are_refused_in_one_line(
    raw: bytes, places: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("index")
    (directory / "config.json").write_text(json.dumps(QWEN3))
    (directory / "a.safetensors").write_bytes(raw)
    (directory / INDEX).write_text(json.dumps({"weight_map": places | {"a": "a.safetensors"}}))
    assert refused_in_one_line(directory)
