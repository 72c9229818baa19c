"""The command: kill and doctor on real processes, exit statuses, the terminal."""

from __future__ import annotations

import errno
import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import victims
from calls import run_python
from mrelease import _proc
from mrelease._cli import main

COMMAND = (sys.executable, "-m", "mrelease")
OUTCOMES = ("released", "exited")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True
    )


def test_a_line_a_process_with_name_outcome_size_and_time() -> None:
    with victims.victim(16) as one, victims.victim(32) as two:
        result = run("kill", "--wait", one.pid, two.pid)
        assert (result.returncode, result.stderr) == (0, "")
        for victim, line in zip((one, two), result.stdout.splitlines(), strict=True):
            pid, name, outcome, size, mib, time, ms = line.split()
            assert (int(pid), mib, ms) == (victim.pid, "MiB", "ms")
            assert name.startswith("python")
            assert outcome in OUTCOMES
            assert float(size) >= (16 if victim is one else 32)
            assert float(time) > 0
            assert victim.exited()


def test_json_is_an_object_a_line() -> None:
    with victims.victim(16) as victim:
        result = run("kill", "--json", "--wait", victim.pid)
        found = json.loads(result.stdout)
        assert (found["pid"], found["signal"], found["exited"]) == (victim.pid, 9, True)
        assert found["freed"] >= 16 << 20
        assert found["name"].startswith("python")


def test_a_dry_run_names_what_would_die_and_touches_nothing() -> None:
    with victims.victim(16) as victim:
        result = run("kill", "-n", victim.pid)
        assert result.returncode == 0
        assert "would kill" in result.stdout
        assert float(result.stdout.split()[-2]) >= 16
        found = json.loads(run("kill", "-n", "--json", victim.pid).stdout)
        assert found["anonymous"] >= 16 << 20
        assert victim.state() == "S"


def test_term_asks_first() -> None:
    with victims.victim(sigterm="exit") as victim:
        result = run("kill", "--json", "--term=60", victim.pid)
        assert json.loads(result.stdout)["signal"] == 15
    with victims.victim(sigterm="exit") as victim:
        result = run("kill", "--json", victim.pid, "--term")
        assert json.loads(result.stdout)["signal"] == 15
    with victims.victim(sigterm="ignore") as victim:
        result = run("kill", "--json", "--wait", "--term", "0.1", victim.pid)
        assert json.loads(result.stdout)["signal"] == 9


@pytest.mark.needs("release")
def test_who_is_not_in_time_is_status_1() -> None:
    with victims.exit_stopped() as victim:
        assert run("kill", "--wait", "-t", "0.05", victim.pid).returncode == 1
    with victims.exit_stopped(sharer="clone") as victim:
        result = run("kill", "-t0.05", "--no-boost", victim.pid)
        assert (result.returncode, "busy" in result.stdout) == (1, True)


@pytest.mark.needs("release", "cpus")
def test_no_boost_leaves_the_scheduling_alone() -> None:
    cpu = min(os.sched_getaffinity(0))
    for option, count in (("--no-boost", 1), ("--wait", None)):
        with victims.exit_stopped() as victim:
            os.sched_setaffinity(victim.pid, {cpu})
            run("kill", option, "-t0.05", victim.pid)
            cpus = os.sched_getaffinity(victim.pid)
            assert (len(cpus) == 1) == (count == 1)


@pytest.mark.needs("release")
def test_settle_comes_before_the_release() -> None:
    with victims.exit_stopped() as victim:
        result = run("kill", "--json", "--settle=60", "-t0.05", victim.pid)
        found = json.loads(result.stdout)
        assert (result.returncode, found["outcome"], found["attempts"]) == (
            1,
            "exiting",
            0,
        )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["kill"],
        ["kill", "0"],
        ["kill", "-5"],
        ["kill", "x"],
        ["kill", "99999999999"],
        ["kill", "-t", "nan", "5"],
        ["kill", "-t", "-1", "5"],
        ["kill", "--settle", "soon", "5"],
        ["demo", "--size", "0"],
        ["nothing"],
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert "mrelease" in result.stderr


def test_no_target_is_killed_if_one_is_malformed() -> None:
    with victims.victim(1) as victim:
        assert run("kill", victim.pid, "x").returncode == 2
        assert victim.state() == "S"


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_init_is_refused_as_wrong_usage(options: tuple[str, ...]) -> None:
    result = run("kill", *options, 1)
    assert (result.returncode, result.stdout) == (2, "")
    assert "refusing to kill pid 1" in result.stderr


