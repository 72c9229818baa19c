"""What every test relies on: requirements that CI can insist on, and no leaks."""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

import cgroups
import victims
from mrelease import _batch, _groups, process_mrelease


def _why_no(command: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(command) else f"needs {command}"


def _why_no_seccomp() -> str | None:
    try:
        import pyseccomp  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: no libseccomp
        return f"needs pyseccomp: {error}"
    return None


def _why_no_release() -> str | None:
    try:
        process_mrelease(-1)
    except OSError as error:
        if error.errno != errno.EBADF:
            return f"needs process_mrelease(2): {error.strerror}"
    return None


def _why_no_small_pids() -> str | None:
    # Asked first: on an older kernel the limit would be the whole machine's.
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (6, 14):
        return "needs a pid_max of each pid namespace, of Linux 6.14"
    script = "echo 400 > /proc/sys/kernel/pid_max"
    unshare = ["unshare", "-pf", "--mount-proc", "sh", "-c", script]
    try:
        result = subprocess.run(unshare, capture_output=True, text=True)
    except FileNotFoundError:
        return "needs unshare"
    return f"needs a pid namespace: {result.stderr}" if result.returncode else None


def _why_no_debug_build() -> str | None:
    return None if hasattr(sys, "gettotalrefcount") else "needs a debug build"


def _why_no_testcapi() -> str | None:
    return None if importlib.util.find_spec("_testcapi") else "needs _testcapi"


def _why_no_uvloop() -> str | None:
    try:
        import uvloop  # noqa: F401
    except ImportError as error:  # of its own, or of what it needs
        return f"needs uvloop: {error}"
    return None


def _why_no_package(module: str, extra: str) -> Callable[[], str | None]:
    def why() -> str | None:
        if importlib.util.find_spec(module):
            return None
        return f"needs {module}: pip install 'mrelease[{extra}]'"

    return why


def _why_no_policies() -> str | None:
    try:
        os.sched_getscheduler(0)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return "needs a C library with sched_setscheduler()"
    return None


def _why_no_subinterpreters() -> str | None:
    return None if sys.version_info >= (3, 12) else "needs Python 3.12"


# What a test may need: @pytest.mark.needs("root", ...). MRELEASE_REQUIRE names those
# that must be there: a test that lacks one fails instead of being skipped.
REASONS: dict[str, Callable[[], str | None]] = {
    "cc": _why_no("cc"),
    "celery": _why_no_package("celery", "integrations"),
    "cgroup1": cgroups.why_no_cgroup1,
    "cgroup2": cgroups.why_no_cgroup2,
    "cpus": victims.why_not_two_cpus,
    "dask": _why_no_package("distributed", "dask"),
    "debug": _why_no_debug_build,
    "freezer": victims.why_no_freezer,
    "fuse": victims.why_no_fuse,
    "gunicorn": _why_no_package("gunicorn", "integrations"),
    "joblib": _why_no_package("joblib", "integrations"),
    "jupyterhub": _why_no_package("jupyterhub", "integrations"),
    "memcg": cgroups.why_no_memcg,
    "mount": _why_no("mount"),
    "pidns": _why_no_small_pids,
    "pids": cgroups.why_no_pids,
    "policies": _why_no_policies,
    "release": _why_no_release,
    "root": victims.why_not_root,
    "seccomp": _why_no_seccomp,
    "strace": _why_no("strace"),
    "subinterpreters": _why_no_subinterpreters,
    "supervisor": _why_no_package("supervisor", "integrations"),
    "testcapi": _why_no_testcapi,
    "unshare": _why_no("unshare"),
    "uvloop": _why_no_uvloop,
}
REQUIRED = set(filter(None, os.environ.get("MRELEASE_REQUIRE", "").split(",")))


@functools.cache
def _why_not(name: str) -> str | None:
    return REASONS[name]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="the tests marked long as well, and the full numbers of the others",
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell's background job ignores SIGINT, and so would the commands tested.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "needs(*names): skip without these: conftest.py")
    config.addinivalue_line("markers", "long: only with --long")
    if unknown := REQUIRED - REASONS.keys():
        raise pytest.UsageError(f"MRELEASE_REQUIRE: unknown {', '.join(unknown)}")


def pytest_report_header() -> str:
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return (
        f"Linux {os.uname().release}, uid {os.geteuid()}, GIL {'on' if gil else 'off'}"
    )


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if config.getoption("long"):
        return
    long = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the sums of what tests have counted; the matrix reads the lines."""
    figures: dict[str, int] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            assert isinstance(value, int)
            figures[name] = figures.get(name, 0) + value
    for name, total in figures.items():
        terminalreporter.write_line(f"@@ figure {name} {total}")


@pytest.fixture(params=[True, False], ids=["idle", "busy"])
def idle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to kill many: as if there were idle CPUs, and as if there were none."""
    found: bool = request.param
    for module in (_batch, _groups):
        monkeypatch.setattr(module, "has_idle_cpu", lambda pids: found)
    return found


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the full numbers are wanted."""
    return bool(request.config.getoption("long"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            if reason := _why_not(name):
                if name in REQUIRED:
                    pytest.fail(f"{reason}, and MRELEASE_REQUIRE demands it")
                pytest.skip(reason)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No test leaves a descriptor, a child process, or its affinity changed."""
    before = _descriptors(), os.sched_getaffinity(0)
    yield
    assert (_descriptors(), os.sched_getaffinity(0)) == before
    with pytest.raises(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)


def _descriptors() -> set[str]:
    listed = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            listed.add(f"{name} -> {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # the one that listed them
    return listed
