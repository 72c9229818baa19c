"""The whole suite, as root, on every CPython: installed here, Debian's, or compiled.

Pythons with a GIL share one wheel, made on the oldest. Free-threaded ones, which have
no stable ABI in common with them, and debug builds get their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matrix import debian, project
from matrix.base import CACHE, PYTEST, Failure, Job, Skip

# Tests may not be skipped for lack of these: they are the runner's to provide.
REQUIRED = os.environ.get("MRELEASE_REQUIRE", "cpus,mount,root,seccomp,strace,unshare")

SUITES = ("bookworm", "trixie", "sid")
COMPILE = ["gcc", "libc6-dev", "libffi-dev", "libssl-dev", "make", "zlib1g-dev"]
NEEDED = ["gcc", "libc6-dev", "netbase"]
QUICK = ["-q", "--disable-test-modules"]  # how a Python is configured


@dataclass
class Python:
    path: str
    root: Path | None = None  # a Debian to run it in
    under: tuple[str, ...] = ()  # a command that runs a command

    def run(
        self,
        job: Job,
        *words: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        if self.root:
            return debian.chroot(
                job, self.root, *words, cwd=cwd, env=env, under=self.under
            )
        return job.run(*words, cwd=cwd, env=env)


def installed(version: str) -> Python | None:
    """On the search path or among pyenv's; not all that pyenv puts there works."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    plain = version.rstrip("t")
    free = "t" if version != plain else ""
    for path in (
        Path(f"python{version}"),
        *versions.glob(f"{plain}.*{free}/bin/python3"),
    ):
        program = (
            "import ctypes, ensurepip, sysconfig, venv;"
            "print(sysconfig.get_python_version(),"
            " sysconfig.get_config_var('Py_GIL_DISABLED') or 0,"
            " sysconfig.get_config_var('Py_DEBUG') or 0)"
        )
        try:
            says = subprocess.run([path, "-c", program], capture_output=True, text=True)
        except OSError:
            continue
        if says.stdout.split() == [plain, "1" if free else "0", "0"]:
            return Python(str(path))
    return None


def packaged(job: Job, version: str, *, debug: bool = False) -> Python | None:
    packages = [f"python{version}", f"python{version}-venv"]
    packages += [f"python{version}-dev", f"python{version}-dbg"] if debug else []
    for suite in SUITES:
        if debian.Suite(job, suite).has(packages):
            root = debian.root(job, suite, [*packages, *NEEDED])
            return Python(packages[-1 if debug else 0], root)
    return None


def compiled(
    job: Job, version: str, *options: str, under: tuple[str, ...] = ()
) -> Python | None:
    """From Debian's source package; under: a command to run it by, and to build it."""
    for suite in SUITES:
        apt = debian.Suite(job, suite)
        if not apt.has([f"python{version}"]):
            continue
        root = debian.root(job, suite, [*COMPILE, *NEEDED])
        prefix = CACHE / "cpython" / "-".join([version, *options]).replace("---", "-")
        with debian.locked(prefix.name):
            if not (prefix / "bin/python3").exists():
                shutil.rmtree(prefix, ignore_errors=True)
                shell = Python("sh", root, under)
                build(job, apt, shell, prefix, f"python{version}", [*QUICK, *options])
        return Python(str(prefix / "bin/python3"), root, under)
    return None


