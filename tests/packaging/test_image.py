"""The image for CUDA machines installs exact versions that the project admits, and one torch with its own Triton."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGE = ROOT / "launch/image"
PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)((?: *\\\n +--hash=sha256:[0-9a-f]{64})+)$", re.MULTILINE)


def test_the_lock_has_one_hashed_version_of_every_requirement_that_the_project_admits() -> None:
    text = (IMAGE / "cuda.lock.txt").read_text()
    pins = {canonicalize_name(name): Version(version) for name, version, _ in PIN.findall(text)}
    named = Counter(canonicalize_name(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE))
    assert named == Counter(pins.keys()), "every version has a hash, and no name two"
    extras = PROJECT["optional-dependencies"]
    installed = [text for name in ("export", "data", "remote", "tensorboard") for text in extras[name]]
    for wanted in [*PROJECT["dependencies"], *installed]:
        requirement = Requirement(wanted)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, wanted
    (triton,) = (Requirement(text) for text in extras["dev"] if text.startswith("triton"))
    assert pins["triton"] in triton.specifier


def test_the_lock_and_the_tests_have_the_same_torch_with_libraries_of_one_cuda() -> None:
    text = (IMAGE / "cuda.lock.txt").read_text()
    tested = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tested and f"torch=={tested[1]} " in text
    releases = set(re.findall(r"^nvidia-\S+?-cu([0-9]+)==", text, re.MULTILINE))
    assert len(releases) == 1, releases


def test_the_image_takes_nothing_without_a_hash_but_the_project_itself() -> None:
    installs = re.findall(r"pip install (.*)", (IMAGE / "Dockerfile").read_text())
    assert [("--require-hashes" in one, "--no-deps" in one) for one in installs] == [(True, False), (False, True)]
