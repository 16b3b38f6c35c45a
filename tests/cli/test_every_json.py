"""Every `--json` of every command prints one strict document or nothing, whatever happened to the run."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from data_tools.corpus import build_corpus
from data_tools.train_tokenizer import train_tokenizer
from kha_train.bench import everything, gpu, network, scale
from kha_train.cli.main import COMMANDS, build
from kha_train.cli.output import strict
from kha_train.config.compose import compose, dump
from kha_train.errors import DivergedError
from kha_train.export.families import family_of
from kha_train.model.decoder import lay_out_decoder
from kha_train.operate import datasets
from kha_train.record import Record
from kha_train.record.redact import Redactor
from kha_train.train.run import train
from tests.conftest import Kha

Case = tuple[str, ...]

TINY = (
    "model.vocab_size=256", "model.seq_len=16", "model.layers=1", "model.hidden_size=32", "model.query_heads=2",
    "model.kv_heads=1", "model.head_dim=16", "moe.expert_width=16", "data.global_batch_size=2",
    "engine.micro_batch_size=2", "engine.device=cpu", "validation.rows=4", "telemetry.wandb.mode=disabled",
    "telemetry.peak_tflops=0.1", "telemetry.console=quiet", "checkpoint.background=false",
)  # fmt: skip
ODD_NAME = 'a "quoted" \\ name\n\x1b[31m[/red] \u2028 nan'
ODD_FOLDER = os.fsdecode(b'r\xff\xfe "odd" [/red]')
STUDY = """
question: Does it run?
source: a test
arms: [{name: gqa, overrides: [attention=gqa]}]
measures: [{kind: train_loss}]
cpu: {steps: 1, rates: [1.0e-3], seeds: [0]}
paper: {steps: 1, rates: [1.0e-3], seeds: [0]}
"""
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), f"a key stands twice: {[key for key, _ in pairs]}"
    return dict(pairs)


def parse(text: str) -> Any:
    """`text` parsed as strictly as possible: RFC 8259, no duplicate keys, no lone surrogates."""
    value = json.loads(text, parse_constant=refuse, object_pairs_hook=no_key_twice)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


class Places:
    """What the commands are run on, as users have it on disk. `named(text)` fills in its names."""

    def __init__(self, root: Path, dataset: Path) -> None:
        self.root = root
        self.data = tuple(f"data.{split}={dataset / split}" for split in ("train", "validation"))
        self.names = {"data": str(dataset), "root": str(root), "odd": str(root / ODD_FOLDER)}
        self.names |= {name: str(root / name) for name in ("one", "two", "other", "lost", "empty", "nothing")}
        self._train("one", "run.steps=1")
        self._train("two", "run.steps=2", "checkpoint.every_steps=1")
        self._train("other", "run.steps=2", "attention=kha_mlp", "run.seed=1")
        self._diverge()
        self._write_files()
        self._write_stock()

    def named(self, case: Case) -> list[str]:
        return [argument.format(**self.names) for argument in case]

    def _train(self, name: str, *overrides: str) -> None:
        train(compose([*TINY, *self.data, *overrides, f"run.dir={self.root / name}", f"run.name={name}"]))

    def _diverge(self) -> None:
        """`lost`: no loss of it is finite, and its newest checkpoint holds numbers that are not; `odd`: its copy."""
        with pytest.raises(DivergedError):
            settings = ("model.init_std=1e38", "checkpoint.every_steps=1", "stability.probe_every=1")
            self._train("lost", *settings, "run.steps=9")
        odd = self.root / ODD_FOLDER
        shutil.copytree(self.root / "two", odd)
        config = yaml.safe_load((odd / "config.yaml").read_text())
        config["run"]["name"] = ODD_NAME
        (odd / "config.yaml").write_text(yaml.safe_dump(config))

    def _write_files(self) -> None:
        """`nothing`: an empty folder; `empty`: a run that has not made a step; curves; text; a sweep's directory."""
        (self.root / "nothing").mkdir()
        config = compose([*TINY, *self.data, f"run.dir={self.root / 'empty'}"])
        record = Record.open(self.root / "empty")
        record.begin_attempt(0)
        record.close("requeued")
        (self.root / "empty" / "config.yaml").write_text(dump(config))
        losses = [3.0 + 0.01 * (step % 3) for step in range(200)]
        losses[100], losses[150], losses[199] = 9.0, math.nan, math.inf
        for name, values in (("curve", losses), ("short", [3.0]), ("broken", [math.nan, math.inf])):
            self.names[name] = str(self.root / f"{name}.csv")
            with open(self.names[name], "w", newline="") as file:
                csv.writer(file).writerows([("step", "loss"), *enumerate(values, start=1)])
        self.names["study"] = str(self.root / "study.yaml")
        (self.root / "study.yaml").write_text(STUDY)
        self.names["first"] = min(path.name for path in (self.root / "lost" / "checkpoints").glob("step-*"))
        self.names["damaged"] = str(self.root / "damaged")
        shutil.copytree(self.root / "one", self.root / "damaged")
        for weights in (self.root / "damaged" / "checkpoints").glob("step-*/model-*.safetensors"):
            weights.write_bytes(weights.read_bytes()[:-1] + b"?")
        (self.root / "text").mkdir()
        for number in range(400):
            words = f"document {number} of {number * number} and so on\n" * 8
            (self.root / "text" / f"{number}.txt").write_text(words)
        self.names |= {"corpus": str(self.root / "made"), "tokenizer": str(self.root / "made.model")}
        build_corpus(self.root / "made", standard_library=False, extra_roots=[self.root / "text"])
        train_tokenizer(self.root / "made", self.root / "made.model", vocab_size=300)
        (np.arange(2000) % 250).astype(np.uint16).tofile(self.root / "ids.bin")

    def _write_stock(self) -> None:
        """`stock`: a model of transformers, all zeros."""
        self.names["stock"] = str(self.root / "stock")
        (self.root / "stock").mkdir()
        config = compose([*TINY, "model.norm_eps=1e-5"])
        decoder, family = lay_out_decoder(config), family_of(config)
        values = family.config(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in decoder.state_dict(keep_vars=True).items()}
        wanted = {
            name: shape for link in family.links(config, values) for name, shape in link.host_shapes(shapes).items()
        }
        save_file({name: torch.zeros(shape) for name, shape in wanted.items()}, self.root / "stock/model.safetensors")
        (self.root / "stock" / "config.json").write_text(json.dumps(values))


