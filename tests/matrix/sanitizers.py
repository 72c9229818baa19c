"""The extension under sanitizers, which watch it, and analysers, which read it."""

from __future__ import annotations

from pathlib import Path

from matrix import debian, project, pythons
from matrix.base import Failure, Job, Skip

ASAN_FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined"

# Has the sanitizer's say: whoever reads what was freed must not get any further.
BROKEN = """
#include <stdlib.h>
int broken(void) { char *p = malloc(8); free(p); return p[4]; }
"""

TSAN_PYTHON = "3.13"
TSAN_BUILD = ("--disable-gil", "--with-thread-sanitizer")
TSAN_TESTS = ["tests/test_threads.py", "--long"]
# It has its memory where a kernel that randomises more than Debian's may put others'.
NOT_RANDOM = ("setarch", "-R")

RACING = """
#include <pthread.h>
static int counter;
static void *count(void *arg) { counter++; return arg; }
int broken(void) {
    pthread_t one, two;
    pthread_create(&one, NULL, count, NULL);
    pthread_create(&two, NULL, count, NULL);
    pthread_join(one, NULL);
    return pthread_join(two, NULL);
}
"""

# What cannot be with it: limits of addresses, of which it takes terabytes, and all of
# them locked, as the example's guard does, too; memory that stays as it is; a thread
# that allocates while another forks; its own options without /proc.
NOT_WITH_ASAN = " and ".join(
    f"not {name}"
    for name in (
        *("address_space", "cannot_be", "mlockall", "test_fuzz", "test_harden"),
        *("test_endurance", "test_examples", "forked_at_any", "/proc]"),
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
    before = job.log.tell()
    if not _broken(job, python, BROKEN, ASAN_FLAGS, env):
        raise Failure("the probe has not failed")
    if "heap-use-after-free" not in job.logged(before):
        raise Failure("the sanitizer does not see what is wrong")
    pythons.tests(job, python, venv, env, *(job.args or ("-k", NOT_WITH_ASAN)))


def tsan(job: Job) -> None:
    """Many threads, with ThreadSanitizer in a free-threaded interpreter as well."""
    python = pythons.compiled(job, TSAN_PYTHON, *TSAN_BUILD, under=NOT_RANDOM)
    if not python:
        raise Skip(f"no source of Python {TSAN_PYTHON} in Debian")

    def watched(reports: Path) -> dict[str, str]:
        """Have every process, children too, report to a file of its own there."""
        reports.mkdir()
        # A child that threads have forked may go on, as it does without a sanitizer;
        # one that had ended by then, but was not joined, is no leak of the child's.
        options = f"log_path={reports}/of exitcode=0 die_after_fork=0"
        options += " report_thread_leaks=0"
        return {"TSAN_OPTIONS": options}

    env = watched(job.work / "reports")
    venv = pythons.prepared(
        job,
        python,
        "not gil and not debug",
        own=True,
        build={"TSAN_OPTIONS": "report_bugs=0"},  # of pip
        env=env,
    )
    (extension,) = venv.glob("lib/python*/site-packages/mrelease/_mrelease.*.so")
    if b"__tsan_func_entry" not in extension.read_bytes():
        raise Failure("the extension has been built without the sanitizer")
    probe = job.work / "probe"
    _broken(job, python, RACING, "-g -fsanitize=thread", watched(probe))
    if "data race" not in _reports(job, probe):
        raise Failure("the sanitizer does not see what is wrong")
    env["MRELEASE_REQUIRE"] = pythons.REQUIRED
    try:
        pythons.tests(job, python, venv, env, *(job.args or TSAN_TESTS))
    finally:
        # Of more weight than a test that fails by the descriptor of the report.
        found = _reports(job, job.work / "reports").count("WARNING: ThreadSanitizer")
        if found:
            raise Failure(f"{found} reports of ThreadSanitizer")


def _reports(job: Job, folder: Path) -> str:
    text = "".join(path.read_text() for path in sorted(folder.iterdir()))
    job.say(text)
    return text


def _broken(
    job: Job, python: pythons.Python, source: str, flags: str, env: dict[str, str]
) -> int:
    """Call what a sanitizer has to see; return the exit status."""
    (job.work / "broken.c").write_text(source)
    library = job.work / "broken.so"
    command = ["gcc", *flags.split(), "-shared", "-fPIC", "-o", library]
    if python.run(job, *command, job.work / "broken.c"):
        raise Failure("the probe cannot be compiled")
    program = f"import ctypes; ctypes.CDLL({str(library)!r}).broken()"
    return python.run(job, python.path, "-c", program, env=env)


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
            "--check-level=exhaustive",
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