def test_no_such_process_is_status_3_and_the_rest_is_killed() -> None:
    with victims.victim(1) as victim:
        result = run("kill", "--wait", victims.reaped_pid(), victim.pid)
        assert result.returncode == 3
        assert "No process has the pid" in result.stderr
        assert len(result.stdout.splitlines()) == 1
        assert victim.exited()


def test_another_users_process_is_status_4(capfd: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        # In a child, because who gives up root cannot have it back.
        with victims.victim(1) as victim:
            child = os.fork()
            if child == 0:
                os.setresuid(65534, 65534, 65534)
                os._exit(main(["kill", str(victim.pid)]))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert victim.state() == "S"
    else:
        status = main(["kill", str(_roots_process())])
    assert status == 4
    shown = capfd.readouterr()
    assert (shown.out, "not permitted" in shown.err) == ("", True)


def _roots_process() -> int:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) > 1 and os.stat(f"/proc/{name}").st_uid == 0:
            return int(name)
    pytest.skip("needs a process of another user")


@pytest.mark.needs("seccomp", "release")
def test_a_filter_is_status_5() -> None:
    with victims.exit_stopped() as victim:
        program = f"""
import errno, pyseccomp
from mrelease._cli import main
filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
filter.add_rule(pyseccomp.ERRNO(errno.EPERM), "process_mrelease")
filter.load()
exit(max(main(["kill", "-t0.05", "{victim.pid}"]), main(["doctor"]), main(["demo"])))
"""
        result = run_python(program)
    assert result.returncode == 5
    assert "blocked" in result.stdout
    advice = "SystemCallFilter=@system-service process_mrelease"
    assert advice in " ".join(result.stdout.split())
    assert "mrelease doctor says why" in result.stderr


