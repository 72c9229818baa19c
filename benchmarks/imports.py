"""What an import costs in a fresh interpreter, and ``mrelease kill`` as a process.

    python -m benchmarks.imports [--quick] [--runs N]

Each import is timed inside an interpreter of its own (-I, so that nothing of the
environment is loaded), all in turn. ``import mrelease`` loads the system calls; ``from
mrelease import kill`` loads all that a kill needs, and a kill after it is watched for
modules that it loads all the same. Whole processes are timed from outside.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from time import perf_counter

import victims

from . import lab
from .lab import Options
from .report import Report, Table, Target

OF_CTYPES, OF_PSUTIL = 0.25, 0.1  # import mrelease, at most
OF_PASS = 3  # mrelease kill PID, at most
CASES = {
    "import ctypes": "ctypes",
    "import mrelease": "mrelease",
    "from mrelease import kill": "mrelease",
    "import psutil": "psutil",
    "import cffi": "cffi",
}
FIRST_KILL = """
import sys
sys.path[:] = {path!r}
from mrelease import kill
before = set(sys.modules)
kill({pid})
print(*sorted(set(sys.modules) - before))
"""


def run(options: Options) -> Report:
    report = Report(
        "imports",
        "imports, and the command as a process",
        "Milliseconds: median [lowest-highest].",
    )
    runs = options.repeats(50, 10)
    imports = Table("in a fresh interpreter", "ms", ["import"], scale=1000)
    processes = Table("a whole process", "ms", ["time"], scale=1000)
    report.tables += [imports, processes]
    statements = []
    for statement, module in CASES.items():
        if importlib.util.find_spec(module):
            statements.append(statement)
        else:
            report.missing.append(module)
    command("-c", "import mrelease._cli")  # compiles
    for _ in range(runs):
        for statement in statements:
            imports.add(statement, seconds(statement))
        processes.add("python -c pass", command("-c", "pass"))
        with lab.victim(1) as victim:
            processes.add(
                "mrelease kill PID", command("-m", "mrelease", "kill", victim.pid)
            )
    loaded = loaded_by_first_kill()
    if loaded:
        report.notes.append(f"loaded by the first kill: {' '.join(loaded)}")
    report.targets = [
        Target(
            "import mrelease, to import ctypes",
            imports.ratio("import mrelease", "import ctypes"),
            at_most=OF_CTYPES,
        ),
        Target(
            "modules that the first kill loads after from mrelease import kill",
            len(loaded),
            at_most=0,
        ),
        Target(
            "mrelease kill PID, to python -c pass",
            processes.ratio("mrelease kill PID", "python -c pass"),
            at_most=OF_PASS,
        ),
    ]
    if "import psutil" in statements:
        ratio = imports.ratio("import mrelease", "import psutil")
        report.targets.insert(
            1, Target("import mrelease, to import psutil", ratio, at_most=OF_PSUTIL)
        )
    return report


def seconds(statement: str) -> float:
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from time import perf_counter\n"
        f"start = perf_counter(); {statement}; end = perf_counter()\n"
        "print(end - start)"
    )
    output = subprocess.check_output([sys.executable, "-I", "-c", program])
    return float(output)


def command(*arguments: object) -> float:
    """Seconds that a whole process of Python takes, which must succeed."""
    # As it is where it has run before: compiled.
    unset = ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    start = perf_counter()
    subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=env,
    )
    return perf_counter() - start


def loaded_by_first_kill() -> list[str]:
    with victims.victim(1) as victim:
        program = FIRST_KILL.format(path=sys.path, pid=victim.pid)
        output = subprocess.check_output([sys.executable, "-I", "-c", program])
        victim.wait_exit()
    return output.decode().split()


if __name__ == "__main__":
    from .__main__ import main

    raise SystemExit(main(["imports", *sys.argv[1:]]))
