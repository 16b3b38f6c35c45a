"""Python and the installed packages, against the versions that this release is tested with."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from kha_train.config.compose import PACKAGE
from kha_train.operate.doctor.checks import Check

TOPIC = "versions"


def check_versions() -> Iterator[Check]:
    """Python, each package that every run needs, and a line for each optional group of packages."""
    python, groups = requirements()
    running = ".".join(map(str, sys.version_info[:3]))
    if python.contains(running):
        yield Check(TOPIC, "python", "OK", f"{running} ({python})")
    else:
        yield Check(TOPIC, "python", "FAIL", f"{running}, and {python} is needed", "make the environment with it")
    for requirement in groups[""]:
        yield _needed(requirement)
    for extra, wanted in groups.items():
        # No run needs what developers do.
        if extra not in ("", "dev"):
            yield _optional(extra, wanted)


def requirements() -> tuple[SpecifierSet, dict[str, list[Requirement]]]:
    """The versions of Python, and the requirements by extra ("": always needed), from pyproject.toml in a checkout and
    from the metadata of an installed wheel.
    """
    project = PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        told = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        groups = {"": told["dependencies"], **told["optional-dependencies"]}
        parsed = {extra: map(Requirement, texts) for extra, texts in groups.items()}
        here = {
            extra: [one for one in all_ if not one.marker or one.marker.evaluate()] for extra, all_ in parsed.items()
        }
        return SpecifierSet(told["requires-python"]), here
    installed = metadata("kha_train")
    texts = [Requirement(text) for text in installed.get_all("Requires-Dist") or []]
    extras = installed.get_all("Provides-Extra") or []
    always = [one for one in texts if not one.marker or one.marker.evaluate({"extra": ""})]
    optional = [one for one in texts if one not in always]
    groups_of = {
        extra: [one for one in optional if one.marker and one.marker.evaluate({"extra": extra})] for extra in extras
    }
    return SpecifierSet(installed["Requires-Python"]), {"": always, **groups_of}


def _needed(requirement: Requirement) -> Check:
    found, fits = _installed(requirement)
    if fits:
        return Check(TOPIC, requirement.name, "OK", f"{found} ({requirement.specifier})")
    problem = f"{found}, and {requirement.specifier} is needed" if found else "not installed"
    return Check(TOPIC, requirement.name, "FAIL", problem, _install(f"'{requirement.name}{requirement.specifier}'"))


def _optional(extra: str, wanted: list[Requirement]) -> Check:
    versions = {one.name: _installed(one) for one in wanted}
    lacking = [name for name, (found, fits) in versions.items() if not fits]
    told = ", ".join(f"{name} {found or 'not installed'}" for name, (found, _) in versions.items())
    if not lacking:
        return Check(TOPIC, f"extra {extra}", "OK", told)
    unfit = [f"'{one.name}{one.specifier}'" for one in wanted if one.name in lacking]
    return Check(TOPIC, f"extra {extra}", "WARN", told, f"only if you want it: {_install(' '.join(unfit))}")


def _installed(requirement: Requirement) -> tuple[str, bool]:
    """(the version, "" where there is none; whether it is one that is asked for)."""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return "", False
    return found, requirement.specifier.contains(found, prereleases=True)


def _install(what: str) -> str:
    pinned = " -c constraints.txt" if (PACKAGE.parent / "constraints.txt").is_file() else ""
    return f"pip install{pinned} {what}"
