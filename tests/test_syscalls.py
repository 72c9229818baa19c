"""The C functions against the real kernel: every row of their errno tables."""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading

import pytest

import victims
from calls import errno_of, killed_next, opened, run_python
from mrelease import (
    PIDFD_NONBLOCK,
    PIDFD_THREAD,
    _mrelease,
    kill_and_release,
    pidfd_open,
    pidfd_send_signal,
    process_mrelease,
)
from mrelease._mrelease import kill_and_release_next

needs_release = pytest.mark.needs("release")


# ---- process_mrelease: 0


@needs_release
@pytest.mark.parametrize("threads", [1, 8, 32])
def test_a_victim_in_its_exit_loses_its_memory_and_a_second_release_is_0(
    threads: int,
) -> None:
    with victims.exit_stopped(16, threads=threads) as victim, opened(victim.pid) as fd:
        held = victim.anon()
        assert held >= 16 << 20
        assert kill_and_release(fd) == 0
        assert errno_of(process_mrelease, fd) == 0
        assert victim.anon() == 0
        assert errno_of(process_mrelease, fd) == 0


@needs_release
def test_shared_memory_stays_though_the_release_is_0() -> None:
    with victims.exit_stopped(8, shared_mib=8) as victim, opened(victim.pid) as fd:
        assert kill_and_release(fd) == 0
        victim.wait_exit_stop()
        assert errno_of(process_mrelease, fd) == 0
        assert victim.anon() == 0
        assert victim.shared() >= 7 << 20  # of 8: see Victim._status


@needs_release
def test_a_dead_leader_is_released_through_its_living_thread() -> None:
    with victims.dead_leader(16) as victim, opened(victim.pid) as fd:
        assert victim.anon() >= 16 << 20
        assert kill_and_release(fd) == 0
        victim.wait_exit_stop()
        assert errno_of(process_mrelease, fd) == 0
        assert victim.anon() == 0


@needs_release
@pytest.mark.needs("freezer")
def test_a_frozen_victim_is_released_and_stays() -> None:
    with victims.frozen(16) as victim, opened(victim.pid) as fd:
        assert kill_and_release(fd) == 0
        assert errno_of(process_mrelease, fd) == 0
        assert victim.anon() == 0
        assert not victim.exited()


@needs_release
@pytest.mark.needs("fuse")
def test_a_victim_stuck_in_d_state_is_released_and_stays() -> None:
    with victims.stuck(16) as victim, opened(victim.pid) as fd:
        assert kill_and_release(fd) == 0
        assert victim.anon() == 0
        victim.wait_state("D")
        assert errno_of(process_mrelease, fd) == 0


@needs_release
@pytest.mark.needs("cpus")
@pytest.mark.parametrize(
    "policy", [pytest.param("idle", marks=pytest.mark.needs("policies")), "nice"]
)
def test_a_starved_victim_loses_at_least_half_its_memory(policy: str) -> None:
    with victims.starved(64, policy) as victim, opened(victim.pid) as fd:  # type: ignore[arg-type]
        held = victim.anon()
        assert kill_and_release(fd) in (0, errno.ESRCH)
        assert victim.anon() <= held / 2


# ---- process_mrelease: EINVAL


@needs_release
def test_flags_are_refused_before_the_descriptor_is_looked_at() -> None:
    assert errno_of(process_mrelease, -1, 1) == errno.EINVAL


@needs_release
def test_a_living_process_is_not_released() -> None:
    with victims.victim() as victim, opened(victim.pid) as fd:
        held = victim.anon()
        assert errno_of(process_mrelease, fd) == errno.EINVAL
        assert victim.anon() == held


@needs_release
def test_a_process_that_handles_sigterm_is_not_released() -> None:
    with victims.victim(sigterm="ignore") as victim, opened(victim.pid) as fd:
        pidfd_send_signal(fd, signal.SIGTERM)
        assert errno_of(process_mrelease, fd) == errno.EINVAL
        assert victim.anon()


@needs_release
def test_a_stopped_process_is_released_only_once_killed() -> None:
    with victims.victim() as victim, opened(victim.pid) as fd:
        victim.stop()
        assert errno_of(process_mrelease, fd) == errno.EINVAL
        assert kill_and_release(fd) in (0, errno.ESRCH)
        victim.reap()


@needs_release
def test_init_is_not_released() -> None:
    with opened(1) as fd:
        assert errno_of(process_mrelease, fd) in (errno.EINVAL, errno.ESRCH)


