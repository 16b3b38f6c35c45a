"""Provides a home directory where the user has none: in a container without a passwd entry, or with HOME on a read-only
disk. Libraries keep caches and settings there, and some end the process when they cannot.
"""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

INSTEAD = "KHA_HOME"
"""The variable that names the provided home, for this process and its children."""
CACHES = {
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton",
    "XDG_CACHE_HOME": ".cache",
}
"""Where libraries look before the home directory."""


def provide_home(place: Path | None = None) -> None:
    """Give this process a home below `place` (default: the directory for temporary files) unless it has a writable one.
    A readable one stays HOME, for the keys in it; only the caches move. Variables that are set are kept. Raises OSError
    when `place` cannot be written.
    """
    _name_user()
    home = os.path.expanduser("~")
    if os.environ.get(INSTEAD) or (os.path.isdir(home) and os.access(home, os.W_OK | os.X_OK)):
        return
    folder = (place / ".home" if place else _temporary()).resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ[INSTEAD] = str(folder)
    if not os.path.isdir(home):
        os.environ["HOME"] = str(folder)
    for name, cache in CACHES.items():
        os.environ.setdefault(name, str(folder / cache))


def in_home(path: str) -> Path:
    """`path` with a leading `~` replaced by the home, or by the one provided instead. Raises OSError where there can be
    none.
    """
    if os.path.expanduser("~") == "~":
        provide_home()
    instead = os.environ.get(INSTEAD)
    if instead and (path == "~" or path.startswith("~/")):
        return Path(instead, path[2:])
    return Path(os.path.expanduser(path))


def _temporary() -> Path:
    """A private folder: somebody else may own one of the same name."""
    folder = Path(tempfile.gettempdir(), f"kha-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder if folder.stat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix="kha-"))


def _name_user() -> None:
    """`getpass.getuser` raises for a user without a name, and torch calls it for the names of its caches."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        if not any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
            os.environ["USER"] = f"uid-{os.getuid()}"
