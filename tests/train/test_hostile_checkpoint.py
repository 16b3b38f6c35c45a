"""A checkpoint whose bytes match its manifest but whose content is wrong: refused by field, nothing is trained."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kha_train.checkpoint.fit import check_buffers, check_parameters
from kha_train.checkpoint.manifest import MANIFEST_FILE, TRAINER_FILE
from kha_train.checkpoint.reader import Checkpoint, verify
from kha_train.config.compose import compose, load
from kha_train.decode.generate import load_run
from kha_train.errors import CheckpointError, FormatError, KhaError
from kha_train.record import Marker, has_marker, read_metrics, read_run
from kha_train.train.branch import Branch
from kha_train.train.progress import Progress, read_state, restore_watch
from kha_train.train.resume import Inherited
from kha_train.train.run import train
from kha_train.train.watch import Watch

OLD = Path(__file__).parents[1] / "fixtures" / "old_runs"
BIAS = "blocks.0.feed_forward.router.selection_bias"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run of 72 steps, 4 samples of 64 tokens each, whose checkpoint may be forged."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "gqa"


def seal(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest as its writer would, whatever its content; sizes and hashes are those of the files."""
    for name in manifest["files"]:
        raw = (directory / name).read_bytes()
        manifest["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
    dumps = lambda value: json.dumps(value, sort_keys=True, separators=(",", ":"))
    lines = [f"{dumps(key)}: {dumps(manifest[key])}" for key in ("format", "step", "tool")]
    for title in ("files", "parameters", "buffers"):
        rows = ",\n".join(f"  {dumps(name)}: {dumps(manifest[title][name])}" for name in sorted(manifest[title]))
        lines.append(f"{dumps(title)}: {{\n{rows}\n}}")
    body = ("{\n" + ",\n".join(lines)).encode()
    (directory / MANIFEST_FILE).write_bytes(body + f',\n"sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode())


def forge(run_dir: Path, state: Change = id, manifest: Change = id) -> Checkpoint:
    """The newest checkpoint with its trainer state and its manifest changed, and sealed again."""
    (directory,) = (run_dir / "checkpoints").glob("step-*")
    plain = json.loads((directory / TRAINER_FILE).read_text())
    state(plain)
    (directory / TRAINER_FILE).write_text(json.dumps(plain))
    content = json.loads((directory / MANIFEST_FILE).read_text())
    manifest(content)
    seal(directory, content)
    return Checkpoint(directory, verify(directory))


def put(*keys: str, value: Any) -> Change:
    def change(tree: dict[str, Any]) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


def drop(*keys: str) -> Change:
    def change(tree: dict[str, Any]) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return change


def test_the_state_of_a_real_checkpoint_is_read(run_dir: Path) -> None:
    state = read_state(forge(run_dir))
    assert state.progress == Progress(72, 288, 18432) and state.optimizer_steps == 72
    assert set(state.content_ids) == {"data_content_id", "validation_content_id"}


WRONG: dict[str, tuple[Change, str]] = {
    **{f"no {key}": (drop(key), key) for key in ("progress", "stability", "optimizer_steps", "config")},
    **{f"no {key}": (drop("progress", key), f"progress.{key}") for key in ("step", "samples_seen", "skip_windows")},
    "progress a list": (put("progress", value=[1]), "progress"),
    "step a word": (put("progress", "step", value="72"), "progress.step"),
    "step a fraction": (put("progress", "step", value=72.0), "progress.step"),
    "step beyond the manifest's": (put("progress", "step", value=10**6), "progress.step"),
    "step before the manifest's": (put("progress", "step", value=71), "progress.step"),
    "a negative step": (put("progress", "step", value=-72), "progress.step"),
    "negative samples": (put("progress", "samples_seen", value=-1), "progress.samples_seen"),
    "fewer samples than steps": (put("progress", "samples_seen", value=5), "progress.samples_seen"),
    "samples that contradict tokens": (put("progress", "samples_seen", value=289), "progress.tokens"),
    "tokens that contradict samples": (put("progress", "tokens", value=1), "progress.tokens"),
    "more skipped than made": (put("progress", "skipped_steps", value=73), "progress.skipped_steps"),
    "skipped steps that were counted": (put("progress", "skipped_steps", value=1), "optimizer_steps"),
    "a huge count": (put("optimizer_steps", value=10**300), "optimizer_steps"),
    "optimizer steps of another step": (put("optimizer_steps", value=3), "optimizer_steps"),
    "windows of three": (put("progress", "skip_windows", value=[[1, 2, 3]]), "progress.skip_windows[0]"),
    "a window backwards": (put("progress", "skip_windows", value=[[9, 3]]), "progress.skip_windows"),
    "a window over everything": (put("progress", "skip_windows", value=[[0, 288]]), "progress.samples_seen"),
    "a configuration of text": (put("config", value="x"), "config"),
    "sources of text": (put("config", "data", "sources", value="x"), "config.data.sources"),
    "a content id of a number": (put("data_content_id", value=3), "data_content_id"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_state_that_contradicts_itself_or_the_manifest_is_refused_by_field(run_dir: Path, case: str) -> None:
    change, place = WRONG[case]
    checkpoint = forge(run_dir, change)
    with pytest.raises(CheckpointError) as caught:
        read_state(checkpoint)
    assert caught.value.exit_code == 4
    text = str(caught.value)
    assert text.startswith(
        (f"{checkpoint.path / TRAINER_FILE} {place}:", f"{checkpoint.path / TRAINER_FILE} {place} = ")
    )
    assert "fix: " in text and str(checkpoint.path) in text


@pytest.mark.parametrize("place", ["", "progress"])
def test_state_of_a_later_release_is_refused_with_its_version(run_dir: Path, place: str) -> None:
    checkpoint = forge(run_dir, put(*filter(None, [place]), "later", value=1), put("tool", value="kha_train 9.8"))
    with pytest.raises(FormatError, match=r"later.*written by kha_train 9\.8") as caught:
        read_state(checkpoint)
    assert caught.value.exit_code == 3


MONITOR = ("stability", "monitor")
DETECTORS: dict[str, tuple[Change, type[KhaError], str]] = {
    "no policy": (drop("stability", "policy"), CheckpointError, "KeyError"),
    "a monitor of a list": (put(*MONITOR, value=[1]), CheckpointError, "stability"),
    "a window of words": (put(*MONITOR, "loss", "long", value=["x"]), CheckpointError, r"loss.long\[0\]"),
    "a window in a window": (put(*MONITOR, "loss", "long", value=[[1.0]]), CheckpointError, r"long\[0\]"),
    "a window that is a number": (put(*MONITOR, "loss", "long", value=1.0), CheckpointError, "stability"),
    "a negative count": (put(*MONITOR, "nonfinite_steps", value=-1), CheckpointError, "nonfinite_steps"),
    "a fraction of a count": (put("stability", "policy", "rewinds", value=0.5), CheckpointError, "policy.rewinds"),
    "no count of a class": (drop(*MONITOR, "closed", "narrow"), CheckpointError, "closed.narrow"),
    "an event of text": (put(*MONITOR, "events", "event", value="x"), CheckpointError, "event"),
    "an event of nothing": (put(*MONITOR, "events", "event", value={}), CheckpointError, "event.start_step"),
    "more of a later release": (put(*MONITOR, "later", value=[1.0]), FormatError, "stability.monitor.later"),
    "another detector": (put("stability", "later", value={"a": 1}), FormatError, "stability.later"),
}  # fmt: skip


@pytest.mark.parametrize("case", DETECTORS)
def test_state_that_is_not_the_detectors_is_refused_and_what_they_would_drop_too(run_dir: Path, case: str) -> None:
    change, kind, words = DETECTORS[case]
    checkpoint = forge(run_dir, change)
    with pytest.raises(kind, match=words) as caught:
        restore_watch(Watch(load(run_dir / "config.yaml")), checkpoint)
    assert type(caught.value) is kind and str(checkpoint.path) in str(caught.value)


def test_a_run_is_not_trained_on_such_a_checkpoint_and_nothing_is_moved(run_dir: Path) -> None:
    forge(run_dir, put("progress", "step", value=80))
    command = read_run(run_dir)["provenance"]["command"].split()
    before = read_metrics(run_dir)
    with pytest.raises(CheckpointError, match=r"trainer\.json progress\.step = 80: the manifest says step 72"):
        train(compose([word for word in command if "=" in word]))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000072"]
    assert read_metrics(run_dir) == before and not has_marker(run_dir, Marker.DONE)


def one_number(run_dir: Path) -> Change:
    """The bias stored as a single number, in tensor and manifest."""

    def change(manifest: dict[str, Any]) -> None:
        entry = manifest["buffers"][BIAS]
        path = run_dir / "checkpoints" / "step-00000072" / entry["file"]
        tensors = load_file(path)
        tensors[entry["key"]] = tensors[entry["key"]][:1].clone()
        save_file(tensors, path)
        entry["shape"] = [1]

    return change


@pytest.mark.parametrize("case", ["one number", "missing", "of a later release"])
def test_a_buffer_is_neither_broadcast_nor_invented_nor_dropped(run_dir: Path, case: str) -> None:
    def later(manifest: dict[str, Any]) -> None:
        manifest["buffers"]["blocks.0.later"] = manifest["buffers"].pop(BIAS)

    change = {"one number": one_number(run_dir), "missing": drop("buffers", BIAS), "of a later release": later}[case]
    checkpoint = forge(run_dir, manifest=change)
    shapes = {BIAS: (4,), BIAS.replace(".0.", ".1."): (4,)}
    if case == "of a later release":
        with pytest.raises(FormatError, match=r"blocks\.0\.later"):
            check_buffers(checkpoint, {BIAS.replace(".0.", ".1."): (4,)})
        return
    with pytest.raises(CheckpointError, match=r"manifest\.json buffers\.blocks\.0"):
        check_buffers(checkpoint, shapes)
    command = read_run(run_dir)["provenance"]["command"].split()
    with pytest.raises(CheckpointError, match=r"manifest\.json buffers\.blocks\.0"):
        train(compose([word for word in command if "=" in word]))
    with pytest.raises(CheckpointError, match=r"manifest\.json buffers\.blocks\.0"):
        load_run(run_dir, report=print)


def test_state_that_another_run_cannot_begin_with_is_refused_before_an_engine_is_built(run_dir: Path) -> None:
    loaded = load(run_dir / "config.yaml")
    config = replace(loaded, run=replace(loaded.run, steps=99))
    checkpoint = forge(run_dir)
    Inherited(config, checkpoint), Branch(config, checkpoint, {})
    with pytest.raises(FormatError, match="stability.later"):
        Branch(config, forge(run_dir, put("stability", "later", value={"a": 1})), {})
    checkpoint = forge(run_dir, drop("stability", "later"), one_number(run_dir))
    for begin in (lambda: Inherited(config, checkpoint), lambda: Branch(config, checkpoint, {})):
        with pytest.raises(CheckpointError, match=r"manifest\.json buffers\.blocks\.0"):
            begin()


def test_a_parameter_that_is_not_the_models_is_refused(run_dir: Path) -> None:
    checkpoint = forge(run_dir)
    shapes = dict(checkpoint.names())
    check_parameters(checkpoint, shapes)
    name = next(iter(shapes))
    for wrong in (
        {**shapes, name: (1, 1)},
        {**shapes, "later": (1,)},
        {key: shapes[key] for key in shapes if key != name},
    ):
        with pytest.raises(CheckpointError, match=r"manifest\.json parameters\."):
            check_parameters(checkpoint, wrong)


def test_a_manifest_of_a_later_format_is_refused_by_its_version_and_not_set_aside(run_dir: Path) -> None:
    (directory,) = (run_dir / "checkpoints").glob("step-*")
    seal(directory, json.loads((directory / MANIFEST_FILE).read_text()) | {"format": 2})
    with pytest.raises(FormatError, match="written by another version"):
        verify(directory)
    command = read_run(run_dir)["provenance"]["command"].split()
    with pytest.raises(FormatError):
        train(compose([word for word in command if "=" in word]))
    assert directory.is_dir()