def build(
    job: Job,
    apt: debian.Suite,
    shell: Python,
    prefix: Path,
    package: str,
    options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> None:
    """Compile a source package of Debian's, and install it."""
    with tempfile.TemporaryDirectory(dir=job.work) as name:
        folder = Path(name)
        words = ["-qq", "source", "--download-only", package]
        if job.run("apt-get", *apt.options(), *words, cwd=folder):
            raise Skip(f"no source of {package} to be had of Debian {apt.name}")
        found = folder.glob("*.orig.tar.*")
        (source,) = (path for path in found if path.suffix != ".asc")
        job.must("tar", "-xf", source, "--strip-components=1", cwd=folder)
        script = (
            './configure --prefix="$0" "$@" > configure.log'
            ' && make -s -j"$(nproc)" > make.log && make -s install > install.log'
        )
        words = [shell.path, "-c", script, str(prefix), *options]
        if shell.run(job, *words, cwd=folder, env=env):
            shutil.rmtree(prefix, ignore_errors=True)
            raise Failure(f"{package} cannot be compiled")


# Prints what it runs on; fails if it is not what the cell is about.
CHECK = """
import platform, sys, sysconfig
import mrelease
from mrelease import _mrelease
gil = getattr(sys, "_is_gil_enabled", lambda: True)()
debug = hasattr(sys, "gettotalrefcount")
abi3 = _mrelease.__file__.endswith(".abi3.so")
print("@@ python", platform.python_version(), "free-threaded" if not gil else "",
      "debug" if debug else "")
print("@@ extension", _mrelease.__file__.rpartition("/")[2])
assert mrelease.__file__.startswith(sys.prefix), mrelease.__file__
assert {expected}, (gil, debug, abi3)
"""


def prepared(
    job: Job,
    python: Python,
    expected: str,
    *,
    own: bool,
    build: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
) -> Path:
    """Install the wheel and what its tests need; check what it is; its environment.

    build and env: environment variables for that, and for running what it is.
    """
    venv = job.work / f"venv{len(job.runs)}"
    checkout = project.copy(job)
    what = "." if own else str(project.wheel(job))
    installs = [venv / "bin/python", "-m", "pip", "-q", "install"]
    for words in (
        [python.path, "-m", "venv", venv],
        [*installs, f"{what}[test]"],
    ):
        if python.run(job, *words, cwd=checkout, env=build):
            raise Failure("the project cannot be installed")
    shutil.rmtree(checkout / "build", ignore_errors=True)
    check(job, python, venv, expected, env)
    return venv


def check(
    job: Job,
    python: Python,
    venv: Path,
    expected: str,
    env: Mapping[str, str] | None = None,
) -> None:
    """Note what was installed; fail if it is not what the cell is about."""
    before = job.log.tell()
    program = CHECK.format(expected=expected)
    words = [venv / "bin/python", "-P", "-c", program]
    status = python.run(job, *words, cwd=job.work / "checkout", env=env)
    said = job.logged(before)
    for word in ("python", "extension"):
        if found := re.search(rf"^@@ {word} (.+)$", said, re.M):
            job.on[word] = " ".join(found[1].split())
    if status:
        raise Failure("it is not the Python or the extension that it should be")
    job.on["kernel"] = os.uname().release
    job.on["machine"] = os.uname().machine


def suite(
    job: Job, python: Python, expected: str, *, own: bool, required: str = REQUIRED
) -> None:
    """Prepare it, and run the whole suite."""
    venv = prepared(job, python, expected, own=own)
    tests(job, python, venv, {"MRELEASE_REQUIRE": required}, *job.args)


def tests(
    job: Job, python: Python, venv: Path, env: Mapping[str, str], *args: str
) -> None:
    before = job.log.tell()
    words = [venv / "bin/python", "-P", "-m", "pytest", "-q", *PYTEST, *args]
    status = python.run(job, *words, cwd=job.work / "checkout", env=env)
    job.counted("root" if os.geteuid() == 0 else "user", job.logged(before), status)


def plain(job: Job, version: str) -> None:
    python = installed(version) or packaged(job, version)
    if not python:
        raise Skip(f"no Python {version} installed, or in Debian {', '.join(SUITES)}")
    suite(job, python, "gil and abi3 and not debug", own=False)


def free_threaded(job: Job, version: str) -> None:
    python = installed(f"{version}t") or compiled(job, version, "--disable-gil")
    if not python:
        raise Skip(f"no Python {version}t installed, nor its source in Debian")
    suite(job, python, "not gil and not debug", own=True)


def debug(job: Job, version: str) -> None:
    python = packaged(job, version, debug=True)
    if not python:
        raise Skip(f"no python{version}-dbg in Debian {', '.join(SUITES)}")
    suite(job, python, "gil and debug", own=True, required=f"{REQUIRED},debug")
