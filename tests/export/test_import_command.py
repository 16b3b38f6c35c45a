"""`kha import`, and what people type next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kha_train.checkpoint.reader import find_newest
from kha_train.distributed import World
from kha_train.train.progress import read_state
from tests.conftest import Kha

pytestmark = pytest.mark.slow


def test_the_printed_command_is_planned_rehearsed_and_trained_with_and_without_an_interaction(
    kha: Kha, save_model: Callable[..., Any], dataset: Path
) -> None:
    save_model("glm4_moe", Path("stock"))
    code, out, err = kha("import", "stock", "--out", "base", "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["class"] == "glm4_moe" and answer["interaction"] == "none" and answer["tokenizer"] is None
    Path("base/shards").symlink_to(dataset)
    command = [*shlex.split(answer["train"])[1:], "engine.micro_batch_size=2", "data.global_batch_size=2"]
    command += ["telemetry.wandb.mode=disabled", "validation.rows=2", "run.steps=1", "telemetry.peak_tflops=0.1"]
    for verb, further in ((("plan",), []), (("train", "--dry-run"), []), (("train",), ["attention=kha_mlp"])):
        code, out, err = kha(*verb, *command[1:], *further)
        assert code == 0, err
    inherited = find_newest(Path("base-trained"), World.single(), print)
    assert any(".interaction." in name for name in inherited.names())
    code, out, err = kha("generate", "base-trained", "--ids", "1,2,3", "--tokens", "4", "--json")
    assert code == 0 and len(json.loads(out)["ids"][0]) <= 4, err


def test_an_imported_run_is_a_run_with_one_whole_checkpoint_that_cannot_be_resumed(
    kha: Kha, save_model: Callable[..., Any], dataset: Path
) -> None:
    save_model("deepseek_v3", Path("stock"))
    code, out, err = kha("import", "stock", "--out", "base", "interaction@attention.interaction=knocking_linear")
    assert code == 0 and "deepseek_v3 of" in out, err
    assert kha("checkpoint", "verify", "base")[0] == 0
    assert read_state(find_newest(Path("base"), World.single(), print)).progress.step == 0
    typed = next(line for line in out.splitlines() if "kha train" in line)
    command = [*shlex.split(typed)[2:], "run.dir=base", "run.init_from=''", "telemetry.wandb.mode=disabled"]
    Path("base/shards").symlink_to(dataset)
    code, out, err = kha("train", *command, "run.steps=1", "model.seq_len=64")
    assert code == 3 and "run.init_from=" in err and "Traceback" not in err, err
    assert kha("import", "stock", "--out", "base")[0] == 2


def test_text_goes_in_and_out_with_the_tokenizer_of_the_model(kha: Kha, save_model: Callable[..., Any]) -> None:
    """Tokenised by `kha data`, trained on, and continued as transformers continue it."""
    tokenizers = pytest.importorskip("tokenizers")
    words = [f"The {number} swift hares ran {number * number} miles, naïvely \U0001f600.\n" for number in range(400)]
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    library.train_from_iterator(words, special)
    # More ids than the tokenizer has, as published models pad them.
    model = save_model("qwen3", Path("stock"), vocab_size=320, eos_token_id=None)
    library.save("stock/tokenizer.json")
    Path("stock/tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    Path("text").mkdir()
    for number in range(20):
        Path(f"text/{number}.txt").write_text("".join(words[number * 20 : number * 20 + 20]))
    code, out, err = kha("import", "stock", "--out", "base", "--json")
    assert code == 0, err
    answer = json.loads(out)
    prompt = "The 12 swift hares"
    code, out, err = kha("generate", "base", "--prompt", prompt, "--tokens", "8", "--temperature", "0", "--json")
    assert code == 0, err
    said, ids = json.loads(out), library.encode(prompt).ids
    assert said["prompt"] == ids
    with torch.no_grad():
        expected = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    assert said["ids"] == [expected]
    assert said["texts"] == [library.decode([one for one in expected if one < 300])]
    # A compressed one speaks too; of all its heads it says the same, as does its average with itself.
    assert kha("compress", "base", "--kv-heads", "2", "--out", "same")[0] == 0
    assert kha("checkpoint", "merge", "base", "base", "--out", "mean")[0] == 0
    for made in ("same", "mean"):
        code, out, err = kha("generate", made, "--prompt", prompt, "--tokens", "8", "--temperature", "0", "--json")
        assert code == 0 and json.loads(out)["texts"] == said["texts"], err
    Path("base").rename("moved")
    code, out, err = kha("eval", "moved", "--tasks", "kha_prose", "--limit", "1", "--json")
    assert code == 0 and json.loads(out)["evaluations"][0]["harness"]["kha_prose"]["result"]["samples"] == 1, err
    Path("moved").rename("base")
    tokenize = [*shlex.split(answer["tokenize"])[1:], "--text", "text", "--validation-percent", "20"]
    code, out, err = kha(*tokenize)
    assert code == 0, err
    command = [*shlex.split(answer["train"])[1:], "engine.micro_batch_size=2", "data.global_batch_size=2"]
    command += ["telemetry.wandb.mode=disabled", "validation.rows=2", "run.steps=1", "telemetry.peak_tflops=0.1"]
    code, out, err = kha(*command, "attention=kha_mlp", "model.seq_len=64")
    assert code == 0, err
    code, out, err = kha("generate", "base-trained", "--prompt", prompt, "--tokens", "3", "--json")
    assert code == 0 and isinstance(json.loads(out)["texts"][0], str), err
