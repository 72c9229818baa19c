"""Where /proc is missing or another namespace's: kills work, no stranger is touched."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calls import run_python
from mrelease import _proc

pytestmark = pytest.mark.needs("mount", "root", "unshare")

# Without victims.py, which needs /proc.
PRELUDE = """
import errno, json, os
from mrelease import *
from mrelease import _proc

def child():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    return pid

victim = child()
"""

# An empty file system over /proc; private, or it would be mounted outside as well.
HIDE = 'mount --make-private /proc && mount -t tmpfs none /proc && exec "$0" "$@"'
NO_PROC = ("unshare", "--mount", "--propagation=unchanged", "sh", "-c", HIDE)
FOREIGN_PROC = ("unshare", "--pid", "--fork")


UNDER = {"no /proc": NO_PROC, "a foreign /proc": FOREIGN_PROC}


def answer(program: str, under: tuple[str, ...]) -> Any:
    result = run_python(PRELUDE + program, under=under)
    assert (result.returncode, result.stderr) == (0, "")
    return json.loads(result.stdout)


@pytest.fixture(params=UNDER)
def under(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return UNDER[request.param]


def test_this_tests_proc_is_its_own() -> None:
    assert _proc.is_ours()


def test_it_is_not_believed_and_the_kill_works(under: tuple[str, ...]) -> None:
    program = """
result = kill(victim, wait=True, timeout=None, measure=True)
status = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
print(json.dumps([_proc.is_ours(), result.exited, result.signal, status]))
"""
    assert answer(program, under) == [False, True, 9, -9]


def test_no_stranger_is_boosted_or_barred() -> None:
    # The pids that this namespace knows are processes outside in its /proc. Whom its
    # threads' ids mean here is the caller itself, pid 1 of the namespace.
    program = """
os.setpriority(os.PRIO_PROCESS, 0, 5)
stranger = child()
os.sched_setaffinity(stranger, {min(os.sched_getaffinity(0))})
before = os.sched_getaffinity(stranger), os.getpriority(os.PRIO_PROCESS, stranger)
for _ in range(20):
    one = child()
    kill(one, wait=True, timeout=None)
    os.waitpid(one, 0)
after = os.sched_getaffinity(stranger), os.getpriority(os.PRIO_PROCESS, stranger)
own = os.getpriority(os.PRIO_PROCESS, 0)
for pid in (victim, stranger):
    os.kill(pid, 9)
    os.waitpid(pid, 0)
print(json.dumps([before == after, own]))
"""
    assert answer(program, FOREIGN_PROC) == [True, 5]


def test_a_living_process_is_alive_not_busy(under: tuple[str, ...]) -> None:
    program = """
outcome = release(victim).outcome if is_supported() else "alive"
os.kill(victim, 9)
os.waitpid(victim, 0)
print(json.dumps(outcome))
"""
    assert answer(program, under) == "alive"


def test_a_descriptor_without_a_pid_to_be_told_is_refused(
    under: tuple[str, ...],
) -> None:
    program = """
fd = pidfd_open(victim)
try:
    Pidfd(fd)
except OSError as error:
    code = error.errno
os.kill(victim, 9)
os.waitpid(victim, 0)
print(json.dumps(code == errno.ENOSYS))
"""
    assert answer(program, under) is True


def test_the_probe_and_the_command_work(under: tuple[str, ...]) -> None:
    program = """
from mrelease._cli import main
found = probe()
status = main(["kill", "--wait", "--json", str(victim)])
os.waitpid(victim, 0)
print(json.dumps([found["pidfd_open"], status]))
main(["doctor", "--json"])
"""
    result = run_python(PRELUDE + program, under=under)
    killed, found, report = map(json.loads, result.stdout.splitlines())
    assert (killed["exited"], killed["signal"]) == (True, 9)
    assert found == [True, 0]
    assert report["proc"] is False
    assert "mount -t proc" in report["advice"]["proc"]
    for name in ("CAP_KILL", "seccomp"):
        assert (report[name] == "unknown") is (under is NO_PROC)
    assert ("CAP_KILL" in report["advice"]) is (report["CAP_KILL"] is False)
    assert result.stderr == ""
