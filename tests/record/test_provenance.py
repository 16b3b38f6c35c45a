"""The hash of the code, by which results say that they are of one version."""

from __future__ import annotations

from pathlib import Path

import pytest

from kha_train.config import compose
from kha_train.record import provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package with configurations beside it."""
    for name, text in {"kha_train/a.py": "1", "kha_train/deep/b.py": "2", "configs/model/c.yaml": "d: 3"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for module in (compose, provenance):
        monkeypatch.setattr(module, "PACKAGE", tmp_path / "kha_train")
    return tmp_path


def test_any_change_of_code_or_configuration_changes_the_hash_and_nothing_else_does(checkout: Path) -> None:
    known = [provenance.code_sha256()]
    for name in ("kha_train/README.md", "kha_train/__pycache__/a.cpython-312.pyc", "docs/results/a.json", "tests/t.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("else")
    assert provenance.code_sha256() == known[0]
    (checkout / "kha_train/a.py").rename(checkout / "kha_train/z.py")
    known.append(provenance.code_sha256())
    for name, text in {"kha_train/z.py": "4", "configs/model/c.yaml": "d: 5", "kha_train/new.py": ""}.items():
        (checkout / name).write_text(text)
        known.append(provenance.code_sha256())
    assert len(set(known)) == 5


def test_a_wheel_has_the_hash_of_its_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wheel, configurations and launch scripts lie inside the package."""
    before = provenance.code_sha256()
    (checkout / "configs").rename(checkout / "kha_train/configs")
    plugin = checkout / "kha_train/launch/hydra_plugins/plugin.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text("else")
    assert provenance.code_sha256() == before
