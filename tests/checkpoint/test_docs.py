"""docs/checkpoints.md is correct."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import torch

from kha_train.checkpoint.manifest import parse_manifest
from kha_train.checkpoint.writer import PART_BYTES

PAGE = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()


def test_the_lines_that_read_a_parameter_read_it(tmp_path, save, make_state) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    code += "print(json.dumps([name, weight.tolist()]))"
    command = [sys.executable, "-I", "-c", code]
    answer = subprocess.run(command, cwd=save(tmp_path, 1, size=3), capture_output=True, check=True, timeout=60)
    name, weight = json.loads(answer.stdout)
    assert torch.equal(torch.tensor(weight), make_state(1)[name, "master"])


def test_the_manifests_own_hash_covers_what_the_page_says(tmp_path, save) -> None:
    raw = (save(tmp_path, 1) / "manifest.json").read_bytes()
    body, _, last = raw.rpartition(b',\n"sha256": ')
    assert last == f'"{sha256(body).hexdigest()}"\n}}\n'.encode()
    for field in re.findall(rb'^"(\w+)":', raw, re.MULTILINE):
        assert f"| `{field.decode()}` |" in PAGE


def test_the_files_and_the_part_size_are_those_of_the_page(tmp_path, save) -> None:
    path = save(tmp_path, 1000, size=2)
    for file in [*parse_manifest((path / "manifest.json").read_bytes()).contents.files, path.name, "manifest.json"]:
        assert file in PAGE
    assert f"{PART_BYTES // 2**20} MiB" in PAGE