@needs_release
@pytest.mark.parametrize("sharer", ["clone", "vfork"])
def test_memory_shared_with_a_living_process_is_einval_until_that_is_killed(
    sharer: str,
) -> None:
    with (
        victims.exit_stopped(8, sharer=sharer) as victim,  # type: ignore[arg-type]
        opened(victim.pid) as fd,
    ):
        assert kill_and_release(fd) == errno.EINVAL
        victim.wait_exit_stop()
        assert errno_of(process_mrelease, fd) == errno.EINVAL
        assert victim.anon() >= 8 << 20
        victim.kill_sharer()
        assert errno_of(process_mrelease, fd) == 0
        assert victim.anon() == 0


# ---- process_mrelease: ESRCH, EBADF


@needs_release
def test_a_zombie_and_a_reaped_process_are_esrch() -> None:
    with victims.zombie() as victim, opened(victim.pid) as fd:
        assert errno_of(process_mrelease, fd) == errno.ESRCH
        assert kill_and_release(fd) == errno.ESRCH
        victim.reap()
        assert errno_of(process_mrelease, fd) == errno.ESRCH
        with pytest.raises(ProcessLookupError):
            kill_and_release(fd)


@needs_release
def test_after_its_exit_stop_a_victim_is_esrch() -> None:
    with victims.exit_stopped() as victim, opened(victim.pid) as fd:
        assert kill_and_release(fd) == 0
        victim.wait_exit_stop()
        victim.resume()
        assert errno_of(process_mrelease, fd) == errno.ESRCH


@needs_release
def test_a_kernel_thread_is_esrch() -> None:
    try:
        with open("/proc/2/comm") as comm:
            kthreadd = comm.read() == "kthreadd\n"
    except FileNotFoundError:
        kthreadd = False
    if not kthreadd:
        pytest.skip("needs the first pid namespace, where pid 2 is kthreadd")
    with opened(2) as fd:
        assert errno_of(process_mrelease, fd) == errno.ESRCH


@needs_release
def test_what_is_no_pidfd_is_ebadf() -> None:
    assert errno_of(process_mrelease, -1) == errno.EBADF
    with open(__file__) as file:
        assert errno_of(process_mrelease, file.fileno()) == errno.EBADF
        assert errno_of(kill_and_release, file.fileno()) == errno.EBADF
    directory = os.open("/proc/self", os.O_RDONLY)
    try:
        assert errno_of(process_mrelease, directory) == errno.EBADF
    finally:
        os.close(directory)


# ---- pidfd_open, pidfd_send_signal


def test_a_pidfd_is_close_on_exec_and_nonblocking_if_asked() -> None:
    with opened(os.getpid()) as fd, opened(os.getpid(), PIDFD_NONBLOCK) as nonblocking:
        assert not os.get_inheritable(fd)
        assert os.get_blocking(fd)
        assert not os.get_blocking(nonblocking)


def test_the_flags_are_the_kernels() -> None:
    assert PIDFD_NONBLOCK == os.O_NONBLOCK
    assert PIDFD_THREAD == os.O_EXCL


@pytest.mark.parametrize("pid", [0, -1])
def test_a_pid_that_is_not_positive_is_einval(pid: int) -> None:
    assert errno_of(pidfd_open, pid) == errno.EINVAL


def test_unknown_flags_are_einval() -> None:
    assert errno_of(pidfd_open, os.getpid(), 1) == errno.EINVAL


def test_a_reaped_pid_cannot_be_opened() -> None:
    # Kernels before 6.16 say EINVAL in the moment of the reaping.
    assert errno_of(pidfd_open, victims.reaped_pid()) in (errno.ESRCH, errno.EINVAL)


def test_a_zombie_can_be_opened_and_signalled_until_it_is_reaped() -> None:
    with victims.zombie() as victim, opened(victim.pid) as fd:
        pidfd_send_signal(fd, 0)
        pidfd_send_signal(fd, signal.SIGKILL)
        victim.reap()
        with pytest.raises(ProcessLookupError):
            pidfd_send_signal(fd, 0)


def test_a_signal_arrives() -> None:
    with victims.victim(sigterm="exit") as victim, opened(victim.pid) as fd:
        pidfd_send_signal(fd, signal.SIGTERM)
        victim.reap()
        assert victim.process.returncode == 0


def test_a_signal_out_of_range_is_einval() -> None:
    with opened(os.getpid()) as fd:
        assert errno_of(pidfd_send_signal, fd, 1000) == errno.EINVAL


