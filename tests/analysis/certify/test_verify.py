"""A certificate finds every later change, and its verifier needs nothing but Python."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kha_train.analysis.certify import verify
from kha_train.cli.main import run

OLD_RUNS = Path(__file__).parents[2] / "fixtures" / "old_runs" / "runs"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two runs of 72 steps, `gqa` and `kha_mlp`, and their certified report."""
    place = tmp_path_factory.mktemp("certified")
    shutil.copytree(OLD_RUNS, place / "runs")
    with pytest.raises(SystemExit) as ended:
        run(["compare", str(place / "runs"), "--certify", "--out", str(place / "report")])
    assert not ended.value.code
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of `made`, to be tampered with; the original is away from where the certificate says."""
    return Path(shutil.copytree(made, tmp_path / "moved"))


def verified(place: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of the copied verifier, in an interpreter without any package."""
    words = ["report/verify.py", "--runs", "runs", *arguments]
    isolated = [sys.executable, "-I", "-S", *words]
    ended = subprocess.run(isolated, cwd=place, env={}, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def replaced(name: str, before: str, now: str) -> Callable[[Path], None]:
    """Replace the first `before` in the file `name`, which has it."""

    def tamper(place: Path) -> None:
        text = (place / name).read_text()
        assert before in text
        (place / name).write_text(text.replace(before, now, 1))

    return tamper


def at_step(step: int, key: str, value: object) -> Callable[[Path], None]:
    def tamper(place: Path) -> None:
        file = place / "runs" / "gqa" / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        (line,) = (line for line in lines if line["step"] == step)
        assert line[key] != value
        line[key] = value
        file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    return tamper


def bit_flipped(place: Path) -> None:
    """The last byte of the model's tensors."""
    file = place / "runs" / "gqa" / "checkpoints" / "step-00000072" / "model-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def figure(path: str, value: object) -> Callable[[Path], None]:
    """Change what the certificate says at `path`, keys and places between slashes."""

    def tamper(place: Path) -> None:
        file = place / "report" / "certificate.json"
        whole = inner = json.loads(file.read_text())
        *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in keys:
            inner = inner[key]
        assert inner[last] != value
        inner[last] = value
        file.write_text(json.dumps(whole))

    return tamper


def shadowed(place: Path) -> None:
    """Another value, behind a key that spells the dotted name of the certified one."""
    file = place / "report" / "certificate.json"
    whole = json.loads(file.read_text())
    run = whole["facts"]["report"]["runs"][1]
    whole["facts"]["report.runs[1].bits_per_byte"], run["bits_per_byte"] = run["bits_per_byte"], 0.5
    file.write_text(json.dumps(whole))


def removed(name: str) -> Callable[[Path], None]:
    return lambda place: shutil.rmtree(place / name)


CHECKPOINT = "runs/gqa/checkpoints/step-00000072"
TAMPERED: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "a result behind a key of its name": (shadowed, ("certificate.json: file is",)),
    "a loss": (at_step(50, "train/loss", 3.5), ("metrics.jsonl: column train/loss", "metrics.jsonl: lines 49 to 50")),
    "the order of the data": (at_step(9, "samples_first", 7), ("metrics.jsonl: samples_first, samples_last",)),
    "the content id of the data": (
        replaced("runs/gqa/run.json", '"data_content_id": "', '"data_content_id": "0'),
        ("DIFFERS  data order", "run.json: provenance.data_content_id"),
    ),
    "an event": (replaced("runs/gqa/events.jsonl", '"kind"', '"kinds"'), ("events.jsonl: column kinds",)),
    "a setting": (replaced("runs/gqa/config.yaml", "lr: ", "lr: 1"), ("config.yaml: optim.lr (line",)),
    "an attempt": (
        replaced("runs/gqa/run.json", '"start_step": 32', '"start_step": 31'),
        ("run.json: attempts[1].start_step is 31, certified as 32",),
    ),
    "a manifest": (replaced(f"{CHECKPOINT}/manifest.json", '"step": 72', '"step": 71'), ("manifest.json: step",)),
    "a trainer state": (
        replaced(f"{CHECKPOINT}/trainer.json", '"samples_seen": ', '"samples_seen": 1'),
        ("trainer.json: progress.samples_seen",),
    ),
    "a tensor": (bit_flipped, ("model-00000.safetensors: tensor ",)),
    "a checkpoint that is gone": (removed(CHECKPOINT), ("checkpoints: steps is none, certified as 72",)),
    "a run that is gone": (removed("runs/gqa"), ("no such directory",)),
    "a number on the page": (replaced("report/index.html", "<td>", "<td>1"), ("index.html: file",)),
    "a difference in the certificate": (
        figure("facts/pairs/0/difference", -0.25),
        ("certificate.json: pairs[0].difference is -0.25, certified as", "the records give"),
    ),
    "a result in the certificate": (
        figure("facts/report/runs/1/bits_per_byte", 0.5),
        ("certificate.json: report.runs[1].bits_per_byte is 0.5",),
    ),
    "what a link covers": (figure("runs/0/1/covers", "everything"), ("certificate.json: covers is everything",)),
    "a field that a link holds": (
        figure("runs/0/2/fields/run.json", {}),
        ("certificate.json: sha256 of the link attempts",),
    ),
    "the SHA-256 of a link": (figure("runs/0/4/sha256", "0" * 64), ("sha256 of the link checkpoints",)),
    "the order of links": (figure("runs/1/3/previous", "0" * 64), ("certificate.json: previous is 000",)),
    "the seal": (figure("seal", "0" * 64), ("certificate.json: seal is 000",)),
}