DATA = ("data.train={data}/train", "data.validation={data}/validation")
CASES: dict[Case, list[Case]] = {
    ("train",): [("--dry-run", *TINY, *DATA, "run.dir={root}/rehearsed"), (), ("--dry-run", "world_size=none")],
    ("metrics",): [(), ("--run", "{one}"), ("--run", "{lost}"), ("--run", "{nothing}"), ("model.kvheads=1",)],
    ("config", "show"): [
        (*TINY, "--where"), ("{one}",), ("{odd}", "--section", "model"), ("{empty}",), ("--section", "no"),
    ],
    ("config", "explain"): [("moe", *TINY), ("optim.lrr",)],
    ("config", "diff"): [("{one}", "{odd}"), ("", "attention=mla"), ("{nothing}", ""), ("{empty}", "")],
    ("config", "list"): [(), ("model",), ("modell",)],
    ("doctor",): [(), ("model.kv_heads=3",)],
    ("plan",): [
        (), (*TINY, "cluster=cpu"), ("--scale", "8,64", "cluster=h100_8x8"), ("--scale", "0"), ("model.kvheads=1",),
        ("model=moe_6b", "cluster=h100_1x1"),
    ],
    ("compare",): [
        ("{one}",), ("{one}", "{two}", "{other}", "{lost}", "{empty}", "{odd}"), ("{odd}", "{other}"),
        ("{lost}", "{one}"), ("{empty}",), ("{nothing}",), ("{root}/missing",), ("{root}",),
    ],
    ("generate",): [
        ("{two}", "--ids", "1,2", "--tokens", "3", "--samples", "2"), ("{odd}", "--ids", "1", "--tokens", "1"),
        ("{lost}", "--ids", "1", "--tokens", "2"), ("{empty}",), ("{two}", "--ids", "one"),
    ],
    ("import",): [
        ("{stock}", "--out", "{root}/imported-model", "attention=kha_mlp"), ("{stock}", "--out", "{one}"),
        ("{nothing}", "--out", "{root}/none"), ("{stock}", "--out", "{root}/none", "model.kv_heads=2"),
    ],
    ("eval",): [
        ("{two}",), ("{odd}", "{other}", "--tasks", "context"), ("{lost}",), ("{empty}",), ("{damaged}",),
        ("{nothing}",), ("--list",), ("{one}", "--tasks", "kha_choice"), ("{one}", "--shots", "-1"),
    ],
    ("analyze",): [
        ("{two}", "--tokens", "64", "--every-checkpoint"), ("{odd}", "{other}"), ("{lost}",), ("{empty}",),
        ("{two}", "--tokens", "64", "--match", "{one}"), ("{one}", "--match", "{nothing}"),
        ("{damaged}",), ("{nothing}",), ("{one}", "--data", "{nothing}"), ("{one}", "--tokens", "0"),
    ],
    ("spikes",): [
        ("{one}",), ("{two}",), ("{lost}",), ("{lost}", "--event", "1"), ("{odd}", "{lost}", "{one}"), ("{curve}",),
        ("{curve}", "--event", "1"), ("{curve}", "--event", "2"), ("{short}",), ("{broken}",), ("{curve}", "{broken}"),
        ("{short}", "--reference", "{curve}"), ("{curve}", "--plot", "{root}/curve.svg"), ("{empty}",),
        ("{curve}", "--event", "99"), ("{root}/missing.csv",),
    ],
    ("sweep",): [
        ("--print", *TINY, "attention=gqa,mha", "--dir", "{root}/sweeps"),
        ("run.steps=2,x",), ("--local", "run.steps=-1,1", "--dir", "{root}/sweeps"),
    ],
    ("study", "list"): [()],
    ("study", "show"): [
        ("copy",), ("kernel_pca",), ("position", "--scale", "paper"), ("copi",), ("copy", "--scale", "gpu"),
    ],
    ("study", "report"): [("{study}", *TINY, *DATA, "--dir", "{root}/studies"), ("{nothing}",)],
    ("status",): [
        ("{one}", "{two}", "{lost}", "{odd}"), ("{empty}", "{nothing}"), ("{nothing}",), ("{root}",),
        ("{one}", "--watch"), ("{root}/unreadable",), ("{one}", "{two}", "--sort", "-loss"), ("{one}", "--sort", "no"),
    ],
    ("data", "corpus"): [
        ("--out", "{root}/corpus", "--no-standard-library", "--extra-root", "{root}/text"),
        ("--out", "{root}/none", "--no-standard-library", "--extra-root", "{nothing}"),
    ],
    ("data", "tokenizer"): [
        ("--corpus", "{corpus}", "--out", "{root}/tokenizer.model", "--vocab-size", "300"),
        ("--corpus", "{nothing}", "--out", "{root}/none.model", "--vocab-size", "300"),
    ],
    ("data", "tokenize"): [
        ("--tokenizer", "{tokenizer}", "--corpus", "{corpus}", "--out", "{root}/shards"),
        ("--tokenizer", "{tokenizer}", "--text", "{root}/text", "--out", "{root}/shards-of-text"),
        ("--tokenizer", "{tokenizer}", "--out", "{root}/shards"),
    ],
    ("data", "import"): [
        ("numpy", "{root}/ids.bin", "--out", "{root}/imported", "--vocab-size", "256", "--dtype", "uint16"),
        ("numpy", "{root}/missing.bin", "--out", "{root}/none", "--vocab-size", "256", "--dtype", "uint16"),
    ],
    ("data", "synthetic"): [
        ("copy", "--out", "{root}/copies", "--documents", "40", "--validation-documents", "8", "--levels", "2,9"),
        ("copy", "--out", "{root}/none", "--levels", "2,x"), ("nothing", "--out", "{root}/none"),
    ],
    ("data", "verify"): [("{data}",), ("{nothing}",)],
    ("data", "inspect"): [
        ("{data}",), ("{data}/train", "--samples", "0"), ("--run", "{odd}", "--step", "2"),
        ("--run", "{one}", "--step", "9"), ("{data}", "--png", "{root}/lengths.png"),
    ],
    ("compress",): [
        ("{one}", "--kv-heads", "1", "--out", "{root}/smaller"), ("{one}", "--scan", "--rows", "2"),
        ("{one}", "--kv-heads", "7", "--out", "{root}/none"), ("{one}", "--kv-heads", "1"), ("{nothing}", "--scan"),
        ("{one}", "--scan", "--layers", "0"),
    ],
    ("checkpoint", "list"): [("{two}",), ("{odd}",), ("{lost}",), ("{empty}",)],
    ("checkpoint", "verify"): [("{two}",), ("{lost}",), ("{odd}",), ("{damaged}",), ("{nothing}",)],
    ("checkpoint", "diff"): [
        ("{two}", "{two}"), ("{two}/checkpoints/step-00000001", "{two}"), ("{lost}/checkpoints/{first}", "{lost}"),
        ("{two}", "{other}"), ("{two}", "{lost}"), ("{empty}", "{two}"),
    ],
    ("checkpoint", "merge"): [
        ("{two}", "--last", "2", "--out", "{root}/merged"), ("{two}", "{other}", "--out", "{root}/unlike"),
        ("{two}", "--out", "{one}"), ("{damaged}", "{two}", "--out", "{root}/merged2"),
        ("{empty}", "--out", "{root}/x"), ("{two}", "--weights", "1,x", "--out", "{root}/merged3"),
        ("{nothing}", "--out", "{root}/merged4"),
    ],
    ("bench", "spikes"): [("--spiky-steps", "2000", "--clean-steps", "1000", "--early-curves", "1", "--seed", "1")],
    ("bench", "telemetry"): [(*TINY, "--blocks", "3")],
    ("bench", "checkpoint"): [(*TINY, "--rounds", "1", "--steps", "1")],
    ("bench", "attention"): [(*TINY, "--blocks", "3"), ("--clock", "none")],
    ("bench", "decode"): [
        (*TINY, "model.kv_heads=2", "--context", "8", "--blocks", "3"), (*TINY, "--context", "8", "--blocks", "3"),
    ],
    ("bench", "kernels"): [()],
    ("bench", "moe"): [(*TINY, "--blocks", "3", "--warmup", "1"), ("--against", "nobody")],
    ("bench", "step"): [(*TINY, "--blocks", "3", "--warmup", "1")],
}  # fmt: skip
"""Arguments of every command that has `--json`; the first of each command succeed."""
SLOW_CASES: dict[Case, list[Case]] = {
    ("quickstart",): [("--out", "{root}/quickstart", "--steps", "1", "--processes", "1")],
    ("sweep",): [
        ("--local", *TINY, *DATA, "run.seed=0,1", "run.steps=1", "--dir", "{root}/sweeps"),
        ("--local", *TINY, *DATA, "run.seed=2", "model.init_std=1e38", "run.steps=9", "--dir", "{root}/sweeps"),
    ],
    ("replay",): [
        ("{lost}", "--event", "1", "--arms", "half_rate", "--steps", "2", "--out", "{root}/replayed"),
        ("{one}", "--event", "1"), ("{lost}",), ("{lost}", "--event", "1", "--arms", "none"),
        ("{empty}", "--step", "1"),
    ],
    ("export",): [
        ("{two}", "--out", "{root}/exported"), ("{two}", "--out", "{one}"), ("{lost}", "--out", "{root}/none"),
        ("{damaged}", "--out", "{root}/none"), ("{nothing}", "--out", "{root}/none"),
    ],
    ("study", "run"): [
        ("{study}", *TINY, *DATA, "--local", "--dir", "{root}/studies"), ("{study}", "--dir", "{root}/studies"),
    ],
    ("kernel-pca",): [
        ("--out", "{root}/kernel-pca.html", "--count", "40", "--components", "2", "--passes", "1", "--seeds", "1"),
        ("{odd}", "--out", "{root}/heads.html", "--count", "40", "--components", "2", "--passes", "1", "--seeds", "1"),
        ("{empty}", "--out", "{root}/heads-of-none.html"),
    ],
    ("bench", "intervals"): [("--runs", "{root}/equal", "--comparisons", "1"), ("--runs", "{root}")],
    ("bench", "tokenize"): [("--processes", "1", "--rounds", "3")],
    ("bench", "record"): [("--steps", "200", "--ask", "status,spikes")],
    ("bench", "startup"): [("--rounds", "1", *TINY)],
    ("bench", "scale"): [
        ("--nodes", "2", "--links", "500", "--blocks", "3"), ("--nodes", "3"), ("--links", "0"), ("no.such=1",),
    ],
    ("bench", "gpu"): [("--rehearse", "--out", "{root}/gpu"), ("--out", "{root}/gpu")],
    ("bench", "all"): [("--quick",)],
    ("bench", "data"): [("--cache", "{root}/cache", "--tokens", "10000000", "--rounds", "1", "--cpu-seconds", "0.1")],
}  # fmt: skip
"""Those that start processes of their own, train several runs, or encode megabytes."""


