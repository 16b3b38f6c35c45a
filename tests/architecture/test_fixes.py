"""Every fix that an error offers to be typed is typed here, exactly as it stands, and the refused command then works.

A case is a command that is refused. `compose`, `start`, `ranks` (two of them) and `batch` stand for the stage of `kha
train` at which it is; what comes after it is not run. All else is the command of that name.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from data_tools.tasks import Order, write_task
from kha_train import distributed, errors
from kha_train.cli import main, sweep
from kha_train.config.compose import compose
from kha_train.config.resolve import resolve_plan
from kha_train.config.schema import RunConfig
from kha_train.config.validate_ranks import validate_batch
from kha_train.data.format.manifest import TokenizerEntry
from kha_train.data.format.writer import prepare, publish_dataset, write_shard
from kha_train.data.stream import open_stream
from kha_train.engine.default import engine_for
from kha_train.errors import First, Instead, KhaError, Look, Options, Replace, Settings, Typed
from kha_train.train.run import train

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("First", "Instead", "Look", "Options", "Replace", "Settings", "did_you_mean")

REFUSED = {
    "a batch that no ranks share": "batch data.global_batch_size=18 engine.micro_batch_size=4",
    "later batches that no ranks share": "batch data.global_batch_size=18 engine.micro_batch_size=4 "
    "'data.batch_schedule=[{{start_step: 5, global_batch_size: 18}}, {{start_step: 9, global_batch_size: 2}}]'",
    "a batch below one micro-batch": "batch data.global_batch_size=3 engine.micro_batch_size=4",
    "no directory": "compose run.dir=' '",
    "a directory like an option": "compose run.dir=-x",
    "weights and a whole state": "compose run.branch_from=runs/a run.init_from=runs/b",
    "a branch beside its parent": "compose run.branch_from=runs/a/checkpoints/step-00000001 run.dir=runs/a",
    "warm-up and decay beyond the end": "compose optim.schedule.name=wsd optim.schedule.warmup=0.0004 "
    "optim.schedule.decay=1",
    "no expert for a token": "compose moe.top_k=0",
    "no experts": "compose moe.experts=0 moe.top_k=0 moe.expert_width=0",
    "experts in dense layers": "compose moe.dense_layers=4 moe.dense_width=64",
    "shared experts in dense layers": "compose moe.dense_layers=4 moe.dense_width=64 moe.experts=0 moe.top_k=0 "
    "moe.expert_width=0 moe.shared_experts=1",
    "an odd width": "compose moe.expert_width=60",
    "one score over itself": "compose moe.top_k=1",
    "experts times nothing": "compose moe.routed_scaling=0.0",
    "a share above one": "compose model.partial_rotary_factor=2.0 attention.positions=none",
    "a stretch that nothing reads": "compose model.rope_factor=2",
    "yarn without its rows": "compose model.rope_scaling=yarn model.rope_factor=4",
    "yarn from slow to fast": "compose model.rope_scaling=yarn model.rope_original_seq_len=64 model.rope_beta_slow=40",
    "yarn of one wavelength": "compose model.rope_scaling=yarn model.rope_original_seq_len=64 model.rope_theta=1",
    "a stretch of no rotation": "compose model.rope_scaling=linear model.rope_factor=2 attention.positions=none",
    "half a pair": "compose model.head_dim=31",
    "a share that is no pair": "compose model.partial_rotary_factor=0.3",
    "half a pair of mla": "compose attention=mla attention.base.rotary_dim=15",
    "bf16 sums of fp32": "compose engine.precision=fp32 engine.grad_accum_dtype=bf16",
    "a moment that stands still": "compose engine.moment_dtype=bf16 optim.betas=[0.8,0.999]",
    "compiled blocks under ZeRO 3": "compose engine=zero3 engine.compile=block engine.hpz_partition_size=2",
    "compiled blocks that choose": "compose engine.compile=block engine.activation_checkpointing=selective",
    "one process for two ranks": "ranks engine.name=plain",
    "scores of heads apart": "compose attention=talking_heads engine.context_parallel=2",
    "sums of tokens apart": "compose attention=linear engine.context_parallel=2",
    "heads for three": "compose engine.context_parallel=3",
    "rows that do not divide": "compose engine.context_parallel=4 model.seq_len=62",
    "compiled blocks apart": "compose engine.context_parallel=2 engine.compile=block",
    "groups without ZeRO 3": "compose engine.hpz_partition_size=2",
    "experts shared under ZeRO 3": "compose engine=zero3 engine.hpz_partition_size=2 engine.expert_parallel=2",
    "experts shared in compiled blocks": "compose engine.compile=block engine.expert_parallel=2",
    "experts that do not divide": "compose engine.expert_parallel=3",
    "experts that there are none of": "compose moe.dense_layers=4 moe.dense_width=64 moe.experts=0 moe.top_k=0 "
    "moe.expert_width=0 engine.expert_parallel=2",
    "experts that one rank would share": "batch engine.expert_parallel=4",
    "rows that more ranks would share": "batch engine.context_parallel=4",
    "groups without ZeRO 3, compiled": "compose engine.hpz_partition_size=2 engine.compile=block",
    "a profile that ends first": "compose profile.first_step=5",
    "a profile without an end": "compose profile.first_step=5 profile.last_step=5000",
    "one dataset and several": "compose data.train=here 'data.sources=[{{name: a, path: b, weight: 1.0}}]'",
    "unrelated documents": "compose data.packing=best_fit data.isolate_documents=false",
    "documents for cudnn": "compose attention.backend=cudnn",
    "packed documents for cudnn": "compose attention.backend=cudnn data.packing=best_fit",
    "biases for varlen": "compose attention.backend=varlen attention.positions=alibi",
    "biases of pairs of maps": "compose attention=diff attention.positions=alibi",
    "biases without a softmax": "compose attention=linear attention.positions=alibi",
    "heads that do not divide": "compose model.kv_heads=3",
    "more heads than queries": "compose model.kv_heads=100",
    "a norm of latents": "compose attention=mla attention.qk_norm=per_head",
    "latents without rotation": "compose attention=mla attention.positions=none",
    "a projection twice": "compose attention=kha_linear attention.interaction.projections=[v,v]",
    "components of nothing": (
        "compose attention=mea attention.interaction.compose=[] attention.interaction.component_heads=1"
    ),
    "components by layer of nothing": (
        "compose attention=mea attention.interaction.component_heads_by_layer=[0,0,0,0]"
    ),
    "components of another number of layers": (
        "compose attention=mea attention.interaction.component_heads_by_layer=[1]"
    ),
    "components under a norm of all": (
        "compose attention=mea attention.qk_norm=full_width attention.interaction.component_heads=1 "
        "attention.interaction.mix_after_rope=true"
    ),
    "values alone of no values": (
        "compose attention=gta interaction@attention.interaction=knocking_mlp attention.interaction.value_only=true "
        "attention.interaction.projections=[q]"
    ),
    "no identity": "compose optim.interaction_decay=identity",
    "a mistyped choice": "compose optim.schedule.name=cosin",
    "a mistyped preset": "compose attention=kha_mpl",
    "a preset of another group": "compose model=kha_mlp",
    "a preset without its place": "compose attention=mla interaction=knocking_linear",
    "a preset for a section": "compose attention.interaction=knocking_linear",
    "a choice for its section": "compose optim.schedule=wsd",
    "a mistyped setting": "compose model.hiden_size=64",
    "a setting of no section": "compose lr=1e-3",
    "a setting of another framework": "compose learning_rate=1e-3",
    "a setting added by another name": "compose +optim.learning_rate=1e-3",
    "a mistyped setting that is added": "compose +optim.grad_clp=1.0",
    "a mistyped sink": "compose telemetry.sinks=[wandb,tensorbord,nothing]",
    "a sink twice": "compose telemetry.sinks=[wandb,tensorboard,wandb]",
    "one tag": "compose telemetry.wandb.tags=mine",
    "a grid": "compose attention=gqa,mha",
    "a grid and its place": "compose attention=gqa,mha run.dir=runs/grid",
    "a setting and a blank": "compose run.steps 3",
    "a setting with a colon": "compose run.steps:3",
    "a preset alone": "compose kha_mlp",
    "an option": "plan --run.steps 3",
    "an option of another framework": "plan --max-steps=3",
    "CUDA on a cluster of CPUs": "plan engine.device=cuda cluster=cpu",
    "devices that never work": "plan --scale 8 cluster=h100_1x8 cluster.hours_between_failures=0",
    "a backend of CUDA": "resolve engine.device=cpu attention.backend=varlen",
    "a backend of CUDA on a cluster of CPUs": "resolve cluster=cpu attention.backend=varlen",
    "bf16 of an old GPU": "resolve cluster=h100_1x1 cluster.capability=7.5 engine.precision=bf16",
    "a backend of bf16": "compose engine.precision=fp32 attention.backend=varlen",
    "kernels of CUDA": "resolve engine.device=cpu engine.kernels=triton",
    "a kernel of CUDA": "resolve engine.device=cpu attention=kha_mlp attention.interaction.impl=triton",
    "experts of CUDA": "resolve engine.device=cpu moe.backend=megablocks",
    "no CUDA here": "start engine.device=cuda",
    "another vocabulary": "stream {small} model.vocab_size=300",
    "documents of one token": "train {small} data.train={single} data.validation={single} run.steps=1",
    "questions that are cut": "train {small} data.train={task}/train data.validation={task}/validation model.seq_len=4 "
    "run.steps=1 evaluation.tasks=[answers]",
    "checkpoints that are gone": "train {small} run.steps=2 run.dir={lost}",
    "a checkpoint that is not there": "checkpoint keep {run} 99",
    "a corpus that is there": "data corpus --no-standard-library --extra-root {texts} --out {corpus}",
    "a tokenizer that is there": "data tokenizer --corpus {corpus} --vocab-size 300 --out {tokenizer}",
    "shards that are there": "data tokenize --corpus {corpus} --tokenizer {tokenizer} --out {shards}",
    "a picture of somebody": "data inspect {shards} --png {taken}",
    "no quickstart yet": "data inspect quickstart/shards/train",
    "a setting of another attention": "config explain attention.base.latent_width",
    "neither settings nor a run": "config diff nowhere ''",
    "no SLURM": "sweep attention=gqa,mha",
}
"""The commands that are typed; `places` makes the names in braces."""

ELSEWHERE = {
    "kha_train/train/resume.py": "train/test_ways_out_of_a_refused_resume.py",
    "kha_train/train/branch.py": "train/test_branch.py",
    "kha_train/train/rate_change.py": "train/test_rate_change.py",
    "kha_train/bench/peers.py": "bench/test_peers.py",
    "kha_train/model/attention/choice.py": "model/attention/test_backends.py",
    "kha_train/model/moe/grouped.py": "model/moe/test_grouped.py",
    "kha_train/data/tokenizer.py": "data_tools/test_encode.py",
    "kha_train/export/tokenizer_files.py": "export/test_exporting.py",
}
"""File -> the test of its fixes: they need a run at a certain step or whose data are gone, or a device or library that
computes wrong."""


class _ReachedError(Exception):
    """The command was accepted, and would train now."""


@pytest.fixture(scope="session")
def places(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The names in braces: settings, a run, a corpus with its tokenizer and shards."""
    home = tmp_path_factory.mktemp("places")
    (home / "texts").mkdir()
    for number in range(400):
        text = " ".join(f"word{(number * step) % 97} of document {number}" for step in range(60))
        (home / "texts" / f"{number}.txt").write_text(text)
    found = {name: str(home / name) for name in ("texts", "corpus", "tokenizer", "shards", "run")}
    for command in (
        "data corpus --no-standard-library --extra-root {texts} --out {corpus}",
        "data tokenizer --corpus {corpus} --vocab-size 300 --out {tokenizer}",
        "data tokenize --corpus {corpus} --tokenizer {tokenizer} --out {shards}",
    ):
        _kha(shlex.split(command.format(**found)))
    train(compose([*small, "run.steps=1", f"run.dir={found['run']}", "checkpoint.background=false"]))
    _write_single_tokens(home / "single")
    write_task(Order("copy", 40, 20, (2, 6)).complete(), home / "task")
    return {**found, "task": str(home / "task"), "small": shlex.join(small), "single": str(home / "single")}


