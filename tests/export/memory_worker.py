"""Imports a model, and prints by how many MiB its memory grew at most beyond what the code took."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kha_train.export.importing import prepare


def mebibytes(name: str) -> float:
    """A figure of this process's memory: `VmRSS` now, `RssFile` the pages of files in it, `VmHWM` at most."""
    found = re.search(rf"^{name}:\s+([0-9]+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


if __name__ == "__main__":
    directory, out, part_bytes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    # The configuration, and torch's first use of it, belong to the code.
    ready = prepare(directory, out)
    before, code = mebibytes("VmRSS"), mebibytes("RssFile")
    ready.write(out, part_bytes=part_bytes)
    # Pages of libraries that are used for the first time are code too: some 12 MiB.
    print(mebibytes("VmHWM") - before - (mebibytes("RssFile") - code))
