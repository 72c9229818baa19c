"""kill, terminate, release: each outcome, made certain by the state of the victim."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import threading
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

import victims
from calls import errno_of
from mrelease import KillResult, Pidfd, _proc, kill, release, terminate

needs_release = pytest.mark.needs("release")
MIB = 1 << 20

# Of a plain sleeping victim either may be true: a race on every kernel.
RELEASED_OR_EXITED = ("released", "exited")


# ---- kill: outcomes


@needs_release
@pytest.mark.parametrize("boost", [True, False])
@pytest.mark.parametrize("threads", [1, 8])
def test_a_victim_in_its_exit_is_released(boost: bool, threads: int) -> None:
    with victims.exit_stopped(16, threads=threads) as victim:
        result = kill(victim.pid, boost=boost, measure=True)
        assert victim.anon() == 0
        assert (result.pid, result.outcome) == (victim.pid, "released")
        assert (result.released, result.exited) == (True, False)
        assert (result.signal, result.errno) == (signal.SIGKILL, 0)
        assert result.attempts == 1
        assert result.freed is not None
        assert 16 * MIB <= result.freed < 64 * MIB
        assert 0 < result.elapsed < 50


@needs_release
@pytest.mark.needs("freezer")
def test_a_frozen_victim_is_released_by_the_first_attempt() -> None:
    with victims.frozen(16) as victim:
        result = kill(victim.process, timeout=1, measure=True)
        assert (result.outcome, result.exited) == ("released", False)
        assert (result.attempts, result.errno) == (1, 0)
        assert result.freed is not None
        assert result.freed >= 16 * MIB
        victim.thaw()
        victim.reap()
        assert victim.process.returncode is not None


@needs_release
@pytest.mark.needs("fuse")
def test_a_victim_stuck_in_d_state_is_released_by_the_first_attempt() -> None:
    with victims.stuck(16) as victim:
        result = kill(victim.pid, timeout=1)
        assert (result.outcome, result.exited) == ("released", False)
        assert (result.attempts, result.errno) == (1, 0)


@needs_release
def test_with_wait_a_released_victim_that_stays_is_waited_for_until_the_timeout() -> (
    None
):
    with victims.exit_stopped() as victim:
        result = kill(victim.pid, wait=True, timeout=0.05)
        assert (result.outcome, result.exited) == ("released", False)
        assert result.elapsed >= 0.05


def test_a_sleeping_victim_is_gone_with_wait() -> None:
    with victims.victim(16) as victim:
        result = kill(victim.process, wait=True, timeout=None, measure=True)
        assert result.outcome in RELEASED_OR_EXITED
        assert result.released
        assert result.exited
        assert result.freed is not None
        assert result.freed >= 16 * MIB
        assert victim.process.wait() == -signal.SIGKILL


def test_a_stopped_victim_dies() -> None:
    with victims.victim() as victim:
        victim.stop()
        assert kill(victim.pid, wait=True, timeout=None).exited


def test_a_zombie_has_exited_and_is_not_reaped() -> None:
    with victims.zombie() as victim:
        result = kill(victim.process, measure=True)
        assert (result.outcome, result.released) == ("exited", True)
        assert result.errno in (errno.ESRCH, errno.ENOSYS)
        assert result.freed is None
        assert victim.exited()


@needs_release
@pytest.mark.parametrize("sharer", ["clone", "vfork"])
def test_memory_shared_with_a_living_process_is_busy_at_the_timeout(
    sharer: Any,
) -> None:
    with victims.exit_stopped(8, sharer=sharer) as victim:
        result = kill(victim.pid, timeout=0.05, measure=True)
        assert (result.outcome, result.released) == ("busy", False)
        assert (result.errno, result.freed) == (errno.EINVAL, 0)
        # With pauses of 1, 2, 4, 8, 16 and 32 ms there are no more.
        assert result.attempts <= 7


@needs_release
def test_memory_shared_with_a_living_process_is_released_once_that_has_ended() -> None:
    with victims.exit_stopped(8, sharer="clone") as victim:
        results: list[KillResult] = []
        thread = threading.Thread(
            target=lambda: results.append(kill(victim.pid, timeout=None))
        )
        thread.start()
        victim.wait_exit_stop()
        victim.kill_sharer()
        thread.join()
        assert results[0].outcome == "released"


@needs_release
def test_what_an_exit_has_left_to_a_living_process_is_not_called_freed() -> None:
    with victims.exit_stopped(8, sharer="clone") as victim:
        results: list[KillResult] = []
        thread = threading.Thread(
            target=lambda: results.append(kill(victim.pid, timeout=None, measure=True))
        )
        thread.start()
        victim.wait_exit_stop()
        victim.resume()
        thread.join()
        assert (results[0].outcome, results[0].freed) == ("exited", None)
        assert victim.sharer_pid


@needs_release
def test_a_dead_leaders_memory_is_measured_and_released() -> None:
    with victims.dead_leader(16) as victim:
        result = kill(victim.pid, measure=True)
        assert result.outcome == "released"
        assert result.freed is not None
        assert result.freed >= 16 * MIB


@needs_release
def test_a_timeout_of_0_is_one_attempt() -> None:
    with victims.exit_stopped(8, sharer="clone") as victim:
        result = kill(victim.pid, timeout=0)
        assert (result.outcome, result.attempts) == ("busy", 1)


# ---- kill: settle


def test_a_victim_that_exits_while_it_settles_is_not_released() -> None:
    with victims.victim() as victim:
        result = kill(victim.pid, settle=60, timeout=None)
        assert (result.outcome, result.attempts) == ("exited", 0)
        assert (result.errno, result.signal) == (0, signal.SIGKILL)


@needs_release
@pytest.mark.parametrize("timeout", [0.01, 1, None])
def test_a_victim_that_does_not_settle_is_released(timeout: float | None) -> None:
    with victims.exit_stopped() as victim:
        result = kill(victim.pid, settle=0.01, timeout=timeout)
        assert (result.outcome, result.attempts) == ("released", 1)


@needs_release
def test_a_victim_that_may_settle_beyond_the_timeout_is_not_released() -> None:
    for settle in (60, float("inf")):
        with victims.exit_stopped() as victim:
            result = kill(victim.pid, settle=settle, timeout=0.05)
            assert (result.outcome, result.released) == ("exiting", False)
            assert (result.attempts, result.errno) == (0, 0)
            assert victim.anon()


# ---- kill: what it refuses


def test_the_caller_is_not_killed() -> None:
    with pytest.raises(ValueError, match="refusing to kill the calling process"):
        kill(os.getpid())
    with Pidfd.open(os.getpid()) as pidfd, pytest.raises(ValueError, match="calling"):
        pidfd.terminate()


@pytest.mark.parametrize("function", [kill, terminate])
def test_init_is_not_killed(function: Any) -> None:
    with pytest.raises(ValueError, match="refusing to kill pid 1"):
        function(1)


@pytest.mark.parametrize("function", [kill, terminate, release])
@pytest.mark.parametrize("target", [0, -1, True, 1.5, "1", None, 2**64])
def test_what_is_no_target_is_refused(function: Any, target: Any) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError), match="pid"):
        function(target)


@pytest.mark.parametrize("function", [kill, terminate, release])
def test_a_threads_id_is_refused_and_its_process_lives(function: Any) -> None:
    with victims.victim(1, threads=2) as victim:
        (tid,) = set(victim.threads()) - {victim.pid}
        with pytest.raises(ValueError, match=f"{tid} .* of process {victim.pid}"):
            function(tid)
        assert victim.state() == "S"


@pytest.mark.parametrize("function", [kill, terminate, release])
def test_a_reaped_process_is_not_found(function: Any) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    for target in (process, process.pid):
        with pytest.raises(ProcessLookupError):
            function(target)


@pytest.mark.parametrize("name", ["timeout", "settle", "grace"])
@pytest.mark.parametrize(
    "value", [-1, -0.5, float("nan"), Decimal("NaN"), 10**400, "1", b"1", [1], 1j]
)
def test_seconds_are_checked_before_anything_is_done(name: str, value: Any) -> None:
    with victims.victim(1) as victim:
        function: Any = terminate if name == "grace" else kill
        errors = (TypeError, ValueError, OverflowError)
        with pytest.raises(errors, match=f"{name} (must be|is too large)"):
            function(victim.pid, **{name: value})
        assert victim.state() == "S"


@pytest.mark.parametrize("name", ["boost", "measure", "wait"])
def test_what_is_neither_true_nor_false_is_refused_before_anything_is_done(
    name: str,
) -> None:
    class Neither:
        def __bool__(self) -> bool:
            raise ZeroDivisionError

    with victims.victim(1) as victim:
        with pytest.raises(ZeroDivisionError):
            kill(victim.pid, **{name: Neither()})  # type: ignore[arg-type]
        assert victim.state() == "S"


@pytest.mark.parametrize("function", [kill, terminate, release])
def test_an_unknown_option_is_refused_before_anything_is_done(function: Any) -> None:
    with victims.victim(1) as victim:
        with pytest.raises(TypeError):
            function(victim.pid, tiemout=1)
        assert victim.state() == "S"


@pytest.mark.parametrize("sig", [0, -1, 1000])
def test_a_signal_out_of_range_is_refused_before_anything_is_done(sig: int) -> None:
    with victims.victim(1) as victim:
        with pytest.raises(ValueError, match=r"not .* number"):
            terminate(victim.pid, signal=sig)
        assert victim.state() == "S"


@pytest.mark.parametrize("sig", ["TERM", 15.0, None])
def test_a_signal_must_be_an_int(sig: Any) -> None:
    with victims.victim(1) as victim:
        with pytest.raises(TypeError, match="signal"):
            terminate(victim.pid, signal=sig)
        assert victim.state() == "S"


# ---- terminate


def test_whoever_obeys_is_not_killed() -> None:
    with victims.victim(16, sigterm="exit") as victim:
        result = terminate(victim.pid, grace=60, measure=True)
        assert (result.outcome, result.signal) == ("exited", signal.SIGTERM)
        assert (result.attempts, result.errno) == (0, 0)
        assert result.freed is not None
        assert result.freed >= 16 * MIB
        victim.reap()
        assert victim.process.returncode == 0


def test_whoever_ignores_sigterm_is_killed_and_released() -> None:
    with victims.victim(16, sigterm="ignore") as victim:
        result = terminate(victim.process, grace=0.2, wait=True, timeout=None)
        assert result.outcome in RELEASED_OR_EXITED
        assert (result.signal, result.exited) == (signal.SIGKILL, True)
        assert result.errno in (0, errno.ESRCH, errno.ENOSYS)
        assert result.elapsed >= 0.2
        assert victim.process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("grace", [0, 0.01, Fraction(1, 100), Decimal("0.01")])
def test_every_kind_of_number_is_a_time(grace: Any) -> None:
    with victims.victim(sigterm="ignore") as victim:
        result = terminate(victim.pid, grace=grace, settle=grace, wait=True, timeout=60)
        assert result.exited


@needs_release
def test_the_timeout_counts_from_the_sigkill() -> None:
    with victims.exit_stopped(8, sharer="clone") as victim:
        result = terminate(victim.pid, grace=0.05, timeout=0.05)
        assert (result.outcome, result.signal) == ("busy", signal.SIGKILL)
        assert result.elapsed >= 0.1


def test_another_signal_may_ask() -> None:
    with victims.victim(sigterm="ignore") as victim:
        result = terminate(victim.process, signal=signal.SIGINT, grace=60)
        assert (result.outcome, result.signal) == ("exited", signal.SIGINT)


# ---- release


@needs_release
def test_a_living_process_is_alive() -> None:
    with victims.victim() as victim:
        result = release(victim.pid)
        assert (result.outcome, result.released, result.exited) == (
            "alive",
            False,
            False,
        )
        assert (result.signal, result.errno) == (None, errno.EINVAL)
        assert result.attempts == 1
        assert release(victim.pid, timeout=0.01).outcome == "alive"
        assert victim.state() == "S"


@needs_release
def test_a_release_waits_for_the_kill_of_somebody_else() -> None:
    with victims.exit_stopped(16) as victim:
        results: list[KillResult] = []
        thread = threading.Thread(
            target=lambda: results.append(release(victim.pid, timeout=None))
        )
        thread.start()
        victim.kill()
        thread.join()
        assert results[0].outcome == "released"
        assert victim.anon() == 0


@needs_release
def test_whom_somebody_else_killed_is_released() -> None:
    with victims.exit_stopped(16) as victim:
        victim.kill()
        result = release(victim.pid)
        assert (result.outcome, result.signal) == ("released", None)
        assert victim.anon() == 0


@needs_release
def test_a_killed_process_that_shares_its_memory_is_busy_not_alive() -> None:
    with victims.exit_stopped(8, sharer="clone") as victim:
        victim.kill()
        assert release(victim.pid).outcome == "busy"
        victim.wait_exit_stop()
        assert release(victim.pid).outcome == "busy"


def test_a_kernel_thread_is_not_dying() -> None:
    if _proc.name(2) != "kthreadd":
        pytest.skip("needs the first pid namespace, where pid 2 is kthreadd")
    assert _proc.dying(2) is False
    assert _proc.is_kernel_thread(2)
    assert not _proc.is_kernel_thread(os.getpid())


@needs_release
def test_a_dead_leader_alone_is_not_dying() -> None:
    with victims.dead_leader() as victim:
        assert release(victim.pid).outcome == "alive"


def test_a_zombie_is_released_by_its_exit() -> None:
    with victims.zombie() as victim:
        result = release(victim.process)
        assert (result.outcome, result.released) == ("exited", True)


# ---- Pidfd's methods are the functions


def test_a_pidfd_kills_and_stays_open() -> None:
    with victims.victim() as victim, Pidfd.open(victim.pid) as pidfd:
        result = pidfd.kill(wait=True, timeout=None)
        assert (result.pid, result.exited) == (victim.pid, True)
        assert pidfd.release().outcome == "exited"
        victim.reap()
        with pytest.raises(ProcessLookupError):
            pidfd.kill()
        with pytest.raises(ProcessLookupError):
            pidfd.terminate(grace=0)


# ---- KillResult

RESULT = KillResult(
    pid=7,
    outcome="partial",
    released=False,
    exited=False,
    signal=9,
    errno=errno.EAGAIN,
    attempts=3,
    elapsed=0.25,
    freed=3 * MIB,
)


def test_a_result_is_one_line_for_a_log() -> None:
    assert str(RESULT) == (
        "pid 7 partial after 250.0 ms, signal 9, release 3: "
        f"{os.strerror(errno.EAGAIN)}, 3.0 MiB freed"
    )


def test_a_result_has_a_repr_that_makes_it() -> None:
    assert eval(repr(RESULT)) == RESULT


def test_results_compare_and_hash_by_value() -> None:
    fields: Any = RESULT.as_dict()
    same, other = KillResult(**fields), KillResult(**{**fields, "pid": 8})
    assert same == RESULT
    assert hash(same) == hash(RESULT)
    assert other != RESULT
    assert tuple(fields.values()) != RESULT


def test_a_result_goes_through_json_and_pickle() -> None:
    assert KillResult(**json.loads(json.dumps(RESULT.as_dict()))) == RESULT
    assert pickle.loads(pickle.dumps(RESULT)) == RESULT


def test_a_result_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        RESULT.pid = 1
    with pytest.raises(AttributeError, match="immutable"):
        del RESULT.pid
    with pytest.raises(AttributeError):
        RESULT.new = 1


# ---- Descriptors


@pytest.mark.parametrize("function", [kill, terminate, release])
def test_without_descriptors_nothing_is_killed(function: Any) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with victims.victim(1) as victim:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            assert errno_of(function, victim.pid) == errno.EMFILE
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert victim.state() == "S"


def test_a_pidfd_opened_early_kills_without_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with victims.victim(1) as victim, Pidfd.open(victim.pid) as pidfd:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            result = pidfd.kill(wait=True, timeout=None)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert result.exited