def with_json(command: Any, path: Case = ()) -> Iterator[Case]:
    """Every command below `command` that has the option."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from with_json(inner, (*path, name))
    if any("--json" in parameter.opts for parameter in command.params):
        yield path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Places:
    return Places(tmp_path_factory.mktemp("places"), dataset)


@pytest.fixture
def short_benches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of commands that run others, one is enough; a corpus of a few packages."""
    stage = gpu.Stage("attention layer", ("attention", *TINY, "--blocks", "3"), 60)
    monkeypatch.setattr(gpu, "stages", lambda rehearse: [stage])
    monkeypatch.setattr(scale, "MODES", {"ZeRO 1": ("engine=zero1",)})
    monkeypatch.setattr(everything, "QUICK", {"attention": (*TINY, "--blocks", "3")})
    packages = [STANDARD_LIBRARY / name for name in ("asyncio", "email", "json", "unittest")]
    monkeypatch.setattr(
        datasets,
        "build_corpus",
        lambda out, overwrite: build_corpus(out, standard_library=False, extra_roots=packages, overwrite=overwrite),
    )


def test_every_command_with_json_is_tried_here() -> None:
    """A new one belongs into `CASES`."""
    assert set(with_json(typer.main.get_command(build(list(COMMANDS))))) == {*CASES, *SLOW_CASES}