@contextmanager
def named(name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has given itself a name, by PR_SET_NAME."""
    program = f"""
import ctypes, sys
ctypes.CDLL(None).prctl(15, {name.encode(errors="surrogateescape")!r}, 0, 0, 0)
print("ready", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def test_a_name_brings_no_control_characters_to_the_terminal() -> None:
    with named("a\x1b[2Jb\udcff") as process:
        result = run("kill", process.pid)
    assert " a?[2Jb\\xff " in result.stdout


# ---- Nothing that becomes of the output stops a kill


@pytest.mark.parametrize(
    "redirection", ["| head -0", "> /dev/full", ">&-", "2>&-", ">&- 2>&- <&-"]
)
@pytest.mark.parametrize("options", ["", "--json"])
def test_every_target_dies_whatever_becomes_of_the_output(
    redirection: str, options: str
) -> None:
    with victims.victim(1) as one, victims.victim(1) as two:
        command = f"{shlex.join(COMMAND)} kill {options} --wait {one.pid} {two.pid}"
        result = subprocess.run(
            ["sh", "-c", f"{command} {redirection}"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert one.exited()
        assert two.exited()
    full = redirection == "> /dev/full"
    complaint = f"mrelease: standard output: {os.strerror(errno.ENOSPC)}\n"
    assert result.stderr == (complaint if full else "")
    assert result.returncode == (1 if full else 0)


def test_a_name_that_cannot_be_encoded_is_escaped() -> None:
    with named("jäger") as process:
        result = subprocess.run(
            [*COMMAND, "kill", str(process.pid)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
    assert (result.returncode, result.stderr) == (0, "")
    assert " j\\xe4ger " in result.stdout


@pytest.mark.parametrize(
    "arguments",
    ["doctor", pytest.param("demo --size 16", marks=pytest.mark.needs("release"))],
)
def test_a_reader_that_leaves_is_no_error(arguments: str) -> None:
    command = f"{shlex.join(COMMAND)} {arguments} | head -0"
    result = subprocess.run(["sh", "-c", command], capture_output=True)
    assert result.stderr == b""


def test_ctrl_c_says_who_was_killed_and_who_was_not() -> None:
    with victims.victim() as one, victims.victim(sigterm="exit") as two:
        one.stop()  # so that SIGTERM stays pending
        with subprocess.Popen(
            [*COMMAND, "kill", "--term=50", str(one.pid), str(two.pid)],
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            victims._until(lambda: has_a_sigterm(one.pid), "the first SIGTERM")
            two.wait_exit()
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
        assert process.returncode == 130
        assert errors == f"mrelease: interrupted; still there: {one.pid}\n"
        assert one.state() == "T"


def has_a_sigterm(pid: int) -> bool:
    pending = _proc.fields(f"/proc/{pid}/status")[b"ShdPnd"]
    return bool(int(pending, 16) & 1 << signal.SIGTERM - 1)


@pytest.mark.needs("release")
def test_on_a_terminal_it_says_what_it_waits_for() -> None:
    with victims.exit_stopped(16, sharer="clone") as victim:
        status, output = on_terminal("kill", "-t", "0.7", victim.pid)
        assert status == 1
        assert f"{victim.pid}: 0." in output
        assert "MiB held" in output
        assert "busy" in output


def test_a_terminal_that_goes_away_stops_no_kill() -> None:
    with (
        victims.victim(sigterm="ignore") as one,
        victims.victim(sigterm="ignore") as two,
    ):
        leader, follower = pty.openpty()
        # A session of its own, so that no SIGHUP comes.
        with subprocess.Popen(
            [*COMMAND, "kill", "--wait", "--term=0.6", str(one.pid), str(two.pid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=follower,
            start_new_session=True,
        ) as process:
            os.close(follower)
            assert b"held" in os.read(leader, 65536)
            os.close(leader)
        assert process.returncode == 0
        assert one.exited()
        assert two.exited()


def test_without_threads_to_be_had_a_kill_goes_on() -> None:
    with victims.victim(1) as one, victims.victim(1) as two:
        program = f"""
import sys, threading
from mrelease._cli import main
def start(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
sys.exit(main(["kill", "--wait", "{one.pid}", "{two.pid}"]))
"""
        leader, follower = pty.openpty()
        result = subprocess.run([sys.executable, "-c", program], stderr=follower)
        os.close(follower)
        os.close(leader)
        assert result.returncode == 0
        assert one.exited()
        assert two.exited()


@pytest.mark.parametrize("columns", [60, 100])
def test_help_is_as_wide_as_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    status, output = on_terminal("kill", "--help", columns=columns)
    assert status == 0
    assert columns - 15 < max(map(len, output.splitlines())) <= columns - 2
    monkeypatch.setenv("COLUMNS", "70")
    assert on_terminal("kill", "--help", columns=columns)[1] != output


def test_a_kill_does_not_load_what_only_help_needs() -> None:
    with victims.victim(1) as victim:
        program = f"""
import sys
before = set(sys.modules)
from mrelease._cli import main
main(["kill", "{victim.pid}"])
print("loaded", *set(sys.modules) - before)
"""
        result = run_python(program)
        loaded = result.stdout.splitlines()[-1].split()
        assert "argparse" in loaded
        assert "shutil" not in loaded


def on_terminal(*arguments: object, columns: int = 80) -> tuple[int, str]:
    """Run the command on a terminal of its own; return its status and what it shows."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, columns))
    try:
        with subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            # Left to itself the child has COLUMNS, of readline in this process.
            env=os.environ,
        ) as process:
            os.close(follower)
            shown = b""
            while chunk := _read(leader):
                shown += chunk
        return process.returncode, shown.decode()
    finally:
        os.close(leader)


def _read(leader: int) -> bytes:
    try:
        return os.read(leader, 65536)
    except OSError:
        return b""  # EIO: nobody has the other end open any more


def test_the_doctor_reports_privileges_kernel_and_filter() -> None:
    result = run("doctor")
    assert result.stderr == ""
    for word in ("kernel", "process_mrelease", "CAP_KILL", "CAP_SYS_NICE", "seccomp"):
        assert word in result.stdout
    report = json.loads(run("doctor", "--json").stdout)
    spared = Path("/proc/self/oom_score_adj").read_text() == "-1000\n"
    lacks = report["CAP_SYS_RESOURCE"] is not True and not spared
    assert ("CAP_SYS_RESOURCE" in report["advice"]) is lacks
    assert report["kernel"] == os.uname().release
    assert report["CAP_KILL"] is (os.geteuid() == 0)
    assert ("CAP_KILL" in report["advice"]) is not report["CAP_KILL"]
    assert result.returncode == (0 if report["process_mrelease"] is True else 5)


def test_the_version_is_the_packages() -> None:
    import mrelease

    assert run("--version").stdout == f"mrelease {mrelease.__version__}\n"
