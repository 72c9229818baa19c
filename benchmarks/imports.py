"""What an import costs in a fresh interpreter, beside those of ctypes and psutil.

Each import is timed inside an interpreter of its own (-I, so that nothing of the
environment is loaded), all in turn; printed as median [lowest-highest] and as a ratio
to ctypes. ``import mrelease`` loads the system calls; ``from mrelease import kill``
loads all that a kill needs.

    python -m benchmarks.imports [--runs N]
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys

TARGET = 0.25  # import mrelease to import ctypes, of the medians
CASES = {
    "import ctypes": "ctypes",
    "import mrelease": "mrelease",
    "from mrelease import kill": "mrelease",
    "import psutil": "psutil",
}


def seconds(statement: str) -> float:
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from time import perf_counter\n"
        f"start = perf_counter(); {statement}; end = perf_counter()\n"
        "print(end - start)"
    )
    output = subprocess.check_output([sys.executable, "-I", "-c", program])
    return float(output)


def main() -> int:
    parser = argparse.ArgumentParser(description="The cost of imports.")
    parser.add_argument("--runs", type=int, default=50, help="of each (default: 50)")
    options = parser.parse_args()
    statements = [
        statement
        for statement, module in CASES.items()
        if importlib.util.find_spec(module)
    ]
    times: dict[str, list[float]] = {statement: [] for statement in statements}
    for _ in range(options.runs):
        for statement in statements:
            times[statement].append(seconds(statement))
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    print(f"Python {sys.version.split()[0]}, {options.runs} runs, milliseconds")
    for name, samples in times.items():
        spread = f"[{min(samples) * 1000:.2f}-{max(samples) * 1000:.2f}]"
        ratio = medians[name] / medians["import ctypes"]
        print(f"{name:<26} {medians[name] * 1000:6.2f} {spread:<16} {ratio:5.2f}")
    met = medians["import mrelease"] / medians["import ctypes"] <= TARGET
    print(f"target: at most {TARGET} of ctypes: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
