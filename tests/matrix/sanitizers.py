"""The extension under sanitizers, which watch it, and analysers, which read it."""

from __future__ import annotations

from matrix import debian, project, pythons
from matrix.base import Failure, Job

ASAN_FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"

# Has the sanitizer's say: whoever reads what was freed must not get any further.
BROKEN = """
#include <stdlib.h>
int broken(void) { char *p = malloc(8); free(p); return p[4]; }
"""

# What cannot be with it: limits of addresses, of which it takes terabytes, and all of
# them locked; memory that stays as it is; a thread that allocates while another forks;
# its own options without /proc.
NOT_WITH_ASAN = " and ".join(
    f"not {name}"
    for name in (
        *("address_space", "cannot_be", "mlockall", "test_fuzz", "test_harden"),
        *("test_endurance", "forked_at_any", "/proc]"),
    )
)

ANALYSER_SUITE = "trixie"
ANALYSERS = ["clang-tidy", "cppcheck", "gcc", "libc6-dev", "python3-dev"]


def asan(job: Job) -> None:
    """The whole suite with AddressSanitizer and UndefinedBehaviorSanitizer."""
    root = debian.root(job, project.OLDEST, project.OLDEST_PYTHON)
    python = pythons.Python("python3", root)
    (runtime,) = root.glob("usr/lib/x86_64-linux-gnu/libasan.so.?")
    env = {
        # The interpreter is not built with it, and keeps memory to its end.
        "LD_PRELOAD": f"/{runtime.relative_to(root)}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "MRELEASE_REQUIRE": pythons.REQUIRED,
    }
    venv = pythons.prepared(
        job, python, "abi3", own=True, build={"CFLAGS": ASAN_FLAGS}, env=env
    )
    _must_fail(job, python, env)
    pythons.tests(job, python, venv, env, *(job.args or ("-k", NOT_WITH_ASAN)))


def _must_fail(job: Job, python: pythons.Python, env: dict[str, str]) -> None:
    """See that the sanitizer is at work."""
    (job.work / "broken.c").write_text(BROKEN)
    library = job.work / "broken.so"
    command = ["gcc", *ASAN_FLAGS.split(), "-shared", "-fPIC", "-o", library]
    if python.run(job, *command, job.work / "broken.c"):
        raise Failure("the probe cannot be compiled")
    before = job.log.tell()
    program = f"import ctypes; ctypes.CDLL({str(library)!r}).broken()"
    status = python.run(job, "python3", "-c", program, env=env)
    if not status or "heap-use-after-free" not in job.logged(before):
        raise Failure("the sanitizer does not see what is wrong")


def analyse(job: Job) -> None:
    """clang-tidy, cppcheck, and gcc's analyser: nothing to be found."""
    root = debian.root(job, ANALYSER_SUITE, ANALYSERS)
    checkout = project.copy(job)
    (include,) = root.glob("usr/include/python3.*")
    flags = [f"-I/{include.relative_to(root)}", "-DPy_LIMITED_API=0x030b0000"]
    source = "src/_mrelease.c"
    for command in (
        ["clang-tidy", "--quiet", "--warnings-as-errors=*", source, "--", *flags],
        [
            *("cppcheck", "--quiet", "--error-exitcode=1", "--inline-suppr"),
            *("--enable=warning,style,performance,portability", "--std=c11"),
            # Headers are not ours to read; what it has to know of Python's:
            "--suppress=missingIncludeSystem",
            *("-DPy_BEGIN_ALLOW_THREADS=", "-DPy_END_ALLOW_THREADS="),
            *("-DPy_RETURN_NONE=return Py_None", "-D__x86_64__"),
            source,
        ],
        [
            *("gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fanalyzer"),
            *(*flags, "-c", "-o", "/dev/null", source),
        ],
    ):
        if debian.chroot(job, root, *command, cwd=checkout):
            raise Failure(f"{command[0]} has found something")
