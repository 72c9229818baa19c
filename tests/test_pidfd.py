"""Pidfd: what it opens, what it refuses, and that it owns its descriptor."""

from __future__ import annotations

import asyncio
import copy
import errno
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import threading
from typing import Any

import psutil
import pytest

import victims
from calls import errno_of, opened, run_python
from mrelease import PIDFD_THREAD, Pidfd, pidfd_open


class Process:
    """As process objects look to us."""

    def __init__(self, pid: Any, **says: object) -> None:
        self.pid = pid
        vars(self).update(says)


# ---- Targets


def test_a_pid_is_opened() -> None:
    with Pidfd.open(os.getpid()) as pidfd:
        assert pidfd.pid == os.getpid()
        assert pidfd.fileno() > 2
        assert not pidfd.exited


def test_process_objects_are_opened() -> None:
    with victims.victim(1) as victim:
        targets: list[Any] = [victim.process, psutil.Process(victim.pid)]
        for target in (*targets, Process(victim.pid)):
            with Pidfd.open(target) as pidfd:
                assert pidfd.pid == victim.pid


def test_a_multiprocessing_process_is_opened() -> None:
    process = multiprocessing.get_context("fork").Process(target=signal.pause)
    with pytest.raises(ValueError, match="has not been started"):
        Pidfd.open(process)
    process.start()
    try:
        with Pidfd.open(process) as pidfd:
            pidfd.send_signal(signal.SIGKILL)
            assert pidfd.wait()
    finally:
        process.kill()
        process.join()
    with pytest.raises(ProcessLookupError, match=str(process.pid)):
        Pidfd.open(process)
    process.close()


def test_an_asyncio_process_is_opened() -> None:
    async def run() -> None:
        process = await asyncio.create_subprocess_exec("sleep", "100")
        with Pidfd.open(process) as pidfd:
            pidfd.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL
        with pytest.raises(ProcessLookupError, match=str(process.pid)):
            Pidfd.open(process)

    asyncio.run(run())


@pytest.mark.parametrize("first", [0, 1])
def test_two_pidfds_share_a_descriptor_until_both_are_closed(first: int) -> None:
    one = Pidfd.open(os.getpid())
    both = [one, Pidfd.open(one)]
    fd = one.fileno()
    assert both[1].fileno() == fd
    assert not os.get_inheritable(fd)
    both.pop(first).close()
    (left,) = both
    assert left.pid == os.getpid()
    assert not left.exited
    left.close()
    left.close()
    assert errno_of(os.fstat, fd) == errno.EBADF


def test_one_that_refuses_to_share_leaves_the_first_open() -> None:
    with Pidfd.open(os.getpid()) as first:
        with pytest.raises(ProcessLookupError, match="not the one meant"):
            Pidfd.open(first, verify=lambda _: False)
        with Pidfd.open(first, verify=lambda _: True) as second:
            first.close()
            assert not second.exited
        with pytest.raises(ValueError, match="closed"):
            Pidfd.open(first)


def test_whoever_has_been_reaped_is_refused_though_the_pid_lives() -> None:
    with victims.victim(1) as victim:
        says: dict[str, Any]
        for says in (
            {"returncode": 0},
            {"exitcode": -9},
            {"is_running": lambda: False},
        ):
            with pytest.raises(ProcessLookupError, match="has been reaped"):
                Pidfd.open(Process(victim.pid, **says))
        for says in (
            {"returncode": None},
            {"exitcode": None},
            {"is_running": lambda: True},
        ):
            Pidfd.open(Process(victim.pid, **says)).close()