def check(command: Case, cases: list[Case], places: Places, kha: Kha) -> None:
    """The first case succeeds. Each prints one document, or ends with an error and says so elsewhere."""
    for number, case in enumerate([*cases, ("--no-such-option",)]):
        code, out, err = kha(*command, *places.named(case), "--json")
        assert "Traceback" not in err, err
        assert code == 0 or number, (case, err)
        if out or code == 0:
            assert isinstance(parse(out), dict | list) and out.endswith("\n"), case
        else:
            assert err, case
    assert code == 2 and not out


@pytest.mark.parametrize("command", CASES, ids=" ".join)
def test_standard_output_is_one_strict_document_or_empty(command: Case, places: Places, kha: Kha) -> None:
    check(command, CASES[command], places, kha)


@pytest.mark.slow
@pytest.mark.parametrize("command", SLOW_CASES, ids=" ".join)
def test_it_is_of_commands_that_start_others_too(command: Case, places: Places, kha: Kha, short_benches: None) -> None:
    if command == ("bench", "scale") and (reason := network.why_not_here()):
        pytest.skip(reason)
    check(command, SLOW_CASES[command], places, kha)


def test_a_secret_is_hidden_in_an_answer_and_the_answer_is_whole(
    places: Places, kha: Kha, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If secrets were hidden in the text of the output, a rule that ends at a quote would remove the quote of the
    document with it.
    """
    monkeypatch.setenv("SOME_API_KEY", "hunter2-canary")
    for overrides in ("run.name='https://me:pa ss@host/x hunter2-canary'", "run.name='token=\"hunter2-canary'"):
        code, out, err = kha("plan", *TINY, overrides, "model.kv_heads=1", "--json")
        assert code == 0 or out, err
        parse(out)
        assert "canary" not in out
    folder = places.root / "hunter2-canary {token: '"
    shutil.copytree(places.root / "two", folder, dirs_exist_ok=True)
    code, out, err = kha("status", str(folder), "--json")
    assert code == 0 and parse(out)["runs"][0]["state"] == "done" and "canary" not in out


PARTS = ("token=", "password", 'https://a:b"c@d/e', "Authorization: Bearer abc", "'", '"', "\\", "{", "\udcff")
SECRETS = st.sampled_from(PARTS)
TEXTS = st.lists(SECRETS | st.text(st.characters(), max_size=3), max_size=6).map("".join)
ANSWERS = st.recursive(
    TEXTS | st.floats() | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(-2, 2) | st.booleans(), inner),
)


@given(ANSWERS)
def test_any_answer_is_strict_with_its_secrets_hidden(answer: Any) -> None:
    redactor = Redactor({"A_TOKEN": "abc"})
    for clean in (redactor.clean, redactor.clean_values):
        parse(json.dumps(strict(clean(answer)), allow_nan=False))


def test_no_two_keys_become_one() -> None:
    assert strict({1: "a", "1": "b", "1 2": "c"}) == {"1": "a", "1 2": "b", "1 2 2": "c"}
    assert strict({"\udcff": "\udcff", "\\udcff": True}) == {"\\udcff": "\\udcff", "\\udcff 2": True}
