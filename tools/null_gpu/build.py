"""Build the libraries of the null device: `python build.py FOLDER`, run by an environment with torch for CUDA.

Symbols of CUDA's libraries that torch needs and no source file here defines are answered with success.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("runtime.c", "nccl.c")
LIBRARIES = ("torch_cuda", "c10_cuda", "torch_python", "torch_cpu", "caffe2_nvrtc", "torch_cuda_linalg")
ANSWERED = re.compile(r"(cuda|cublas|cudnn|cusparse|cusolver|nccl|cufft)\w+")
DEFINED = re.compile(r"^(?:int|size_t|const char \*) ?\*?(\w+)\(", re.MULTILINE)


def build(folder: Path) -> None:
    """Write `libnull.so`, to be preloaded, and `cuda/libcuda.so.1`, the driver, to `folder`."""
    site = Path(sysconfig.get_path("platlib"))
    (folder / "cuda").mkdir(parents=True, exist_ok=True)
    defined = {name for source in SOURCES for name in DEFINED.findall((HERE / source).read_text())}
    missing = sorted(needed(site) - defined)
    (folder / "success.c").write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in missing))
    headers = [f"-I{site / 'nvidia/cu13/include'}", f"-I{site / 'triton/backends/nvidia/include'}"]
    sources = [*(str(HERE / source) for source in SOURCES), str(folder / "success.c")]
    compile_library(*headers, "-o", str(folder / "libnull.so"), *sources, "-ldl")
    driver = folder / "cuda" / "libcuda.so.1"
    compile_library("-Wl,-soname,libcuda.so.1", "-o", str(driver), str(HERE / "driver.c"))
    shutil.copy(driver, driver.with_name("libcuda.so"))
    print(f"{len(defined)} symbols written, {len(missing)} answered with success: {folder}")


def needed(site: Path) -> set[str]:
    """The symbols of CUDA's libraries that torch's own libraries leave undefined."""
    found: set[str] = set()
    for name in LIBRARIES:
        library = site / "torch" / "lib" / f"lib{name}.so"
        if library.is_file():
            listed = subprocess.run(
                ["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True
            )
            symbols = (line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines())
            found |= {symbol for symbol in symbols if ANSWERED.fullmatch(symbol)}
    return found


def compile_library(*arguments: str) -> None:
    """A shared library. Signatures here leave out arguments and types that the stubs do not read."""
    subprocess.run(["gcc", "-w", "-shared", "-fPIC", "-O1", *arguments], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