def _write_single_tokens(folder: Path) -> None:
    """A dataset of documents with one token each, with the vocabulary of `small`."""
    prepare(folder)
    documents = [(np.array([number % 255 + 1]), 1) for number in range(4096)]
    shard = write_shard(folder, 0, documents, vocab_size=256, dtype="uint16")
    tokenizer = TokenizerEntry("single", 256, "0" * 64, None, {"eos": 0}, (0, *[1] * 255))
    publish_dataset(folder, [shard], tokenizer, dtype="uint16", corpus={})


@pytest.fixture
def refused(places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """The words of a case, in an empty directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sweep, "run_points", _reached)

    def words(case: str) -> list[str]:
        lost = tmp_path / "lost" / "run"
        if "{lost}" in REFUSED[case] and not lost.exists():
            shutil.copytree(places["run"], lost)
            shutil.rmtree(lost / "checkpoints")
        taken = tmp_path / "taken.png"
        if "{taken}" in REFUSED[case]:
            taken.write_text("somebody's")
        return shlex.split(REFUSED[case].format(**places, lost=lost, taken=taken))

    return words


def _reached(*_: object) -> None:
    raise _ReachedError


def _kha(words: Sequence[str]) -> None:
    main.build([words[0]])(args=list(words), standalone_mode=False)


def _type(words: Sequence[str]) -> None:
    """Run a command of the table as far as its stage. Raises KhaError if it is refused."""
    stages: dict[str, Callable[[RunConfig], object]] = {
        "compose": lambda config: None,
        "batch": lambda config: validate_batch(config, 1),
        "resolve": resolve_plan,
        "stream": lambda config: open_stream(config, 0, 1),
        "ranks": lambda config: engine_for(config, 2),
        "start": _start,
        "train": train,
    }
    try:
        if words[0] in stages:
            stages[words[0]](compose(words[1:]))
        else:
            _kha(words)
    except _ReachedError:
        pass


def _start(config: RunConfig) -> None:
    distributed.start(config.engine.device, 10.0)
    distributed.stop(None)


def _mended(words: Sequence[str], fix: Typed, places: dict[str, str]) -> list[str]:
    """`words` after typing `fix`."""
    typed = shlex.split(fix.typed)
    if isinstance(fix, Settings):
        keys = {text.partition("=")[0] for text in typed}
        return [text for text in words if text.partition("=")[0] not in keys] + typed
    if isinstance(fix, Options):
        return [*words, *typed]
    if isinstance(fix, Instead | Look):
        assert typed[0] == "kha"
        return typed[1:]
    if isinstance(fix, First):
        if fix.typed == "kha quickstart":
            # It takes two minutes; tests/operate/test_quickstart.py runs it.
            shutil.copytree(places["shards"], Path("quickstart") / "shards")
        else:
            subprocess.run(fix.typed, shell=True, check=True, env={"PATH": "/usr/bin:/bin"})
        return list(words)
    assert isinstance(fix, Replace)
    old, at = fix.old.split(), 0
    for at in range(len(words)):
        if list(words[at : at + len(old)]) == old:
            return [*words[:at], *typed, *words[at + len(old) :]]
    swapped = [_swapped(text, fix) for text in words]
    assert swapped != list(words)
    return swapped


def _swapped(text: str, fix: Replace) -> str:
    key, equals, value = text.partition("=")
    if key.lstrip("+") == fix.old:
        return f"{fix.typed}{equals}{value}"
    return f"{key}={fix.typed}" if value == fix.old else text


def _error(words: Sequence[str]) -> KhaError:
    with pytest.raises(KhaError) as raised:
        _type(words)
    return raised.value


def _case(name: str) -> object:
    needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
    return pytest.param(name, marks=needs_none) if name == "no CUDA here" else name


@pytest.mark.parametrize("case", [_case(name) for name in REFUSED])
def test_what_an_error_offers_to_be_typed_works(
    case: str, refused: Callable[[str], list[str]], places: dict[str, str], tmp_path: Path
) -> None:
    words = refused(case)
    fixes = _error(words).typed_fixes
    assert fixes, _error(words)
    for number, fix in enumerate(fixes):
        _type(_mended(refused(case), fix, places))
        assert number == 0 or fix != fixes[0]


def _sites() -> Iterator[tuple[str, int, int]]:
    """(file, first line, last line) of every expression that makes a typed fix."""
    for folder in ("kha_train", "data_tools", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if path == Path(errors.__file__) or name in ELSEWHERE:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                    yield name, node.lineno, node.end_lineno or node.lineno


def test_every_fix_that_can_be_typed_has_a_case_above(
    refused: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: set[tuple[str, int]] = set()
    plain = Typed.__new__

    def noting(cls: type[Typed], typed: str, shown: str = "{}") -> Typed:
        frame = sys._getframe(1)
        while frame is not None:
            made.add((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        return plain(cls, typed, shown)

    monkeypatch.setattr(Typed, "__new__", staticmethod(noting))
    for case in REFUSED:
        if case != "no CUDA here" or not torch.cuda.is_available():
            _error(refused(case))
    lines = {(str(Path(file).relative_to(ROOT)), line) for file, line in made if file.startswith(f"{ROOT}/")}
    uncovered = [
        f"{file}:{first}"
        for file, first, last in _sites()
        if not any((file, line) in lines for line in range(first, last + 1))
    ]
    assert [site for site in uncovered if "distributed" not in site or not torch.cuda.is_available()] == []


LOOKS_TYPED = re.compile(
    r"\b(?:run|model|attention|moe|data|optim|engine|resume|profile|stability|telemetry)\.[\w.]+=[\w\[./']"
    r"|(?:^|pass )--\w"
)
WORDS = ("moe.backend=loop", "data.train=", "attention.backend=eager", "engine.kernels=torch", "kha status --json")
"""What advice in words may name: it needs more than typing."""


def test_a_fix_that_can_be_typed_is_no_plain_string() -> None:
    offenders = []
    for folder in ("kha_train", "data_tools", "launch"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                for keyword in node.keywords if isinstance(node, ast.Call) else []:
                    if keyword.arg == "fix" and isinstance(keyword.value, ast.Constant | ast.JoinedStr):
                        text = ast.unparse(keyword.value).strip("f'\"")
                        if LOOKS_TYPED.search(text) and not any(word in text for word in WORDS):
                            offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text}")
    assert offenders == []
    assert all((ROOT / "tests" / test).is_file() for test in ELSEWHERE.values())