def test_an_untouched_certificate_passes_wherever_it_lies(place: Path) -> None:
    code, told = verified(place)
    assert (code, "everything agrees" in told, "DIFFERS" in told) == (0, True, False), told
    seal = json.loads((place / "report" / "certificate.json").read_text())["seal"]
    assert verified(place, "--seal", seal)[0] == 0
    code, told = verified(place, "--seal", "0" * 64)
    assert code == 1 and "seal is not the one that you kept" in told


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_field_is_found_and_named_with_its_file(what: str, place: Path) -> None:
    tamper, names = TAMPERED[what]
    tamper(place)
    code, told = verified(place)
    assert code == 1, told
    for name in names:
        assert name in told


def test_names_are_printed_literally(place: Path) -> None:
    figure("facts/runs/0/label", "\x1b[31mred")(place)
    code, told = verified(place)
    assert code == 1 and "\\x1b[31mred: runs" in told and "\x1b" not in told


def test_a_file_that_is_no_certificate_is_refused(place: Path) -> None:
    (place / "report" / "certificate.json").write_text('{"format": 9}')
    code, told = verified(place)
    assert code == 2 and "cannot be checked: ValueError: format 9" in told


def test_a_link_is_the_sha_256_of_its_canonical_json(made: Path) -> None:
    """Computed again from the format's description: sorted keys, no spaces, ASCII."""
    certificate = json.loads((made / "report" / "certificate.json").read_text())
    previous = ""
    for link in certificate["runs"][0]:
        assert link["previous"] == previous
        body = {key: link[key] for key in ("covers", "fields", "name", "previous")}
        previous = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert link["sha256"] == previous
    run_dir = made / "runs" / "gqa"
    losses = hashlib.sha256()
    for number, line in enumerate((run_dir / "metrics.jsonl").read_text().splitlines()):
        losses.update(json.dumps([number, json.loads(line)["train/loss"]], separators=(",", ":")).encode())
    assert certificate["runs"][0][3]["fields"]["metrics.jsonl"]["column train/loss"] == losses.hexdigest()
    tensors = (run_dir / "checkpoints" / "step-00000072" / "model-00000.safetensors").read_bytes()
    kept = certificate["runs"][0][4]["fields"]["checkpoints/step-00000072/model-00000.safetensors"]["file"]
    assert kept == f"{len(tensors)} bytes, SHA-256 {hashlib.sha256(tensors).hexdigest()}"


def test_long_records_are_hashed_in_groups_and_one_more_line_is_found(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "train/loss": 2.0}) for step in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    before = verify.run_links(tmp_path)
    names = before[3]["fields"]["metrics.jsonl"]
    assert sum(name.startswith("line") for name in names) <= verify.MOST_GROUPS
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1001, "train/loss": "nan"}\n')
    told = verify.differences(before[3]["fields"], verify.run_links(tmp_path)[3]["fields"])
    assert any(words.startswith("metrics.jsonl: column train/loss") for words in told)
