"""The set-up is repeatable and never replaces the torch build; nothing in it depends on one machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _constraints() -> dict[str, Version]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_every_requirement_but_the_gpu_extra_is_pinned_to_a_version_it_admits() -> None:
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["dev"], *extras["export"], *extras["lab"]]:
        requirement = Requirement(text)
        assert _constraints()[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_every_pinned_version_installs_on_the_oldest_python_that_the_project_admits() -> None:
    """A pin that wants a later patch of it cannot be installed there: pip finds no version, and stops."""
    oldest = PROJECT["requires-python"].removeprefix(">=") + ".0"
    pinned = _constraints()
    wants = {
        canonicalize_name(found.metadata["Name"]): found.metadata["Requires-Python"]
        for found in distributions()
        if found.metadata["Requires-Python"] and canonicalize_name(found.metadata["Name"]) in pinned
    }
    assert len(wants) > 50, "those of the development environment"
    assert {name: want for name, want in wants.items() if not SpecifierSet(want).contains(oldest)} == {}


def test_torch_is_pinned_without_a_build_so_that_any_flavour_satisfies_it() -> None:
    assert _constraints()["torch"] == Version("2.13.0")
    assert not [name for name, version in _constraints().items() if version.local]


def test_every_install_of_the_makefile_passes_the_constraints() -> None:
    installs = re.findall(r"pip install.*", (ROOT / "Makefile").read_text())
    assert installs and all(re.search(r"-c \S*constraints\.txt", install) for install in installs)


def test_no_extra_names_megablocks_whose_pins_exclude_every_current_torch() -> None:
    requirements = [text for group in PROJECT["optional-dependencies"].values() for text in group]
    assert not [text for text in requirements if "megablocks" in text]


def test_ci_runs_lint_and_tests_and_fails_with_them(tmp_path: Path) -> None:
    """With a `make` that only writes down what it is asked, and fails when told to."""
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$@" >> "$LOG"\ntest "$1" != "$FAILS"\n')
    make.chmod(0o755)
    (tmp_path / "apt-get").symlink_to("/bin/false")  # without it the tests of a real SLURM are skipped, that is all
    targets = ["lint", "test", "test-slow"]
    for fails, asked in (("none", targets), *((target, targets[: targets.index(target) + 1]) for target in targets)):
        log = tmp_path / fails
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "FAILS": fails}
        ended = subprocess.run([ROOT / ".ci" / "run"], env=environment, check=False)
        assert log.read_text().split() == asked
        assert (ended.returncode == 0) == (fails == "none")


def test_a_second_set_up_has_nothing_to_do(tmp_path: Path) -> None:
    """Stamps newer than pyproject.toml and constraints.txt leave `make` only the command itself to run."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    fresh = _planned("test", tmp_path)
    assert "venv" in fresh and fresh.count("pip install") == 2
    for stamp in (".core", ".dev"):
        (tmp_path / ".venv" / stamp).touch()
    assert "pip install" not in _planned("test", tmp_path) + _planned("quickstart", tmp_path)


@pytest.mark.parametrize(
    ("version", "told", "venv"),
    [
        ("2.13.0+cu130", "It uses the torch 2.13.0 of", "-m venv --system-site-packages .venv"),
        ("2.12.0", "It downloads torch 2.13.0", "-m venv  .venv"),
        (None, "It downloads torch 2.13.0", "-m venv  .venv"),
    ],
)
def test_a_first_set_up_says_what_it_downloads_and_takes_no_second_torch(
    version: str | None, told: str, venv: str, tmp_path: Path
) -> None:
    """With an interpreter whose torch has that version."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    if version is not None:
        info = tmp_path / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    planned = _planned("quickstart", tmp_path, f"PYTHON={python}")
    assert told in planned and venv in planned


def _planned(target: str, where: Path, *settings: str) -> str:
    return subprocess.run(
        ["make", "-n", target, *settings], cwd=where, capture_output=True, text=True, check=True
    ).stdout


def test_the_citation_names_the_version_and_licence_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["title"], citation["version"], citation["license"]) == (
        PROJECT["name"],
        PROJECT["version"],
        PROJECT["license"],
    )
