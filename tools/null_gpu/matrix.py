"""Run every case on the null device, count them, and list the failures: `make null-gpu`.

Nothing here knows values, speed or real collectives. A failure is an exception: a tensor on the wrong device, a dtype,
an operator that torch for CUDA lacks. `--only TEXT` selects cases by name, `--part 2/5` a share of them. Results are
kept in FOLDER/results.jsonl, and `--again` skips what passed before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CASES_OF_A_PROCESS = 40
READERS = re.compile(r"^(?:resume|eval|branch of) (\w+)$")
"""Names of cases that read the run of `NAME, all by auto`."""

Case = tuple[str, list[str]]


def environment(built: Path, ranks: int = 1, virtual: bool = False) -> dict[str, str]:
    """The variables with which a process of this interpreter sees null devices."""
    known = {name: value for name, value in os.environ.items() if name != "PYTORCH_NO_CUDA_MEMORY_CACHING"}
    known |= {
        "LD_PRELOAD": str(built / "libnull.so"),
        "LD_LIBRARY_PATH": str(built / "cuda"),
        "TRITON_LIBCUDA_PATH": str(built / "cuda"),
        "TRITON_CACHE_DIR": str(built / "triton"),
        "NULL_GPU_COUNT": str(ranks),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "launch")]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    # With virtual memory, torch's allocator is what is measured. Otherwise memory is given back: it is the host's.
    return known | ({"NULL_GPU_VIRTUAL": "1"} if virtual else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def run_cases(cases: list[Case], folder: Path, built: Path, ranks: int) -> list[dict]:
    """The results of `cases`, in processes of their own. A case that kills its process fails, and the others go on."""
    results: list[dict] = []
    while len(results) < len(cases):
        # A launcher passes no standard input on, and a rank that fails ends the others: one case at a time.
        rest = cases[len(results) :][: CASES_OF_A_PROCESS if ranks == 1 else 1]
        found: list[dict] = []
        for result in run_session(rest, folder, built, ranks):
            found = [*found, result] if ranks == 1 else [max(found + [result], key=lambda one: one["code"])]
            if ranks == 1:
                keep(result, folder)
        if len(found) < len(rest):
            found.append({"name": rest[len(found)][0], "code": 1, "seconds": 0.0, "output": "the process ended"})
            keep(found[-1], folder)
        elif ranks > 1:
            keep(found[0], folder)
        results += found
    return results


def forget(cases: list[Case], folder: Path) -> None:
    """Remove what `cases` left in earlier calls: a finished run would be continued, and pass without a step."""
    for name, command in cases:
        for word in command:
            field, _, place = word.partition("=")
            if field == "run.dir" and not name.startswith("resume "):
                shutil.rmtree(place.replace("{folder}", str(folder)), ignore_errors=True)


def run_session(cases: list[Case], folder: Path, built: Path, ranks: int) -> Iterator[dict]:
    """The results of one process, or of `ranks` of them, as they come."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    forget(cases, folder)
    given = "".join(json.dumps(case) + "\n" for case in cases)
    (folder / "cases.jsonl").write_text(given)
    command = [sys.executable, *launcher, str(HERE / "session.py"), str(folder)]
    with (folder / "errors.log").open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(built, ranks)
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                yield json.loads(line[7:])
        process.wait()


def keep(result: dict, folder: Path) -> None:
    """Print a result and append it to the file."""
    outcome = "FAILED" if result["code"] else "passed"
    print(f"{outcome}  {result['seconds']:5.1f} s  {result['name']}", flush=True)
    with (folder / "results.jsonl").open("a") as out:
        out.write(json.dumps(result) + "\n")


def passed_before(folder: Path) -> set[str]:
    """The names of the cases whose last result was a pass."""
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    last = {result["name"]: result["code"] for result in map(json.loads, lines)}
    return {name for name, code in last.items() if code == 0}


def selected(cases: Iterable[Case], only: str, part: str, done: set[str]) -> list[Case]:
    """The cases of `part` (such as 2/5) whose name has `only`, without those `done`. Those that read the run of another
    belong to its part.
    """
    number, of = (int(word) for word in part.split("/"))
    matching = [case for case in cases if only in case[0]]
    places = {name: place for place, (name, _) in enumerate(matching)}
    places |= {name: places.get(re.sub(READERS, r"\1, all by auto", name), place) for name, place in places.items()}
    return [case for case in matching if places[case[0]] % of == number - 1 and case[0] not in done]


def main() -> int:
    """Parse the command, run the cases, print the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "null-gpu", help="runs, data, libraries and results")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    parser.add_argument("--part", default="1/1", help="the n-th of m parts")
    parser.add_argument("--again", action="store_true", help="leave out what passed before")
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from cases import commands, of_two_ranks

    done = passed_before(given.folder) if given.again else set()
    single, double = (selected(cases, given.only, given.part, done) for cases in (commands(), of_two_ranks()))
    if given.list:
        print("\n".join(name for name, _ in [*single, *double]))
        return 0
    built = given.folder / "libraries"
    if not (given.folder / "data" / "train").is_dir():
        from data_tools.synthetic import write_dataset

        write_dataset(given.folder / "data", vocab_size=256, documents=200)
    if not (built / "libnull.so").is_file():
        subprocess.run([sys.executable, HERE / "build.py", built], check=True)
    results = [*run_cases(single, given.folder, built, 1), *run_cases(double, given.folder, built, 2)]
    failures = [result for result in results if result["code"]]
    for result in failures:
        print(f"\n--- {result['name']}: exit code {result['code']}\n{result.get('output', '')[-1500:]}")
    print(f"\n{len(results)} configurations, {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