def test_a_childs_object_is_refused_if_it_is_of_no_child() -> None:
    command = ["sh", "-c", "sleep 1000 & echo $!; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        with Pidfd.open(pid) as pidfd:
            try:
                with pytest.raises(ProcessLookupError, match="this process's child"):
                    Pidfd.open(Process(pid, returncode=None))
                Pidfd.open(Process(pid, exitcode=None)).close()
                assert not pidfd.exited
            finally:
                pidfd.send_signal(signal.SIGKILL)


def test_a_childs_object_is_taken_by_a_child_that_was_forked_later() -> None:
    with victims.victim(1) as victim:
        found = victims.apart(lambda: pid_of(Process(victim.pid, returncode=None)))
        assert found == victim.pid


def pid_of(target: Any) -> int:
    with Pidfd.open(target) as pidfd:
        return pidfd.pid


def test_a_popen_that_was_waited_for_is_refused() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(ProcessLookupError):
        Pidfd.open(process)


# ---- verify


def test_verify_is_asked_and_decides() -> None:
    with victims.victim(1) as victim:
        Pidfd.open(victim.pid, verify=lambda pid: pid == victim.pid).close()
        with pytest.raises(ProcessLookupError, match="not the one meant"):
            Pidfd.open(victim.pid, verify=lambda pid: False)


def test_a_process_that_ends_during_verify_is_refused() -> None:
    with victims.victim(1) as victim:

        def verify(pid: int) -> bool:
            victim.kill()
            victim.reap()
            return True

        with pytest.raises(ProcessLookupError, match="has exited"):
            Pidfd.open(victim.pid, verify=verify)


def test_an_exception_of_verify_passes_through() -> None:
    def verify(pid: int) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Pidfd.open(os.getpid(), verify=verify)


# ---- What is refused


@pytest.mark.parametrize("target", [0, -1, -(2**31)])
def test_a_pid_must_be_positive(target: int) -> None:
    with pytest.raises(ValueError, match=f"a pid must be positive, not {target}"):
        Pidfd.open(target)


@pytest.mark.parametrize("target", [2**31, 2**64, -(2**64)])
def test_a_huge_pid_is_refused(target: int) -> None:
    with pytest.raises((OverflowError, ValueError), match="pid must be"):
        Pidfd.open(target)


@pytest.mark.parametrize(
    "target", [True, False, 1.5, "1", None, b"1", [1], Process("1")]
)
def test_what_is_no_target_is_refused_by_name(target: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(target).__name__}"):
        Pidfd.open(target)


def test_a_reaped_pid_is_no_process() -> None:
    pid = victims.reaped_pid()
    with pytest.raises(ProcessLookupError, match=str(pid)) as caught:
        Pidfd.open(pid)
    assert caught.value.errno == errno.ESRCH


def test_a_threads_id_is_refused_with_the_name_of_its_process() -> None:
    with victims.victim(1, threads=2) as victim:
        (tid,) = set(victim.threads()) - {victim.pid}
        with pytest.raises(ValueError, match=f"{tid} .* of process {victim.pid}"):
            Pidfd.open(tid)


def test_without_descriptors_it_is_emfile() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with victims.victim(1) as victim, Pidfd.open(victim.pid) as pidfd:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            assert errno_of(Pidfd.open, victim.pid) == errno.EMFILE
            Pidfd.open(pidfd).close()  # needs none
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- Taking over a descriptor


def test_a_descriptor_is_taken_over_with_its_pid() -> None:
    with victims.victim(1) as victim:
        fd = pidfd_open(victim.pid)
        with Pidfd(fd) as pidfd:
            assert pidfd.pid == victim.pid
            assert pidfd.fileno() == fd
    assert errno_of(os.fstat, fd) == errno.EBADF


def test_the_descriptor_of_a_reaped_process_has_no_pid() -> None:
    with victims.zombie() as victim, opened(victim.pid) as fd:
        victim.reap()
        with Pidfd(os.dup(fd)) as pidfd:
            assert pidfd.pid == -1
            assert pidfd.exited
            with pytest.raises(ProcessLookupError):
                pidfd.send_signal(0)


def test_a_file_is_not_taken_over() -> None:
    with open(__file__) as file:
        with pytest.raises(OSError, match="is not a pidfd") as caught:
            Pidfd(file.fileno())
        assert caught.value.errno == errno.EBADF
        os.fstat(file.fileno())  # still its owner's


@pytest.mark.parametrize("fd", [-1, 9999])
def test_a_closed_descriptor_is_not_taken_over(fd: int) -> None:
    assert errno_of(Pidfd, fd) == errno.EBADF


@pytest.mark.parametrize("fd", ["3", None, 1.0])
def test_what_is_no_descriptor_is_not_taken_over(fd: Any) -> None:
    with pytest.raises(TypeError):
        Pidfd(fd)


def test_the_descriptor_of_a_thread_is_not_taken_over() -> None:
    try:
        fd = pidfd_open(threading.get_native_id(), PIDFD_THREAD)
    except OSError as error:
        assert error.errno == errno.EINVAL
        pytest.skip("needs PIDFD_THREAD of Linux 6.9")
    try:
        with pytest.raises(ValueError, match="of a thread"):
            Pidfd(fd)
    finally:
        os.close(fd)


# ---- Waiting and signalling


def test_exited_and_wait_tell_the_exit_and_do_not_reap() -> None:
    with victims.victim(1) as victim, Pidfd.open(victim.pid) as pidfd:
        assert not pidfd.exited
        assert not pidfd.wait(0)
        assert not pidfd.wait(0.001)
        pidfd.send_signal(signal.SIGKILL)
        assert pidfd.wait()
        assert pidfd.wait(float("inf"))
        assert pidfd.exited
        assert victim.exited()  # a zombie: still there for its parent
        victim.reap()
        assert pidfd.exited


def test_a_very_long_wait_fits_the_kernel() -> None:
    with victims.zombie() as victim, Pidfd.open(victim.pid) as pidfd:
        assert pidfd.wait(1e300)


@pytest.mark.parametrize("timeout", [-1, -0.001, float("nan"), float("-inf")])
def test_a_timeout_must_not_be_negative_or_nan(timeout: float) -> None:
    with (
        Pidfd.open(os.getpid()) as pidfd,
        pytest.raises(ValueError, match="timeout must be zero or more"),
    ):
        pidfd.wait(timeout)


def test_a_timeout_must_be_a_number() -> None:
    timeout: Any = "1"
    with (
        Pidfd.open(os.getpid()) as pidfd,
        pytest.raises(TypeError, match="timeout must be a number of seconds, not str"),
    ):
        pidfd.wait(timeout)


@pytest.mark.parametrize("sig", [-1, 65, 1000, 2**31 - 1])
def test_a_signal_out_of_range_is_named(sig: int) -> None:
    if sig == 65 and signal.NSIG > 65:
        pytest.skip("needs an architecture with 64 signals")
    with (
        Pidfd.open(os.getpid()) as pidfd,
        pytest.raises(ValueError, match=f"{sig} is not a signal number"),
    ):
        pidfd.send_signal(sig)


@pytest.mark.parametrize("sig", ["9", 9.0, None])
def test_a_signal_must_be_an_int(sig: Any) -> None:
    with Pidfd.open(os.getpid()) as pidfd, pytest.raises(TypeError):
        pidfd.send_signal(sig)


def test_the_cgroup_id_is_the_inode_of_the_cgroup_directory() -> None:
    with Pidfd.open(os.getpid()) as pidfd:
        try:
            cgroup_id = pidfd.cgroup_id()
        except OSError as error:
            assert error.errno in (errno.ENOTTY, errno.EINVAL)
            pytest.skip("needs PIDFD_GET_INFO of Linux 6.13")
    mount = _cgroup2_mount()
    with open("/proc/self/cgroup") as file:
        (path,) = [line[3:].strip() for line in file if line.startswith("0::")]
    assert cgroup_id == os.stat(mount + path).st_ino


def _cgroup2_mount() -> str:
    with open("/proc/self/mountinfo") as file:
        for line in file:
            if " - cgroup2 " in line:
                return line.split()[4]
    pytest.skip("needs cgroup v2")


def test_the_cgroup_id_of_a_reaped_process_is_an_error() -> None:
    with victims.zombie() as victim, Pidfd.open(victim.pid) as pidfd:
        victim.reap()
        older = errno.ENOTTY, errno.EINVAL
        assert errno_of(pidfd.cgroup_id) in (errno.ESRCH, *older)


# ---- Ownership


def test_a_closed_pidfd_says_so() -> None:
    with victims.victim(1) as victim:
        pidfd = Pidfd.open(victim.pid)
        pidfd.close()
        pidfd.close()
        assert repr(pidfd) == f"<Pidfd pid={victim.pid} closed>"
        for use in (
            pidfd.fileno,
            pidfd.wait,
            lambda: pidfd.exited,
            lambda: pidfd.send_signal(0),
            pidfd.kill,
            pidfd.terminate,
            pidfd.release,
            pidfd.cgroup_id,
            lambda: Pidfd.open(pidfd),
        ):
            with pytest.raises(ValueError, match="closed Pidfd"):
                use()


def test_a_descriptor_closed_behind_its_back_is_no_exit() -> None:
    pidfd = Pidfd.open(os.getpid())
    os.close(pidfd.fileno())
    with pytest.raises(OSError, match="closed outside its Pidfd"):
        pidfd.wait(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        pidfd.close()


def test_an_open_pidfd_that_is_collected_warns_and_closes() -> None:
    with pytest.warns(ResourceWarning, match="unclosed <Pidfd pid="):
        Pidfd.open(os.getpid())
        gc.collect()


def test_it_cannot_be_copied_or_pickled() -> None:
    with Pidfd.open(os.getpid()) as pidfd:
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot copy or pickle"):
                make(pidfd)


def test_a_wrong_call_leaves_nothing_to_collect() -> None:
    with pytest.raises(TypeError):
        Pidfd()  # type: ignore[call-arg]


def test_its_repr_names_pid_and_descriptor() -> None:
    with Pidfd.open(os.getpid()) as pidfd:
        assert repr(pidfd) == f"<Pidfd pid={os.getpid()} fd={pidfd.fileno()}>"


def test_it_works_where_stdin_is_descriptor_zero_no_more() -> None:
    program = "import os; os.close(0); from mrelease import Pidfd; p = Pidfd.open(1)\n"
    result = run_python(program + "assert p.fileno() == 0; p.exited; p.close()")
    assert (result.returncode, result.stderr) == (0, "")
