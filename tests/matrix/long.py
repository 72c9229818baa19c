"""The long runs of fuzz, faults and endurance: on this kernel, as root.

They run in a pid namespace of their own: whatever they do, nobody else can be meant,
and looking at every process there is does not take long.
"""

from __future__ import annotations

import shutil

from matrix import pythons
from matrix.base import Job, Skip
from matrix.pythons import Python

APART = ("unshare", "-pf", "--mount-proc", "--kill-child")
# The first process of a namespace, which is exempt from signals, is not the tests'.
KEEP = ("sh", "-c", '"$@"; exit $?', "sh")
REQUIRED = "cgroup1,cgroup2,cpus,release,root,seccomp,strace,testcapi,unshare"


def run(job: Job, python: Python, expected: str, own: bool, *tests: str) -> None:
    if not shutil.which("unshare"):
        raise Skip("needs unshare")
    venv = pythons.prepared(job, python, expected, own=own)
    before = job.log.tell()
    status = python.run(
        job,
        *(*APART, *KEEP, venv / "bin/python", "-P", "-m", "pytest", "-q", "--long"),
        *("-p", "no:cacheprovider", *(job.args or tests)),
        cwd=job.work / "checkout",
        env={"MRELEASE_REQUIRE": REQUIRED},
    )
    label = "debug" if own else "plain"
    job.counted(label, job.logged(before), status)


def plain(job: Job, *tests: str) -> None:
    python = pythons.installed("3.11") or pythons.packaged(job, "3.11")
    if not python:
        raise Skip("no Python 3.11 installed, or in Debian")
    run(job, python, "gil and abi3 and not debug", False, *tests)


def fuzz(job: Job) -> None:
    plain(job, "tests/test_fuzz.py")


def faults(job: Job) -> None:
    hostile = "tests/test_hostile.py"
    plain(job, "tests/test_faults.py", "tests/test_fault_matrix.py", hostile)
    # A debug build sees what an ordinary one may survive.
    python = pythons.packaged(job, "3.11", debug=True)
    if not python:
        raise Skip("no python3.11-dbg in Debian")
    run(job, python, "gil and debug", True, hostile, "-k", "allocation")


def endurance(job: Job) -> None:
    plain(job, "tests/test_endurance.py")