@pytest.mark.needs("root")
def test_another_users_process_may_not_be_signalled() -> None:
    # In a child, because a thread that gives up root cannot have it back.
    with victims.victim() as victim:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setresuid(65534, 65534, 65534)
                with opened(victim.pid) as fd:
                    pidfd_send_signal(fd, 0)
            except PermissionError:
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- The caller's: getcpu, mlockall


def test_getcpu_says_where_the_thread_runs() -> None:
    before = os.sched_getaffinity(0)
    try:
        for cpu in before:
            os.sched_setaffinity(0, {cpu})
            assert _mrelease.getcpu() == cpu
    finally:
        os.sched_setaffinity(0, before)


def test_mlockall_refuses_no_flags() -> None:
    assert errno_of(_mrelease.mlockall, 0) == errno.EINVAL


def test_mlockall_locks_what_is_there() -> None:
    child = os.fork()  # so that the locking ends with the test
    if child == 0:
        code = 1
        try:
            _mrelease.mlockall(_mrelease.MCL_CURRENT | _mrelease.MCL_ONFAULT)
            with open("/proc/self/status") as status:
                locked = [
                    line.split()[1] for line in status if line.startswith("VmLck")
                ]
            code = 0 if int(locked[0]) > 0 else 1
        except OSError as error:
            # RLIMIT_MEMLOCK of an ordinary user.
            code = 0 if error.errno in (errno.ENOMEM, errno.EPERM) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# ---- The next one from a pipe


@needs_release
def test_a_thread_that_waits_kills_and_releases_what_comes_through_the_pipe() -> None:
    reader, writer = os.pipe()
    with (
        victims.exit_stopped(8) as one,
        victims.exit_stopped(8) as two,
        opened(one.pid) as first,
        opened(two.pid) as second,
    ):
        found: list[tuple[int, int, int]] = []
        thread = threading.Thread(
            target=lambda: found.extend(kill_and_release_next(reader) for _ in "123")
        )
        thread.start()
        for order in (first, -1, second):
            os.write(writer, struct.pack("=ii", order, 0))
        thread.join()
        assert found == [(first, 1, 0), (-1, 0, 0), (second, 1, 0)]
        assert one.anon() == two.anon() == 0
    os.write(writer, struct.pack("=i", 7))  # half an order
    os.close(writer)
    assert kill_and_release_next(reader) == (-1, 0, 0)
    assert kill_and_release_next(reader) == (-1, 0, 0)  # the end of the pipe
    os.close(reader)
    assert errno_of(kill_and_release_next, reader) == errno.EBADF


def test_one_from_the_pipe_that_cannot_be_killed_gives_the_errno() -> None:
    with opened(os.getpid()) as pidfd:
        pass
    assert killed_next(pidfd) == (pidfd, 0, errno.EBADF)


def test_waiting_for_the_pipe_a_signals_handler_is_run_and_may_raise() -> None:
    program = """
import os, signal
from mrelease import _mrelease

def handler(*_):
    seen.append(1)
    if len(seen) == 3:
        raise LookupError("raised by the handler")

seen = []
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
try:
    _mrelease.kill_and_release_next(os.pipe()[0])
except LookupError as error:
    print(error, len(seen))
"""
    result = run_python(program)
    assert (result.stdout, result.stderr) == ("raised by the handler 3\n", "")


# ---- The GIL


@needs_release
@pytest.mark.needs("fuse")
@pytest.mark.parametrize("call", [kill_and_release, process_mrelease])
def test_other_threads_run_while_a_release_is_blocked(call: object) -> None:
    assert callable(call)
    with victims.stuck_writer() as victim, opened(victim.pid) as fd:
        pidfd_send_signal(fd, signal.SIGKILL)
        ended = threading.Event()

        def release() -> None:
            try:
                call(fd)
            finally:
                ended.set()

        thread = threading.Thread(target=release)
        thread.start()
        # Nothing but this thread can end the release: with the GIL held, it never ends.
        for _ in range(100_000):
            assert not ended.is_set()
        victim.unstick()
        thread.join()
        assert ended.is_set()


@needs_release
def test_another_thread_sees_the_memory_shrink_while_it_is_released() -> None:
    """Seen in the middle of the call, which it can only be with the GIL released."""
    seen = set()
    for _ in range(10):
        with victims.exit_stopped(1024) as victim, opened(victim.pid) as fd:
            held = victim.anon()
            thread = threading.Thread(target=kill_and_release, args=(fd,))
            thread.start()
            while thread.is_alive():
                seen.add(victim.anon())
            thread.join()
        if any(held / 10 < size < held * 9 / 10 for size in seen):
            return
    pytest.fail(f"not seen in the middle of the release: {sorted(seen)}")
